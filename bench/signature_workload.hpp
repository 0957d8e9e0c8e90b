// SPDX-License-Identifier: Apache-2.0
// Signatures of a workload, how they are drawn from, and what that reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "magicpig/attention.hpp"
#include "magicpig/hash/product_quantiser.hpp"
#include "workload.hpp"

namespace magicpig::bench {

/// Bits per dimension, and the fraction of the rows that is read.
struct SignatureSetting {
  int bits = 1;
  double rows = 0.02;
};

/// The index over the middle of a workload, with the norms of values.
template <class Q>
struct QuantisedIndex {
  using Index = Signatures<Q>;

  std::unique_ptr<Q> quantiser;  // stays where it is: the index refers to it
  Index index;

  /// The quantiser drawn at random, or trained on the middle.
  template <class T>
  [[nodiscard]] static QuantisedIndex empty(const Workload<T>& workload, int bits) {
    auto quantiser = [&] {
      if constexpr (requires { Q::create(1, bits, 1); }) {
        return Q::create(workload.shape().head_dim, bits, 1);
      } else {
        SerialExecutor executor;
        return Q::train(make_backend<Ops>(executor), workload.view(), workload.middle(),
                        {.kv_heads = kKvHeads, .bits = bits});
      }
    }();
    if (!quantiser.ok()) fail(quantiser.status().message());
    auto kept = std::make_unique<Q>(std::move(*quantiser));
    auto index = Index::create(*kept, {.kv_heads = kKvHeads,

                                       .value_dim = workload.shape().head_dim,
                                       .memory_advice = workload.pages().index});
    if (!index.ok()) fail(index.status().message());
    return {.quantiser = std::move(kept), .index = std::move(*index)};
  }

  template <class T>
  void build(const Workload<T>& workload, ThreadPool& pool) {
    const Status status = index.build(make_backend<Ops>(pool), workload.view(), workload.middle());
    if (!status.ok()) fail(status.message());
  }

  [[nodiscard]] Systematic sampler(const SignatureSetting& setting) const {
    const auto made = Systematic::create(*quantiser, {.budget = {.fraction = setting.rows}});
    if (!made.ok()) fail(made.status().message());
    return *made;
  }

  template <class T>
  [[nodiscard]] DrawInput<StridedKeyValues<T>, Index> draw_input(const Workload<T>& workload,
                                                                 int kv_head) const {
    return {.key_values = workload.view(),
            .index = index,
            .kv_head = kv_head,
            .queries = workload.queries(kv_head),
            .scale = workload.scale(),
            .noise = {}};
  }
};

using SignatureIndex = QuantisedIndex<HadamardQuantiser>;

/// The index of a workload with so many bits, made when it is asked for first.
template <class T>
[[nodiscard]] SignatureIndex& signature_index(Harness& harness, Workload<T>& workload, int bits) {
  return harness.keep<SignatureIndex>("signatures " + std::to_string(bits), [&] {
    SignatureIndex made = SignatureIndex::empty(workload, bits);
    made.build(workload, harness.pool(1));
    return made;
  });
}

/// Codes, factors and norms of all indexed tokens.
template <class T>
[[nodiscard]] double scan_bytes(const Workload<T>& workload, const SignatureIndex& signatures) {
  return kKvHeads * static_cast<double>(workload.middle().size()) *
         static_cast<double>(
             SignatureIndex::Index::bytes_per_token(signatures.quantiser->shape(), true));
}

/// The drawn rows.
template <class T>
[[nodiscard]] Traffic drawn_traffic(Workload<T>& workload, const SignatureIndex& signatures,
                                    const SignatureSetting& setting) {
  const Systematic sampler = signatures.sampler(setting);
  SamplerScratch<Systematic> scratch(sampler, workload);
  const double indexed = workload.middle().size();
  Traffic traffic;
  for (int h = 0; h < kKvHeads; ++h) {
    const auto drawn = sampler.draw<Ops>(signatures.draw_input(workload, h), *scratch);
    traffic.rows += static_cast<double>(drawn.tokens.size()) / (indexed * kKvHeads);
    traffic.bytes += gather_bytes(workload, h, drawn, nullptr);
  }
  return traffic;
}

/// What a step reads: the scan, the exact and the drawn rows.
template <class T>
[[nodiscard]] Traffic signature_traffic(Workload<T>& workload, const SignatureIndex& signatures,
                                        const SignatureSetting& setting) {
  Traffic traffic = drawn_traffic(workload, signatures, setting);
  traffic.bytes += scan_bytes(workload, signatures);
  traffic.bytes += window_bytes(workload);
  return traffic;
}

}  // namespace magicpig::bench
