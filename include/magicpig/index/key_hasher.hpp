// SPDX-License-Identifier: Apache-2.0
// Centres, norms and codes of the keys of a layer: what an index over hashed keys is built from.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>

#include "magicpig/core/buffer.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/hash/family.hpp"
#include "magicpig/index/centres.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Hashes keys on a backend's workers, kHashBatch at a time: the planes are then read once for all
/// of a batch, and the projections are products of two matrices (VectorOps::project).
/// Memory: for each worker a batch of centred keys, its projections and its codes.
/// Threads: one call at a time; the work inside is spread over the executor.
template <HashFamily Family>
class KeyHasher {
 public:
  /// `family` must outlive the hasher.
  explicit KeyHasher(const Family& family) : family_(&family) {}

  /// Memory for `kv_heads` heads and `workers` workers; false when it is short.
  [[nodiscard]] bool reserve(int kv_heads, int workers) noexcept {
    const auto crew = static_cast<std::size_t>(workers);
    const auto batch = static_cast<std::size_t>(kHashBatch);
    const auto width = static_cast<std::size_t>(dim());
    floats_ = round_up<float>(batch * width + family_->scratch_floats(kHashBatch));
    codes_ = round_up<Code>(batch * static_cast<std::size_t>(family_->tables()));
    return sums_.resize(static_cast<std::size_t>(kv_heads) * width) &&
           scratch_.resize(crew * floats_) && batches_.resize(crew * codes_);
  }

  /// The means of the keys of `tokens` to `centres` [kv_heads, dim]. Needs reserve(), a token, and
  /// `keys` of kMeanSlots slots.
  template <class Backend, KeyValueSource Source>
  void make_centres(const Backend& backend, KeyReader<Source>& keys, TokenRange tokens,
                    float* centres) noexcept {
    mean_of_rows(backend, keys.source().kv_heads(), dim(), tokens, keys, sums_.data(), centres);
  }

  /// For the keys k of `tokens` of one KV head: |k - c| to `norms` [tokens] and the codes of k - c
  /// to `codes` [tables, stride], the first `tokens` of each row; c is `centre` [dim]. A norm that
  /// is not finite tells of a key that is not, or of a centre made from one; its codes are then
  /// without meaning. Needs reserve() for at least the backend's workers.
  template <class Backend, KeyValueSource Source>
  void hash(const Backend& backend, KeyReader<Source>& keys, int kv_head, TokenRange tokens,
            const float* centre, float* norms, Code* codes, int stride) noexcept {
    const int tasks = (tokens.size() + kTaskTokens - 1) / kTaskTokens;
    const int tables = family_->tables();
    backend.executor.parallel_for(tasks, [&](int task, int worker) {
      float* centred = scratch_.data() + static_cast<std::size_t>(worker) * floats_;
      float* projections = centred + std::int64_t{kHashBatch} * dim();
      Code* batch = batches_.data() + static_cast<std::size_t>(worker) * codes_;
      const int first = task * kTaskTokens;
      const int last = smaller(first + kTaskTokens, tokens.size());
      for (int t = first; t < last; t += kHashBatch) {
        const int count = smaller(kHashBatch, last - t);
        for (int i = 0; i < count; ++i) {
          norms[t + i] = centre_key(keys.row(kv_head, tokens.begin + t + i, worker), centre,
                                    centred + std::int64_t{i} * dim());
        }
        family_->template hash<typename Backend::Ops>(centred, count, batch, projections);
        for (int l = 0; l < tables; ++l) {
          Code* row = codes + std::int64_t{l} * stride + t;
          for (int i = 0; i < count; ++i) row[i] = batch[std::int64_t{i} * tables + l];
        }
      }
    });
  }

  [[nodiscard]] std::size_t bytes() const {
    return sums_.bytes() + scratch_.bytes() + batches_.bytes();
  }

 private:
  static constexpr int kTaskTokens = 256;

  static int smaller(int a, int b) { return a < b ? a : b; }

  // Whole cache lines, so that no two workers write to the same one.
  template <class T>
  static std::size_t round_up(std::size_t count) {
    constexpr std::size_t kLine = kAlignment / sizeof(T);
    return (count + kLine - 1) / kLine * kLine;
  }

  [[nodiscard]] int dim() const { return family_->dim(); }

  // out = key - centre, returns its norm.
  template <class T>
  float centre_key(const T* key, const float* centre, float* out) const {
    double sum = 0.0;
    for (int j = 0; j < dim(); ++j) {
      out[j] = scalar_at(key, j) - centre[j];
      sum += static_cast<double>(out[j]) * static_cast<double>(out[j]);
    }
    return static_cast<float>(::sqrt(sum));
  }

  const Family* family_;
  std::size_t floats_ = 0;  // of scratch_ for one worker: centred keys, then projections
  std::size_t codes_ = 0;   // of batches_ for one worker
  Buffer<double> sums_;     // [kv_heads, dim]
  Buffer<float> scratch_;   // [workers, floats_]
  Buffer<Code> batches_;    // [workers, codes_]: [kHashBatch, tables] each
};

}  // namespace magicpig::inline MAGICPIG_ABI
