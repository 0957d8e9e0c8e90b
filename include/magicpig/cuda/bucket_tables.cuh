// SPDX-License-Identifier: Apache-2.0
// (K, L) bucket tables on the device: the tokens of one layer's requests by the hashes of their
// keys.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <iterator>
#include <span>
#include <utility>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/cuda/decode.cuh"
#include "magicpig/cuda/key_hasher.cuh"
#include "magicpig/cuda/key_values.cuh"
#include "magicpig/cuda/launch.cuh"
#include "magicpig/cuda/sign_planes.cuh"
#include "magicpig/hash/family.hpp"
#include "magicpig/index/segment.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {
namespace cuda {

/// What kernels see of bucket tables. A segment has the ids of its tokens ordered by bucket, as a
/// Segment on the host, and the offsets of the buckets, table by table.
struct TableView {
  std::uint16_t* ids = nullptr;      // [requests, kv_heads, segments, tables, segment_tokens]
  std::uint16_t* offsets = nullptr;  // [requests, kv_heads, segments, tables, buckets + 1]
  float* norms = nullptr;            // [requests, kv_heads, segments * segment_tokens]
  float* centres = nullptr;          // [requests, kv_heads, dim]
  std::int32_t* counts = nullptr;    // [requests] tokens
  // [requests, kv_heads] not 0 where a key was hashed that is not finite
  std::int32_t* spoiled = nullptr;
  int requests = 0;
  int kv_heads = 0;
  int dim = 0;
  int tables = 0;
  int buckets = 0;
  int segments = 0;  // of each request at most
  int segment_tokens = 0;
  TokenId first = 0;
  TokenId capacity = 0;

  /// KV heads of all requests.
  [[nodiscard]] std::size_t heads() const {
    return static_cast<std::size_t>(requests) * static_cast<std::size_t>(kv_heads);
  }
  /// Words of a bit set over the tokens of a request; whole ones for each segment.
  [[nodiscard]] __host__ __device__ int words() const { return segments * (segment_tokens / 32); }

  [[nodiscard]] __host__ __device__ std::int64_t head(int request, int kv_head) const {
    return std::int64_t{request} * kv_heads + kv_head;
  }
  [[nodiscard]] __host__ __device__ std::uint16_t* segment_ids(std::int64_t head,
                                                               int segment) const {
    return ids + (head * segments + segment) * tables * segment_tokens;
  }
  [[nodiscard]] __host__ __device__ std::uint16_t* segment_offsets(std::int64_t head,
                                                                   int segment) const {
    return offsets + (head * segments + segment) * tables * (buckets + 1);
  }
  [[nodiscard]] __host__ __device__ float* head_norms(std::int64_t head) const {
    return norms + head * segments * segment_tokens;
  }
  /// Tokens of a request if they end with token `end`.
  [[nodiscard]] __host__ __device__ int count_at(TokenId end) const {
    return end < first ? 0 : end - first < capacity ? end - first : capacity;
  }
};

/// Codes of the first `tokens` tokens of a segment, from its tables, to `codes` [tables, stride]. A
/// block of threads per table.
static __global__ void unsort_kernel(const std::uint16_t* ids, const std::uint16_t* offsets,
                                     int buckets, int tokens, Code* codes, int stride) {
  const std::int64_t table = blockIdx.x;
  const std::uint16_t* own_ids = ids + table * stride;
  const std::uint16_t* own_offsets = offsets + table * (buckets + 1);
  Code* own = codes + table * stride;
  for (int b = static_cast<int>(threadIdx.x); b < buckets; b += static_cast<int>(blockDim.x)) {
    for (int i = own_offsets[b]; i < own_offsets[b + 1]; ++i) {
      if (own_ids[i] < tokens) own[own_ids[i]] = static_cast<Code>(b);
    }
  }
}

/// Offsets of the buckets of sorted `codes` [tables, stride], `tokens` in each table: where the
/// first code of a bucket or above stands. A block of threads per table.
static __global__ void offsets_kernel(const Code* codes, int stride, int tokens, int buckets,
                                      std::uint16_t* offsets) {
  const std::int64_t table = blockIdx.x;
  const Code* own = codes + table * stride;
  for (int b = static_cast<int>(threadIdx.x); b <= buckets; b += static_cast<int>(blockDim.x)) {
    int low = 0;
    int high = tokens;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (own[middle] < b) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    offsets[table * (buckets + 1) + b] = static_cast<std::uint16_t>(low);
  }
}

/// Ids of tokens in each table before they are sorted: [tables, stride].
static __global__ void number_kernel(std::uint16_t* ids, int stride) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < stride) ids[std::int64_t{blockIdx.y} * stride + i] = static_cast<std::uint16_t>(i);
}

static __global__ void set_count_kernel(std::int32_t* count, int value) { *count = value; }

/// Where table i begins, or ends if `tokens` is how many are in each: an iterator for CUB.
struct TableEdges {
  using iterator_category = std::random_access_iterator_tag;
  using value_type = int;
  using difference_type = std::ptrdiff_t;
  using pointer = const int*;
  using reference = int;

  int stride = 0;
  int tokens = 0;
  std::ptrdiff_t table = 0;

  __host__ __device__ int operator[](std::ptrdiff_t i) const {
    return static_cast<int>(table + i) * stride + tokens;
  }
  __host__ __device__ int operator*() const { return (*this)[0]; }
  __host__ __device__ TableEdges operator+(std::ptrdiff_t i) const {
    return {.stride = stride, .tokens = tokens, .table = table + i};
  }
};

/// What bucket tables on the device are made for.
struct BucketTablesConfig {
  int requests = 1;
  int kv_heads = 1;
  TokenId capacity = 0;  ///< tokens of each request that can be indexed
  TokenId first = 4;     ///< the first token that is; those before it are attention sinks
  /// Tokens per segment, a multiple of 32 in [64, kMaxSegmentTokens]. A block of threads looks up a
  /// query head in a segment: smaller ones are shared by more of them, and cost 2 L (2^K + 1) bytes
  /// each.
  int segment_tokens = 8192;
  int seal_tokens = 1024;  ///< append() takes tokens in multiples of this
};

/// The tables of one layer's requests, in memory of the host's on the device. They hold what
/// magicpig::BucketTables with the same segment_tokens holds of the same codes.
///
/// Memory per token of capacity and KV head: 2 L bytes of ids, 4 of norm, and 2 L (2^K + 1) /
/// segment_tokens of offsets, capacity rounded up to whole segments; it owns none of it. Work is
/// done in the order of a stream by kernels of its own, of cuBLAS and of CUB, some ten per segment
/// and KV head that is changed; nothing waits or allocates on the device. How many tokens are
/// indexed the host knows, so that these calls are not for graphs that are replayed; a decode step
/// reads it on the device. Movable. Threads: one at a time.
class BucketTables {
 public:
  /// Bytes of device memory, of any alignment, for tables of the codes of `family`.
  template <HashFamily Family>
  [[nodiscard]] static std::size_t bytes(const Family& family, const BucketTablesConfig& config) {
    return bytes_of({.dim = family.dim(), .bits = family.bits(), .tables = family.tables()},
                    config);
  }

  /// Empty tables in `memory` on the device, of at least bytes(), in the order of `stream`. Errors:
  /// sizes out of bounds, memory that is too small, memory of the host, those of the runtime; what
  /// CUB says when it is asked what it needs.
  [[nodiscard]] static Result<BucketTables> create(const SignPlanes& planes,
                                                   const BucketTablesConfig& config,
                                                   std::span<std::byte> memory,
                                                   cudaStream_t stream) noexcept {
    Status status = check_heads(config.requests, config.kv_heads);
    if (!status.ok()) return status;
    if (config.segment_tokens < 64 || config.segment_tokens > kMaxSegmentTokens ||
        config.segment_tokens % 32 != 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "segment_tokens %d must be a multiple of 32 in [64, %d]",
                           config.segment_tokens, kMaxSegmentTokens);
    }
    if (config.seal_tokens < 1) {
      return Status::error(ErrorCode::kInvalidArgument, "seal_tokens %d must be at least 1",
                           config.seal_tokens);
    }
    status = check_capacity(config.capacity, config.first, INT32_MAX - kMaxSegmentTokens);
    if (!status.ok()) return status;
    status = check_memory(memory.size(), bytes_of(planes.view(), config), "the tables");
    if (!status.ok()) return status;
    Arena arena(memory);
    BucketTables tables(planes, config, carve(arena, planes.view(), config));
    if (!tables.counts_.resize(static_cast<std::size_t>(config.requests))) {
      return Status::error(ErrorCode::kOutOfMemory, "no memory for %d requests", config.requests);
    }
    const TableView& view = tables.view_;
    status =
        sort_tables(view, view.segment_tokens, Scratch{}, tables.storage_bytes_, nullptr, nullptr);
    if (status.ok()) status = tables.clear(stream);
    if (!status.ok()) return status;
    return tables;
  }

  /// Bytes of device memory that build(), append() and truncate() need, of any alignment.
  [[nodiscard]] std::size_t workspace_bytes() const {
    Arena arena;
    (void)carve_scratch(arena);
    (void)KeyHasher(planes_, arena, nullptr);
    return arena.bytes_needed();
  }

  /// Forgets all tokens of all requests.
  [[nodiscard]] Status clear(cudaStream_t stream) noexcept {
    for (TokenId& count : counts_.span()) count = 0;
    const Status status =
        status_of(cudaMemsetAsync(view_.counts, 0, counts_.size() * sizeof(std::int32_t), stream),
                  "clear counts");
    return status.ok() ? mend(0, view_.heads(), stream) : status;
  }

  /// Replaces what there is of a request by its tokens [first, end), with the means of their keys
  /// as centres. An `end` at or below `first` leaves none; tokens beyond the capacity stay exact.
  /// Of a key that is not finite nothing is known here: attention of its KV head is not finite
  /// then, until the request is built anew or has been empty. Errors: as append().
  template <class T>
  [[nodiscard]] Status build(const KeyValues<T>& from, int request, TokenId end,
                             std::span<std::byte> workspace, cublasHandle_t blas,
                             cudaStream_t stream) noexcept {
    Status status = check_change(from, request, workspace.size());
    if (status.ok()) status = commit(request, 0, stream);
    return status.ok() ? extend(from, request, end, workspace, blas, stream) : status;
  }

  /// Takes over tokens of a request before `end`, in multiples of seal_tokens; the others stay
  /// exact until a later call, and those beyond the capacity for good. The first call of an empty
  /// request makes its centres. An `end` at or below that of the tokens that it has changes
  /// nothing. Errors, which leave the request as it is: as KeyValues::check(), other heads or
  /// dimensions than these are for, a request that there is not, a workspace that is too small.
  /// Those of cuBLAS, CUB and the runtime, too; what the device did until then may be lost with
  /// them.
  template <class T>
  [[nodiscard]] Status append(const KeyValues<T>& from, int request, TokenId end,
                              std::span<std::byte> workspace, cublasHandle_t blas,
                              cudaStream_t stream) noexcept {
    const Status status = check_change(from, request, workspace.size());
    if (!status.ok()) return status;
    const TokenId had = indexed(request).end;
    end = (std::min)(end, view_.first + view_.capacity);
    if (end <= had) return status;
    return extend(from, request, end - (end - had) % seal_tokens_, workspace, blas, stream);
  }

  /// Forgets tokens of a request from `end` on. An `end` beyond those that it has changes nothing.
  /// Errors: a request that there is not, a negative `end`, a workspace that is too small; those of
  /// CUB and the runtime, after which the request is empty.
  [[nodiscard]] Status truncate(int request, TokenId end, std::span<std::byte> workspace,
                                cudaStream_t stream) noexcept {
    Status status = check_request(request);
    if (status.ok() && end < 0) {
      status = Status::error(ErrorCode::kInvalidArgument, "end %d must not be negative", end);
    }
    if (status.ok()) status = check_memory(workspace.size(), workspace_bytes(), "the change");
    const int rest = view_.count_at(end);
    if (!status.ok() || rest >= count(request)) return status;
    Arena arena(workspace);
    const Scratch scratch = carve_scratch(arena);
    const int segment = rest / view_.segment_tokens;
    const int tokens = rest % view_.segment_tokens;
    if (tokens > 0) status = number(scratch, stream);
    for (int h = 0; h < view_.kv_heads && tokens > 0 && status.ok(); ++h) {
      const std::int64_t head = view_.head(request, h);
      status = unsort(head, segment, tokens, scratch, stream);
      if (status.ok()) status = sort(head, segment, tokens, scratch, stream);
    }
    if (status.ok()) return commit(request, rest, stream);
    (void)commit(request, 0, stream);  // of some heads the segment has been cut
    return status;
  }

  /// Errors: as KeyValues::check(), other requests, heads or dimensions than these are for.
  template <class T>
  [[nodiscard]] Status check(const KeyValues<T>& from) const noexcept {
    return from.check_for(view_, "tables");
  }

  /// Tokens of a request that are indexed once the stream has done what it was given.
  [[nodiscard]] TokenRange indexed(int request) const {
    return {.begin = view_.first, .end = view_.first + count(request)};
  }
  [[nodiscard]] const TableView& view() const { return view_; }
  [[nodiscard]] const SignPlanes& planes() const { return planes_; }

 private:
  // Of one segment of one KV head at a time.
  struct Scratch {
    Code* codes = nullptr;             // [tables, segment_tokens]
    Code* sorted = nullptr;            // likewise
    std::uint16_t* numbers = nullptr;  // likewise
    std::byte* storage = nullptr;      // CUB's
  };

  BucketTables(const SignPlanes& planes, const BucketTablesConfig& config, const TableView& view)
      : planes_(planes), view_(view), seal_tokens_(config.seal_tokens) {}

  static std::size_t bytes_of(const PlanesView& planes, const BucketTablesConfig& config) {
    Arena arena;
    (void)carve(arena, planes, config);
    return arena.bytes_needed();
  }
  static TableView carve(Arena& arena, const PlanesView& planes, const BucketTablesConfig& config) {
    TableView view{.requests = config.requests,
                   .kv_heads = config.kv_heads,
                   .dim = planes.dim,
                   .tables = planes.tables,
                   .buckets = bucket_count(planes.bits),
                   .segments = (config.capacity - 1) / config.segment_tokens + 1,
                   .segment_tokens = config.segment_tokens,
                   .first = config.first,
                   .capacity = config.capacity};
    const std::size_t segments = view.heads() * static_cast<std::size_t>(view.segments);
    const std::size_t tokens = segments * static_cast<std::size_t>(view.segment_tokens);
    const auto tables = static_cast<std::size_t>(view.tables);
    view.ids = arena.take<std::uint16_t>(tokens * tables);
    view.offsets =
        arena.take<std::uint16_t>(segments * tables * static_cast<std::size_t>(view.buckets + 1));
    view.norms = arena.take<float>(tokens);
    view.centres = arena.take<float>(view.heads() * static_cast<std::size_t>(view.dim));
    view.counts = arena.take<std::int32_t>(static_cast<std::size_t>(view.requests));
    view.spoiled = arena.take<std::int32_t>(view.heads());
    return view;
  }

  [[nodiscard]] Scratch carve_scratch(Arena& arena) const {
    const auto codes =
        static_cast<std::size_t>(view_.tables) * static_cast<std::size_t>(view_.segment_tokens);
    return {.codes = arena.take<Code>(codes),
            .sorted = arena.take<Code>(codes),
            .numbers = arena.take<std::uint16_t>(codes),
            .storage = arena.take<std::byte>(storage_bytes_)};
  }

  [[nodiscard]] int count(int request) const {
    return counts_.data()[static_cast<std::size_t>(request)];
  }

  [[nodiscard]] Status check_request(int request) const noexcept {
    if (request >= 0 && request < view_.requests) return Status();
    return Status::error(ErrorCode::kInvalidArgument, "request %d must lie in [0, %d)", request,
                         view_.requests);
  }
  template <class T>
  [[nodiscard]] Status check_change(const KeyValues<T>& from, int request,
                                    std::size_t workspace) const noexcept {
    Status status = check(from);
    if (status.ok()) status = check_request(request);
    if (status.ok()) status = check_memory(workspace, workspace_bytes(), "the change");
    return status;
  }

  // Indexes the tokens of a request that come before `end`; the first ones make its centres.
  template <class T>
  [[nodiscard]] Status extend(const KeyValues<T>& from, int request, TokenId end,
                              std::span<std::byte> workspace, cublasHandle_t blas,
                              cudaStream_t stream) noexcept {
    const int had = count(request);
    const int total = view_.count_at(end);
    if (total <= had) return Status();
    Arena arena(workspace);
    const Scratch scratch = carve_scratch(arena);
    const KeyHasher hasher(planes_, arena, blas);
    Status status = number(scratch, stream);
    if (status.ok() && had == 0) {
      const std::int64_t head = view_.head(request, 0);
      status = mend(head, static_cast<std::size_t>(view_.kv_heads), stream);
      if (status.ok()) {
        const TokenRange tokens{.begin = view_.first, .end = view_.first + total};
        status =
            hasher.make_centres(from, request, tokens, view_.centres + head * view_.dim, stream);
      }
    }
    for (int done = had; done < total && status.ok();) {
      const int segment = done / view_.segment_tokens;
      const int old = done % view_.segment_tokens;
      const int tokens = (std::min)(total - segment * view_.segment_tokens, view_.segment_tokens);
      for (int h = 0; h < view_.kv_heads && status.ok(); ++h) {
        const std::int64_t head = view_.head(request, h);
        if (old > 0) status = unsort(head, segment, old, scratch, stream);
        const TokenId begin = view_.first + done;
        const HashPlaces places{.codes = scratch.codes + old,
                                .stride = view_.segment_tokens,
                                .norms = view_.head_norms(head) + done,
                                .spoiled = view_.spoiled + head};
        if (status.ok()) {
          status = hasher.hash(from, request, h, {.begin = begin, .end = begin + tokens - old},
                               view_.centres + head * view_.dim, places, stream);
        }
        if (status.ok()) status = sort(head, segment, tokens, scratch, stream);
      }
      done += tokens - old;
    }
    return status.ok() ? commit(request, total, stream) : status;
  }

  [[nodiscard]] Status number(const Scratch& scratch, cudaStream_t stream) const noexcept {
    constexpr unsigned kThreads = 256;
    const auto tokens = static_cast<unsigned>(view_.segment_tokens);
    const Grid grid{
        .blocks = dim3((tokens - 1) / kThreads + 1, static_cast<unsigned>(view_.tables)),
        .threads = kThreads};
    return launch("number_kernel", number_kernel, grid, stream, scratch.numbers,
                  view_.segment_tokens);
  }

  [[nodiscard]] Grid per_table() const {
    return {.blocks = dim3(static_cast<unsigned>(view_.tables)), .threads = 256};
  }

  // The codes of the first `tokens` of a segment, to the scratch.
  [[nodiscard]] Status unsort(std::int64_t head, int segment, int tokens, const Scratch& scratch,
                              cudaStream_t stream) const noexcept {
    const std::uint16_t* ids = view_.segment_ids(head, segment);
    const std::uint16_t* offsets = view_.segment_offsets(head, segment);
    return launch("unsort_kernel", unsort_kernel, per_table(), stream, ids, offsets, view_.buckets,
                  tokens, scratch.codes, view_.segment_tokens);
  }

  // The tables of a segment of `tokens` tokens, from the codes in the scratch.
  [[nodiscard]] Status sort(std::int64_t head, int segment, int tokens, const Scratch& scratch,
                            cudaStream_t stream) const noexcept {
    std::size_t bytes = storage_bytes_;
    const Status status =
        sort_tables(view_, tokens, scratch, bytes, view_.segment_ids(head, segment), stream);
    if (!status.ok()) return status;
    return launch("offsets_kernel", offsets_kernel, per_table(), stream, scratch.sorted,
                  view_.segment_tokens, tokens, view_.buckets,
                  view_.segment_offsets(head, segment));
  }

  // Numbers of tokens in the order of their codes, to `ids`. Without storage only says how many
  // `bytes` of it are needed. CUB's radix sort is stable: ids ascend within a bucket.
  [[nodiscard]] static Status sort_tables(const TableView& view, int tokens, const Scratch& scratch,
                                          std::size_t& bytes, std::uint16_t* ids,
                                          cudaStream_t stream) noexcept {
    const TableEdges begins{.stride = view.segment_tokens};
    const TableEdges ends{.stride = view.segment_tokens, .tokens = tokens};
    const int bits = std::countr_zero(static_cast<unsigned>(view.buckets));
    return status_of(
        cub::DeviceSegmentedRadixSort::SortPairs(
            scratch.storage, bytes, static_cast<const Code*>(scratch.codes), scratch.sorted,
            static_cast<const std::uint16_t*>(scratch.numbers), ids,
            view.tables * view.segment_tokens, view.tables, begins, ends, 0, bits, stream),
        "cub::DeviceSegmentedRadixSort");
  }

  // KV heads of which no key is not finite.
  [[nodiscard]] Status mend(std::int64_t head, std::size_t count,
                            cudaStream_t stream) const noexcept {
    return status_of(cudaMemsetAsync(view_.spoiled + head, 0, count * sizeof(std::int32_t), stream),
                     "clear heads");
  }

  // How many tokens a request has, here and, in the order of the stream, on the device.
  [[nodiscard]] Status commit(int request, int count, cudaStream_t stream) noexcept {
    const Grid grid{.blocks = dim3(1), .threads = 1};
    const Status status =
        launch("set_count_kernel", set_count_kernel, grid, stream, view_.counts + request, count);
    if (status.ok()) counts_.data()[static_cast<std::size_t>(request)] = count;
    return status;
  }

  SignPlanes planes_;
  TableView view_;
  int seal_tokens_;
  std::size_t storage_bytes_ = 0;
  Buffer<TokenId> counts_;  // [requests]
};

}  // namespace cuda
}  // namespace magicpig::inline MAGICPIG_ABI
