// SPDX-License-Identifier: Apache-2.0
// Codes that are trained on keys: principal components, and k-means of a few of them at a time.
#pragma once

#include <math.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "magicpig/core/blob.hpp"
#include "magicpig/core/buffer.hpp"
#include "magicpig/core/checksum.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/random.hpp"
#include "magicpig/core/row_reader.hpp"
#include "magicpig/core/signature_ops.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/core/workspace.hpp"
#include "magicpig/hash/fixed_point.hpp"
#include "magicpig/hash/principal_axes.hpp"
#include "magicpig/hash/quantiser.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What a ProductQuantiser is trained for, and how.
struct ProductQuantiserConfig {
  int kv_heads = 1;
  int bits = 1;            ///< per dimension, 1 to 4
  int samples = 2048;      ///< keys of each KV head that it learns from, spread evenly
  int rounds = 9;          ///< of k-means
  std::uint64_t seed = 0;  ///< chooses the keys that k-means starts from
};

/// Product quantisation in the keys' own axes. With V the principal axes of the keys of a KV head,
/// by falling variance, y = V (k - c) is cut into rows = bits dim / 4 parts: part s has components
/// s, s + rows, s + 2 rows ..., so that each has of the large and of the small ones. Its four bits
/// are the nearest of 16 centroids, found by k-means; x are those centroids together, and the
/// factor is f = |y|^2 / <x, y>, between .3 and 3: f <x, V q> estimates <k - c, q>. Nothing of
/// queries is needed.
///
/// At equal bytes errors are far smaller than with ScalarQuantiser, the more so the fewer bits:
/// keys fill few of their dimensions. What is trained stays right for other keys: only the error
/// depends on it, never what is unbiased.
///
/// Training and encoding are computed in integers, and in floats only where no product is rounded
/// before it is added: the same bits on every machine. Coordinates have 14 bits of the largest that
/// was seen in training; a key with a larger one is scaled down by itself.
/// Memory: 2 dim^2 + 64 rows (1 + pairs) bytes per KV head, 40 KiB at dim 128 and one bit.
/// Immutable once trained; any number of threads and indexes share one. Source: Jegou, Douze and
/// Schmid 2011 (product quantisation); Andre et al. 2015 (fast scan).
class ProductQuantiser {
 public:
  /// So that sums of products stay below 2^31.
  static constexpr int kMaxDim = 512;
  static constexpr int kMaxSamples = 1 << 16;

  /// Learns from keys of `range`. Errors: a config value outside its bounds, dimensions above
  /// kMaxDim, an empty range or one outside the source, source and config disagree, a key that is
  /// not finite, memory, a backend without workers.
  template <class Backend, KeyValueSource Source>
  [[nodiscard]] static Result<ProductQuantiser> train(
      const Backend& backend, const Source& source, TokenRange range,
      const ProductQuantiserConfig& config) noexcept;

  [[nodiscard]] QuantiserShape shape() const {
    return {.dim = dim_, .bits = bits_, .rows = rows_, .query_scratch = 2 * padded_};
  }
  [[nodiscard]] int kv_heads() const { return kv_heads_; }
  /// These codes say more than untrained ones of as many bits: with code_temperature() errors are 1
  /// to 5 % larger at 1 and 2 bits (magicpig_compare).
  [[nodiscard]] static constexpr double temperature_of(int bits) {
    const double raised = code_temperature(bits) + 0.1;
    return raised < 0.95 ? raised : 0.95;
  }
  [[nodiscard]] double temperature() const { return temperature_of(bits_); }

  /// Bytes that save() writes.
  [[nodiscard]] std::size_t saved_bytes() const { return saved_bytes_of(*this); }
  /// Writes all that was learned to `to`, of at least saved_bytes(). Error: fewer.
  [[nodiscard]] Status save(std::span<std::byte> to) const noexcept {
    return save_blob(BlobKind::kProductQuantiser, *this, to);
  }
  /// What save() wrote. Errors (kBadBlob): bytes that are not that, see BlobReader; memory.
  [[nodiscard]] static Result<ProductQuantiser> load(std::span<const std::byte> from) noexcept;

  /// Bytes of all axes and centroids.
  [[nodiscard]] std::size_t bytes() const {
    return axes_.bytes() + centroids_.bytes() + half_norms_.bytes() + exponents_.bytes();
  }

  [[nodiscard]] std::uint64_t fingerprint() const {
    Checksum sum;
    sum.add_value(dim_);
    sum.add_value(bits_);
    sum.add_value(kv_heads_);
    sum.add_array(axes_.span());
    sum.add_array(centroids_.span());
    sum.add_array(half_norms_.span());
    sum.add_array(exponents_.span());
    return sum.value();
  }

  double tabulate(int kv_head, const float* query, std::int32_t* scratch,
                  std::int32_t* sums) const {
    std::int32_t* x = scratch;
    std::int32_t* y = scratch + padded_;
    const int exponent = to_integers(query, x);
    // At most 2^14 sqrt(dim) 2^(kAxisBits - kQueryShift) = 2^13.5.
    project_one(kv_head, x, kQueryShift, y);
    const Centroids own = centroids(kv_head);
    for (int s = 0; s < rows_; ++s) {
      for (int c = 0; c < 16; ++c) {
        const std::int16_t* centroid = own.values + (std::int64_t{s} * 16 + c) * 2 * pairs_;
        std::int32_t sum = 0;
        for (int k = 0, j = s; j < padded_; ++k, j += rows_) sum += centroid[k] * y[j];
        sums[s * 16 + c] = sum;
      }
    }
    // y and the centroids are both what they stand for over a power of 2.
    const int unit = kQueryShift - kAxisBits - exponent + unit_exponent(kv_head);
    return ::ldexp(1.0, unit);
  }

  struct KeyScratch {
    float* powers = nullptr;       // [kRotationLanes]
    std::int32_t* wide = nullptr;  // [padded, kRotationLanes]
    std::int16_t* x = nullptr;     // [padded / 2, kRotationLanes, 2]
    std::int16_t* y = nullptr;     // [rows, pairs, kRotationLanes, 2]
  };
  [[nodiscard]] KeyScratch carve(Arena& arena) const {
    const auto lanes = static_cast<std::size_t>(kRotationLanes);
    const auto padded = static_cast<std::size_t>(padded_);
    const auto parts = static_cast<std::size_t>(rows_) * static_cast<std::size_t>(pairs_);
    return {.powers = arena.take<float>(lanes),
            .wide = arena.take<std::int32_t>(padded * lanes),
            .x = arena.take<std::int16_t>(padded * lanes),
            .y = arena.take<std::int16_t>(parts * lanes * 2)};
  }

  template <class Ops>
  void encode(int kv_head, const float* keys, const std::uint32_t* largest, const CodeLanes& lanes,
              const KeyScratch& scratch, double* factors) const {
    int smaller[kRotationLanes];  // powers of 2 by which a key is scaled down more than usual
    for (int l = 0; l < kRotationLanes; ++l) {
      const int usual = exponents_.data()[kv_head];
      const int own = exponent_of(largest[l]);
      smaller[l] = own < usual ? usual - own : 0;
      scratch.powers[l] = static_cast<float>(power_of_two(own < usual ? own : usual));
    }
    project<Ops>(kv_head, keys, scratch);
    std::int64_t squares[kRotationLanes];
    std::int32_t dots[kRotationLanes];
    Ops::square_lanes(scratch.wide, padded_, squares);
    Ops::nearest_lanes(centroids(kv_head), scratch.y, lanes, dots);
    for (int l = 0; l < kRotationLanes; ++l) {
      const double dot = static_cast<double>(dots[l]) * (1 << Centroids::kDotShift);
      double factor = dot > 0.0 ? static_cast<double>(squares[l]) / dot : 1.0;
      factor = factor < kLeastFactor ? kLeastFactor : factor > kMostFactor ? kMostFactor : factor;
      factors[l] = squares[l] == 0 ? 0.0 : ::ldexp(factor, smaller[l]);
    }
  }

  /// The fields that save() writes.
  void put(BlobWriter& writer) const {
    writer.put(dim_);
    writer.put(bits_);
    writer.put(kv_heads_);
    writer.put_array(axes_.span());
    writer.put_array(centroids_.span());
    writer.put_array(exponents_.span());
  }

 private:
  static constexpr int kCoordinateBits = 14;
  static constexpr int kAxisBits = 12;    // a row of axes has the length 2^kAxisBits
  static constexpr int kQueryShift = 17;  // of a query's products with axes
  static constexpr double kLeastFactor = 0.3;
  static constexpr double kMostFactor = 3.0;

  class Trainer;

  [[nodiscard]] static Status check(const ProductQuantiserConfig& config) {
    if (config.kv_heads < 1 || config.kv_heads >= (1 << 24)) {
      return Status::error(ErrorCode::kInvalidArgument, "kv_heads %d must lie in [1, 2^24)",
                           config.kv_heads);
    }
    if (config.bits < 1 || config.bits > 4) {
      return Status::error(ErrorCode::kInvalidArgument, "bits %d must lie in [1, 4]", config.bits);
    }
    if (config.samples < 1 || config.samples > kMaxSamples || config.rounds < 0) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "samples %d must lie in [1, %d], rounds %d must not be negative",
                           config.samples, kMaxSamples, config.rounds);
    }
    return Status();
  }

  ProductQuantiser(int dim, const ProductQuantiserConfig& config)
      : dim_(dim),
        padded_((dim + 7) / 8 * 8),
        bits_(config.bits),
        rows_(config.bits * padded_ / 4),
        pairs_(config.bits == 1 ? 2 : 1),
        kv_heads_(config.kv_heads) {
    // |y| <= |x| < 2^14 sqrt(dim) has to come down to 2^14.
    while ((1 << (2 * shift_)) < padded_) ++shift_;
  }

  [[nodiscard]] bool reserve() {
    const auto heads = static_cast<std::size_t>(kv_heads_);
    const auto padded = static_cast<std::size_t>(padded_);
    const auto numbers = heads * static_cast<std::size_t>(rows_) * 16;
    return axes_.resize(heads * padded * padded) &&
           centroids_.resize(numbers * 2 * static_cast<std::size_t>(pairs_)) &&
           half_norms_.resize(numbers) && exponents_.resize(heads);
  }

  // Half the squares of centroids, and bounds of all numbers: those of training, for which sums
  // stay below 2^31.
  void check_loaded(BlobReader& reader) {
    for (const std::int32_t e : exponents_.span()) {
      reader.require(e >= kCoordinateBits - 129 && e <= kMostExponent, "exponent", e);
    }
    const std::int64_t columns = padded_;
    for (std::int64_t row = 0; reader.ok() && row < std::int64_t{kv_heads_} * columns; ++row) {
      std::int64_t square = 0;
      for (const std::int16_t x : std::span(axes_.data() + row * columns, padded_size())) {
        square += std::int64_t{x} * x;
      }
      reader.require(square <= std::int64_t{1} << (2 * kAxisBits + 1), "axis", row);
    }
    const std::size_t size = 2 * static_cast<std::size_t>(pairs_);
    for (std::size_t i = 0; reader.ok() && i < half_norms_.size(); ++i) {
      std::int64_t square = 0;
      for (const std::int16_t x : std::span(centroids_.data() + i * size, size)) {
        square += std::int64_t{x} * x;
      }
      reader.require(square <= std::int64_t{1} << (2 * kCoordinateBits + 1), "centroid",
                     static_cast<long long>(i));
      half_norms_.data()[i] = static_cast<std::int32_t>(square / 2);
    }
  }
  [[nodiscard]] std::size_t padded_size() const { return static_cast<std::size_t>(padded_); }

  [[nodiscard]] const std::int16_t* axes_of(int kv_head) const {
    return axes_.data() + std::int64_t{kv_head} * padded_ * padded_;
  }
  [[nodiscard]] Centroids centroids(int kv_head) const {
    const std::int64_t first = std::int64_t{kv_head} * rows_ * 16;
    return {.values = centroids_.data() + first * 2 * pairs_,
            .half_norms = half_norms_.data() + first,
            .rows = rows_,
            .pairs = pairs_};
  }

  // A component y of a key is 2^unit_exponent times what it stands for.
  [[nodiscard]] int unit_exponent(int kv_head) const { return shift_ - exponents_.data()[kv_head]; }

  // The exponent e for which x 2^e has 14 bits, x being the magnitude of these bits.
  static int exponent_of(std::uint32_t magnitude) {
    const int exponent = kCoordinateBits - exponent_above(magnitude);
    return exponent < kMostExponent ? exponent : kMostExponent;
  }
  static constexpr int kMostExponent = 100;

  // `vector` [dim], finite, to `x` [padded] of 14 bits; returns the exponent it was scaled by.
  int to_integers(const float* vector, std::int32_t* x) const {
    const int exponent = exponent_of(largest_magnitude(vector, nullptr, dim_));
    const auto power = static_cast<float>(power_of_two(exponent));
    for (int j = 0; j < dim_; ++j) x[j] = static_cast<std::int32_t>(vector[j] * power);
    for (int j = dim_; j < padded_; ++j) x[j] = 0;
    return exponent;
  }

  // The components y [padded] of one vector x [padded], as project_lanes() has them.
  void project_one(int kv_head, const std::int32_t* x, int shift, std::int32_t* y) const {
    const int half = padded_ / 2;
    const std::int16_t* pair = axes_of(kv_head);
    for (int j = 0; j < padded_; ++j) {
      std::int32_t sum = (1 << shift) / 2;
      for (int i = 0; i < half; ++i, pair += 2) sum += pair[0] * x[i] + pair[1] * x[i + half];
      y[j] = sum >> shift;
    }
  }

  // The components y of keys [dim, kRotationLanes] to scratch.wide and, in the pairs of their
  // parts, to scratch.y.
  template <class Ops>
  void project(int kv_head, const float* keys, const KeyScratch& scratch) const {
    constexpr int kLanes = kRotationLanes;
    Ops::scale_lanes(keys, scratch.powers, dim_, scratch.wide);
    for (int i = dim_ * kLanes; i < padded_ * kLanes; ++i) scratch.wide[i] = 0;
    Ops::pair_lanes(scratch.wide, scratch.wide + padded_ / 2 * kLanes, padded_ / 2, 2 * kLanes,
                    scratch.x);
    Ops::project_lanes(axes_of(kv_head), padded_, scratch.x, kAxisBits + shift_, scratch.wide);
    for (int p = 0; p < pairs_; ++p) {
      const int first = 2 * p * rows_;
      const int second = first + rows_;
      const int both = std::clamp(padded_ - second, 0, rows_);  // parts with a second component
      const int stride = 2 * kLanes * pairs_;
      std::int16_t* to = scratch.y + 2 * kLanes * p;
      const std::int32_t* from = scratch.wide + first * kLanes;
      Ops::pair_lanes(from, from + rows_ * kLanes, both, stride, to);
      Ops::pair_lanes(from + both * kLanes, nullptr, rows_ - both, stride,
                      to + std::int64_t{both} * stride);
    }
  }

  int dim_;
  int padded_;
  int bits_;
  int rows_;
  int pairs_;
  int kv_heads_;
  int shift_ = 0;
  Buffer<std::int16_t> axes_;        // [kv_heads, padded, padded / 2, 2] see ProductOps
  Buffer<std::int16_t> centroids_;   // [kv_heads, rows, 16, pairs, 2]
  Buffer<std::int32_t> half_norms_;  // [kv_heads, rows, 16]
  Buffer<std::int32_t> exponents_;   // [kv_heads] coordinates are keys times 2 to this, truncated
};
static_assert(Quantiser<ProductQuantiser>);

// Learns from the keys of one KV head after the other.
class ProductQuantiser::Trainer {
 public:
  [[nodiscard]] static Trainer carve(Arena& arena, const ProductQuantiser& made, int samples) {
    const auto padded = static_cast<std::size_t>(made.padded_);
    Trainer trainer;
    trainer.samples_ = samples;
    trainer.keys_ = arena.take<std::int32_t>(static_cast<std::size_t>(samples) * padded);
    trainer.mean_ = arena.take<float>(padded);
    trainer.sums_ = arena.take<std::int64_t>(padded * padded);
    trainer.covariance_ = arena.take<float>(padded * padded);
    trainer.axes_ = arena.take<float>(padded * padded);
    trainer.row_ = arena.take<std::int32_t>(padded);
    return trainer;
  }

  // Returns a token whose key is not finite, or -1. key_of(token) is a row, valid until the next is
  // asked for.
  template <class KeyOf>
  [[nodiscard]] TokenId train(const KeyOf& key_of, TokenRange range, int kv_head,
                              const ProductQuantiserConfig& config, ProductQuantiser& to) {
    const auto key = [&](int i) { return key_of(token(range, i)); };
    for (int i = 0; i < samples_; ++i) {
      if (largest_magnitude(key(i), nullptr, to.dim_) >= kInfinityBits) return token(range, i);
    }
    take_mean(key, to);
    std::uint32_t largest = 0;
    for (int i = 0; i < samples_; ++i) {
      const std::uint32_t own = largest_magnitude(key(i), mean_, to.dim_);
      if (own >= kInfinityBits) return token(range, i);
      largest = own > largest ? own : largest;
    }
    const int exponent = exponent_of(largest);
    const auto power = static_cast<float>(power_of_two(exponent));
    to.exponents_.data()[kv_head] = exponent;
    for (int i = 0; i < samples_; ++i) {
      const auto* from = key(i);
      std::int32_t* x = keys_ + std::int64_t{i} * to.padded_;
      for (int j = 0; j < to.padded_; ++j) {
        x[j] = j < to.dim_ ? static_cast<std::int32_t>((scalar_at(from, j) - mean_[j]) * power) : 0;
      }
    }
    find_axes(kv_head, to);
    for (int i = 0; i < samples_; ++i) {
      std::int32_t* x = keys_ + std::int64_t{i} * to.padded_;
      to.project_one(kv_head, x, kAxisBits + to.shift_, row_);
      std::copy_n(row_, to.padded_, x);
    }
    for (int s = 0; s < to.rows_; ++s) find_centroids(kv_head, s, config, to);
    return -1;
  }

 private:
  static constexpr int kCentroids = 16;
  static constexpr int kMostComponents = 4;

  [[nodiscard]] TokenId token(TokenRange range, int i) const {
    return range.begin + static_cast<TokenId>(std::int64_t{i} * range.size() / samples_);
  }

  template <class Key>
  void take_mean(const Key& key, const ProductQuantiser& to) {
    double sums[kMaxDim] = {};
    for (int i = 0; i < samples_; ++i) {
      const auto* from = key(i);
      for (int j = 0; j < to.dim_; ++j) sums[j] += static_cast<double>(scalar_at(from, j));
    }
    for (int j = 0; j < to.dim_; ++j) mean_[j] = static_cast<float>(sums[j] / samples_);
  }

  void find_axes(int kv_head, ProductQuantiser& to) {
    const int n = to.padded_;
    std::fill_n(sums_, std::int64_t{n} * n, std::int64_t{0});
    for (int i = 0; i < samples_; ++i) {
      const std::int32_t* x = keys_ + std::int64_t{i} * n;
      for (int a = 0; a < n; ++a) {
        for (int b = a; b < n; ++b) sums_[a * n + b] += std::int64_t{x[a]} * x[b];
      }
    }
    std::int64_t largest = 1;
    for (int a = 0; a < n; ++a) largest = sums_[a * n + a] > largest ? sums_[a * n + a] : largest;
    for (int a = 0; a < n; ++a) {
      for (int b = a; b < n; ++b) {
        const double share = static_cast<double>(sums_[a * n + b]) / static_cast<double>(largest);
        covariance_[a * n + b] = covariance_[b * n + a] = static_cast<float>(share);
      }
    }
    PrincipalAxes(covariance_, axes_, n);
    std::int16_t* axes = to.axes_.data() + std::int64_t{kv_head} * n * n;
    for (int j = 0; j < n; ++j) {
      for (int i = 0; i < n; ++i) {
        const int pair = i % (n / 2);
        const float entry = axes_[j * n + i] * (1 << kAxisBits);
        axes[(j * (n / 2) + pair) * 2 + i / (n / 2)] =
            static_cast<std::int16_t>(entry < 0.0F ? entry - 0.5F : entry + 0.5F);
      }
    }
  }

  struct Cluster {
    std::int32_t centroid[kMostComponents] = {};
    std::int32_t half_norm = 0;
    std::int64_t sums[kMostComponents] = {};
    std::int64_t count = 0;
  };

  // Part s: k-means from keys that are chosen at random; a centroid that no key is nearest to
  // stays.
  void find_centroids(int kv_head, int s, const ProductQuantiserConfig& config,
                      ProductQuantiser& to) {
    const RandomStream random({.seed = config.seed,
                               .head = static_cast<std::uint32_t>(kv_head),
                               .stream = static_cast<std::uint32_t>(s),
                               .purpose = Purpose::kQuantiser});
    Cluster clusters[kCentroids];
    for (std::uint32_t c = 0; c < kCentroids; ++c) {
      const std::uint64_t number = random.block(c / 4)[c % 4];
      const auto i = static_cast<int>((number * static_cast<std::uint64_t>(samples_)) >> 32);
      int k = 0;
      for (int j = s; j < to.padded_; j += to.rows_) {
        clusters[c].centroid[k++] = keys_[std::int64_t{i} * to.padded_ + j];
      }
    }
    take_norms(clusters);
    for (int round = 0; round < config.rounds; ++round) improve(s, to, clusters);
    for (int c = 0; c < kCentroids; ++c) {
      const std::int64_t at = (std::int64_t{kv_head} * to.rows_ + s) * kCentroids + c;
      to.half_norms_.data()[at] = clusters[c].half_norm;
      for (int k = 0; k < 2 * to.pairs_; ++k) {
        to.centroids_.data()[at * 2 * to.pairs_ + k] =
            static_cast<std::int16_t>(clusters[c].centroid[k]);
      }
    }
  }

  static void take_norms(Cluster* clusters) {
    for (int c = 0; c < kCentroids; ++c) {
      std::int32_t square = 0;
      for (const std::int32_t x : clusters[c].centroid) square += x * x;
      clusters[c].half_norm = square / 2;
    }
  }

  void improve(int s, const ProductQuantiser& to, Cluster* clusters) {
    for (int i = 0; i < samples_; ++i) {
      std::int32_t y[kMostComponents] = {};
      int count = 0;
      for (int j = s; j < to.padded_; j += to.rows_) {
        y[count++] = keys_[std::int64_t{i} * to.padded_ + j];
      }
      Cluster& own = clusters[nearest(clusters, y)];
      for (int k = 0; k < count; ++k) own.sums[k] += y[k];
      ++own.count;
    }
    for (int c = 0; c < kCentroids; ++c) {
      Cluster& own = clusters[c];
      for (int k = 0; k < kMostComponents && own.count > 0; ++k) {
        own.centroid[k] = static_cast<std::int32_t>(own.sums[k] / own.count);
        own.sums[k] = 0;
      }
      own.count = 0;
    }
    take_norms(clusters);
  }

  static int nearest(const Cluster* clusters, const std::int32_t* y) {
    int best = 0;
    std::int32_t most = 0;
    for (int c = 0; c < kCentroids; ++c) {
      std::int32_t score = -clusters[c].half_norm;
      for (int k = 0; k < kMostComponents; ++k) score += clusters[c].centroid[k] * y[k];
      if (c > 0 && score <= most) continue;
      best = c;
      most = score;
    }
    return best;
  }

  int samples_ = 0;
  std::int32_t* keys_ = nullptr;  // [samples, padded] centred, then their components
  float* mean_ = nullptr;         // [padded]
  std::int64_t* sums_ = nullptr;  // [padded, padded]
  float* covariance_ = nullptr;   // [padded, padded]
  float* axes_ = nullptr;         // [padded, padded]
  std::int32_t* row_ = nullptr;   // [padded]
};

inline Result<ProductQuantiser> ProductQuantiser::load(std::span<const std::byte> from) noexcept {
  BlobReader reader(BlobKind::kProductQuantiser, from);
  const auto dim = reader.take<int>("dim");
  ProductQuantiserConfig config;
  config.bits = reader.take<int>("bits");
  config.kv_heads = reader.take<int>("kv_heads");
  reader.require(dim >= 1 && dim <= kMaxDim, "dim", dim);
  reader.require(config.bits >= 1 && config.bits <= 4, "bits", config.bits);
  reader.require(config.kv_heads >= 1 && config.kv_heads < 1 << 24, "kv_heads", config.kv_heads);
  if (!reader.ok()) return reader.status();
  ProductQuantiser made(dim, config);
  reader.need("axes", static_cast<std::size_t>(config.kv_heads),
              made.padded_size() * made.padded_size() * sizeof(std::int16_t));
  if (!reader.ok()) return reader.status();
  if (!made.reserve()) {
    return Status::error(ErrorCode::kOutOfMemory, "no memory for a quantiser of %d KV heads",
                         config.kv_heads);
  }
  reader.take_array("axes", made.axes_.span());
  reader.take_array("centroids", made.centroids_.span());
  reader.take_array("exponents", made.exponents_.span());
  reader.end();
  made.check_loaded(reader);
  if (!reader.ok()) return reader.status();
  return made;
}

template <class Backend, KeyValueSource Source>
Result<ProductQuantiser> ProductQuantiser::train(const Backend& backend, const Source& source,
                                                 TokenRange range,
                                                 const ProductQuantiserConfig& config) noexcept {
  const Status status = check(config);
  if (!status.ok()) return status;
  if (source.kv_heads() != config.kv_heads || source.head_dim() > kMaxDim) {
    return Status::error(ErrorCode::kShapeMismatch,
                         "source has %d KV heads of dimension %d, wanted are %d of up to %d",
                         source.kv_heads(), source.head_dim(), config.kv_heads, kMaxDim);
  }
  if (range.begin < 0 || range.end <= range.begin || range.end > source.tokens()) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "cannot learn from tokens [%d, %d) of a cache of %d", range.begin,
                         range.end, source.tokens());
  }
  const int workers = backend.executor.workers();
  if (workers < 1) {
    return Status::error(ErrorCode::kInvalidArgument, "workers %d must be at least 1", workers);
  }
  ProductQuantiser made(source.head_dim(), config);
  const int samples = range.size() < config.samples ? range.size() : config.samples;
  Arena counting;
  (void)Trainer::carve(counting, made, samples);
  const std::size_t size = counting.bytes_needed();
  Buffer<std::byte> scratch;
  if (!made.reserve() || !scratch.resize(size * static_cast<std::size_t>(workers))) {
    return Status::error(ErrorCode::kOutOfMemory, "no memory to learn from %d keys", samples);
  }
  KeyReader<Source> keys(source);
  Buffer<TokenId> bad;  // per KV head, the first sampled token that is not finite, or -1
  if (!bad.resize(static_cast<std::size_t>(config.kv_heads)) || !keys.reserve(workers, 1)) {
    return Status::error(ErrorCode::kOutOfMemory, "no memory for %d KV heads", config.kv_heads);
  }
  backend.executor.parallel_for(config.kv_heads, [&](int h, int worker) {
    Arena arena({scratch.data() + static_cast<std::size_t>(worker) * size, size});
    Trainer trainer = Trainer::carve(arena, made, samples);
    const auto key = [&](TokenId token) { return keys.row(h, token, worker); };
    bad.data()[h] = trainer.train(key, range, h, config, made);
  });
  for (int h = 0; h < config.kv_heads; ++h) {
    if (bad.data()[h] < 0) continue;
    return Status::error(ErrorCode::kNonFinite, "the key of token %d, KV head %d is not finite",
                         bad.data()[h], h);
  }
  return made;
}

}  // namespace magicpig::inline MAGICPIG_ABI
