// SPDX-License-Identifier: Apache-2.0
// Caches with hash tables on the device, and the host's tables of the same codes.
#pragma once

#include <cublas_v2.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "device_cache.cuh"
#include "magicpig/attention.hpp"
#include "magicpig/cuda/bucket_tables.cuh"
#include "magicpig/cuda/sign_planes.cuh"
#include "magicpig/hash/simhash.hpp"
#include "magicpig/index/hashed_keys.hpp"

namespace magicpig::test {

/// cuBLAS for as long as it lives.
class Blas {
 public:
  Blas() { REQUIRE(cublasCreate(&handle_) == CUBLAS_STATUS_SUCCESS); }
  ~Blas() { (void)cublasDestroy(handle_); }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;
  [[nodiscard]] cublasHandle_t get() const { return handle_; }

 private:
  cublasHandle_t handle_ = nullptr;
};

struct TableSetting {
  int bits = 6;     ///< K
  int tables = 20;  ///< L
  int segment_tokens = 512;
  int seal_tokens = 100;
};

/// A request's codes, norms and tables, downloaded.
struct DownloadedTables {
  DownloadedTables(const cuda::TableView& view, int request)
      : count(download(view.counts + request, 1)[0]), heads(view.kv_heads), from(view) {
    for (int h = 0; h < heads; ++h) {
      const std::int64_t head = view.head(request, h);
      const auto tokens = static_cast<std::size_t>(view.segments * view.segment_tokens);
      const auto tables = static_cast<std::size_t>(view.segments * view.tables);
      ids.push_back(download(view.segment_ids(head, 0),
                             tables * static_cast<std::size_t>(view.segment_tokens)));
      offsets.push_back(download(view.segment_offsets(head, 0),
                                 tables * static_cast<std::size_t>(view.buckets + 1)));
      const auto own = download(view.head_norms(head), tokens);
      norms.insert(norms.end(), own.begin(), own.begin() + count);
      for (int l = 0; l < view.tables; ++l) append_codes(h, l);
    }
    const auto size = static_cast<std::size_t>(heads * view.dim);
    centres = download(view.centres + view.head(request, 0) * view.dim, size);
  }

  /// Of a segment's table, where the bucket begins; and the ids of the table.
  [[nodiscard]] const std::uint16_t* edges(int kv_head, int segment, int table) const {
    return offsets[static_cast<std::size_t>(kv_head)].data() +
           std::int64_t{segment * from.tables + table} * (from.buckets + 1);
  }
  [[nodiscard]] const std::uint16_t* table_ids(int kv_head, int segment, int table) const {
    return ids[static_cast<std::size_t>(kv_head)].data() +
           std::int64_t{segment * from.tables + table} * from.segment_tokens;
  }
  [[nodiscard]] HashedKeys hashed() const {
    return {.tokens = {.begin = from.first, .end = from.first + count},
            .codes = codes.data(),
            .norms = norms.data(),
            .centres = {.keys = centres}};
  }

  int count;
  int heads;
  cuda::TableView from;
  std::vector<std::vector<std::uint16_t>> ids;
  std::vector<std::vector<std::uint16_t>> offsets;
  std::vector<Code> codes;     // [kv_heads, tables, tokens]
  std::vector<float> norms;    // [kv_heads, tokens]
  std::vector<float> centres;  // [kv_heads, dim]

 private:
  // Reads them off the buckets, which must hold each token once.
  void append_codes(int kv_head, int table) {
    std::vector<Code> own(static_cast<std::size_t>(count), Code{0xffff});
    bool sound = true;
    for (int s = 0; s * from.segment_tokens < count; ++s) {
      const int tokens = std::min(count - s * from.segment_tokens, from.segment_tokens);
      const std::uint16_t* at = edges(kv_head, s, table);
      sound = sound && at[0] == 0 && at[from.buckets] == tokens;
      for (int b = 0; b < from.buckets && sound; ++b) {
        for (int i = at[b]; i < at[b + 1]; ++i) {
          const int id = table_ids(kv_head, s, table)[i];
          sound = sound && id < tokens;
          if (sound) own[static_cast<std::size_t>(s * from.segment_tokens + id)] = Code(b);
        }
      }
    }
    CHECK(sound);
    CHECK(std::count(own.begin(), own.end(), Code{0xffff}) == 0);
    codes.insert(codes.end(), own.begin(), own.end());
  }
};

template <class T>
struct TableProblem : DeviceCache<T> {
  using Index = magicpig::BucketTables<SimHash>;
  using DeviceCache<T>::config;

  TableProblem(const DeviceCacheConfig& own, const TableSetting& shape)
      : DeviceCache<T>(own),
        setting(shape),
        family(make_family(own, shape)),
        planes_memory(cuda::SignPlanes::bytes(*family)),
        planes(make_planes()),
        memory(cuda::BucketTables::bytes(*family, tables_config())),
        index(make_index()),
        workspace(index->workspace_bytes()) {}

  [[nodiscard]] cuda::BucketTablesConfig tables_config() const {
    return {.requests = config.requests,
            .kv_heads = config.kv_heads,
            .capacity = config.capacity,
            .first = config.first,
            .segment_tokens = setting.segment_tokens,
            .seal_tokens = setting.seal_tokens};
  }

  void build(const std::vector<std::int32_t>& ends) {
    for (int r = 0; r < config.requests; ++r) {
      require(index->build(this->device(), r, ends[static_cast<std::size_t>(r)], workspace.span(),
                           blas.get(), nullptr));
    }
  }
  [[nodiscard]] DownloadedTables downloaded(int request) const {
    return DownloadedTables(index->view(), request);
  }

  /// The host's tables of the codes that the device has of a request.
  [[nodiscard]] std::unique_ptr<Index> host_index(int request) const {
    const DownloadedTables from = downloaded(request);
    auto made = Index::create(
        *family, {.kv_heads = config.kv_heads, .segment_tokens = setting.segment_tokens});
    require(made.status());
    auto own = std::make_unique<Index>(std::move(*made));
    SerialExecutor serial;
    require(own->build(make_backend<ScalarOps>(serial), from.hashed()));
    return own;
  }

  TableSetting setting;
  Blas blas;
  std::unique_ptr<SimHash> family;
  DeviceArray<std::byte> planes_memory;
  cuda::SignPlanes planes;
  DeviceArray<std::byte> memory;
  std::unique_ptr<cuda::BucketTables> index;
  DeviceArray<std::byte> workspace;

 private:
  static std::unique_ptr<SimHash> make_family(const DeviceCacheConfig& config,
                                              const TableSetting& setting) {
    auto made = SimHash::create(
        {.dim = config.dim, .bits = setting.bits, .tables = setting.tables, .seed = 9});
    require(made.status());
    return std::make_unique<SimHash>(std::move(*made));
  }
  [[nodiscard]] cuda::SignPlanes make_planes() const {
    const auto made = cuda::SignPlanes::create(*family, planes_memory.span(), nullptr);
    require(made.status());
    return *made;
  }
  [[nodiscard]] std::unique_ptr<cuda::BucketTables> make_index() const {
    auto made = cuda::BucketTables::create(planes, tables_config(), memory.span(), nullptr);
    require(made.status());
    return std::make_unique<cuda::BucketTables>(std::move(*made));
  }
};

/// Codes of `vector` [dim] may differ where projections are within rounding of 0: whether they do
/// nowhere else. Counts those bits.
inline bool same_codes(const SimHash& family, const std::vector<float>& vector, const Code* codes,
                       std::int64_t stride, int& rounded) {
  double norm = 0.0;
  for (const float x : vector) norm += static_cast<double>(x) * static_cast<double>(x);
  bool same = true;
  for (int l = 0; l < family.tables(); ++l) {
    for (int b = 0; b < family.bits(); ++b) {
      const int plane = b * family.tables() + l;
      double sum = 0.0;
      double square = 0.0;
      for (int j = 0; j < family.dim(); ++j) {
        const double p = family.plane(plane, j);
        sum += p * static_cast<double>(vector[static_cast<std::size_t>(j)]);
        square += p * p;
      }
      const bool own = ((codes[l * stride] >> b) & 1) != 0;
      if (own == (sum > 0.0)) continue;
      ++rounded;
      same = same && std::abs(sum) <= 0x1p-15 * std::sqrt(norm * square);
    }
  }
  return same;
}

}  // namespace magicpig::test
