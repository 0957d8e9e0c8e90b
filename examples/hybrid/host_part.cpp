// SPDX-License-Identifier: Apache-2.0
#include "host_part.hpp"

#include <algorithm>
#include <thread>
#ifdef HYBRID_HIGHWAY
#include <magicpig/cpu/highway.hpp>
#endif

namespace magicpig::hybrid {
namespace {

#ifdef HYBRID_HIGHWAY
using Ops = HighwayOps;
#else
using Ops = ScalarOps;
#endif

constexpr Shape kShape{
    .query_heads = kQueryHeads, .kv_heads = kKvHeads, .head_dim = kDim, .value_dim = kDim};

int workers() { return static_cast<int>(std::max(1U, std::thread::hardware_concurrency())); }

}  // namespace

HostPart::HostPart(const SimHash& family, bf16* keys, bf16* values, TokenId capacity)
    : keys_(keys),
      values_(values),
      capacity_(capacity),
      sampler_(Collisions::create(family, {.min_collisions = 2}).value()),
      // An append rewrites the last segment, so it is small.
      tables_(BucketTables<SimHash>::create(family, {.kv_heads = kKvHeads, .segment_tokens = 4096})
                  .value()),
      pool_(ThreadPool::create(workers()).value()),
      out_(kQueryHeads * kDim) {
  for (std::size_t h = 0; h < kQueryHeads; ++h) {
    states_.push_back({.out = std::span(out_).subspan(h * kDim, kDim)});
  }
}

Status HostPart::begin(const HashedKeys& hashes) {
  return tables_.build(make_backend<Ops>(*pool_), hashes);
}

Status HostPart::append(const HashedKeys& hashes) {
  return tables_.append(make_backend<Ops>(*pool_), hashes);
}

Status HostPart::attend(std::span<const float> queries, std::span<const Code> codes) {
  return run(DecodePlan<Collisions>{.shape = kShape, .sampler = &sampler_, .exact_below = 0},
             queries, codes);
}

Status HostPart::attend_exactly(std::span<const float> queries) {
  const Exact all;
  return run(DecodePlan<Exact>{.shape = kShape, .sampler = &all}, queries, {});
}

template <class Plan>
Status HostPart::run(const Plan& plan, std::span<const float> queries,
                     std::span<const Code> codes) {
  constexpr std::int64_t kRow = kDim * sizeof(bf16);
  const ByteStrides strides{.head = kRow * capacity_, .token = kRow};
  const auto cache = StridedKeyValues<bf16>::create({.keys = keys_,
                                                     .values = values_,
                                                     .key_strides = strides,
                                                     .value_strides = strides,
                                                     .kv_heads = kKvHeads,
                                                     .head_dim = kDim,
                                                     .value_dim = kDim,
                                                     .tokens = tokens().end});
  if (!cache.ok()) return cache.status();
  // Tokens before the first one are the device's, and those behind the last.
  const Request<StridedKeyValues<bf16>, BucketTables<SimHash>> requests[] = {
      {.key_values = &*cache,
       .index = &tables_,
       .query = queries,
       .states = states_,
       .first_visible = tokens().begin,
       .query_codes = codes}};
  const std::size_t needed = workspace_bytes(plan, capacity_, pool_->workers());
  if (workspace_.size() < needed) workspace_.resize(needed);
  return decode(make_backend<Ops>(*pool_), plan, requests, workspace_);
}

const char* HostPart::backend() {
#ifdef HYBRID_HIGHWAY
  return "Highway";
#else
  return "plain C++ (slow; the component highway is not built)";
#endif
}

std::size_t HostPart::bytes() const {
  return tables_.bytes() + 2 * row(kKvHeads, 0) * sizeof(bf16);
}

}  // namespace magicpig::hybrid
