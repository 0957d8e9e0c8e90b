// SPDX-License-Identifier: Apache-2.0
// Keys and values in tensors of ggml, without its headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// The types of ggml that keys and values may have here, by ggml's numbers: a
/// `static_cast<GgmlType>(tensor->type)` may also give one that is none of them.
enum class GgmlType : int { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ8_0 = 8, kBf16 = 30 };

/// The number of a scalar type.
template <class T>
inline constexpr GgmlType kGgmlType = std::is_same_v<T, float>  ? GgmlType::kF32
                                      : std::is_same_v<T, fp16> ? GgmlType::kF16
                                      : std::is_same_v<T, bf16> ? GgmlType::kBf16
                                      : std::is_same_v<T, q8_0> ? GgmlType::kQ8_0
                                                                : GgmlType::kQ4_0;

/// What of a ggml_tensor says where its numbers are: the fields of these names. For keys and values
/// as ggml_flash_attn_ext() takes them ne is [dim, tokens, KV heads, sequences], and nb the bytes
/// from one to the next of each; only rows need be contiguous.
struct GgmlTensor {
  const void* data = nullptr;
  GgmlType type = GgmlType::kF32;
  std::int64_t ne[4] = {0, 0, 0, 1};
  std::size_t nb[4] = {0, 0, 0, 0};
};

/// Errors: a tensor of another type than T, extents out of range, no such sequence, rows that are
/// not contiguous, data that is not aligned.
template <class T>
[[nodiscard]] Status check_ggml_tensor(const char* name, const GgmlTensor& x,
                                       int sequence) noexcept {
  if (x.type != kGgmlType<T>) {
    return Status::error(ErrorCode::kInvalidArgument, "%s.type is %d, not ggml's %d", name,
                         static_cast<int>(x.type), static_cast<int>(kGgmlType<T>));
  }
  constexpr std::int64_t kMost = (std::numeric_limits<TokenId>::max)();
  for (int i = 0; i < 4; ++i) {
    if (x.ne[i] >= 0 && x.ne[i] <= kMost) continue;
    return Status::error(ErrorCode::kInvalidArgument, "%s.ne[%d] = %lld must lie in [0, %lld]",
                         name, i, static_cast<long long>(x.ne[i]), static_cast<long long>(kMost));
  }
  if (sequence < 0 || sequence >= x.ne[3]) {
    return Status::error(ErrorCode::kInvalidArgument, "sequence %d must lie in [0, %s.ne[3] = %d)",
                         sequence, name, static_cast<int>(x.ne[3]));
  }
  if (x.nb[0] != sizeof(T)) {
    return Status::error(ErrorCode::kInvalidArgument,
                         "%s.nb[0] is %zu bytes, not the %zu of its type: rows must be contiguous, "
                         "%s not transposed",
                         name, x.nb[0], sizeof(T), name);
  }
  if (reinterpret_cast<std::uintptr_t>(x.data) % alignof(T) != 0) {
    return Status::error(ErrorCode::kInvalidArgument, "%s.data is not aligned to %zu bytes", name,
                         alignof(T));
  }
  return Status();
}

/// The keys `k` and values `v` of one sequence, of types known when compiling: float, fp16, bf16,
/// q8_0, q4_0. `sequence` is an index of ne[3]. A view; the memory must outlive it. Tokens are
/// cells of the cache in their order there, of which a host attends to those below k.ne[1]; first()
/// sees fewer. Errors: another type than K or V; extents that are negative, 2^31 or more, or
/// different in k and v; no such sequence; rows that are not contiguous; data that is not aligned;
/// as StridedKeyValues::create(). A v that is transposed, [tokens, dim, KV heads], as llama.cpp
/// keeps it without flash attention, is refused by its extents, or by nb[0] where it is permuted
/// back. It cannot be told where there are as many tokens as dimensions: such a host must say so.
template <class K, class V = K>
[[nodiscard]] Result<StridedKeyValues<K, V>> ggml_key_values(const GgmlTensor& k,
                                                             const GgmlTensor& v,
                                                             int sequence = 0) noexcept {
  Status status = check_ggml_tensor<K>("k", k, sequence);
  if (status.ok()) status = check_ggml_tensor<V>("v", v, sequence);
  if (!status.ok()) return status;
  for (const int i : {1, 2}) {
    if (k.ne[i] == v.ne[i]) continue;
    const bool transposed = v.ne[0] == k.ne[1];
    return Status::error(ErrorCode::kShapeMismatch, "v.ne[%d] = %d is not k.ne[%d] = %d%s", i,
                         static_cast<int>(v.ne[i]), i, static_cast<int>(k.ne[i]),
                         transposed ? ": v must not be transposed" : "");
  }
  const auto at = [&]<class T>(const GgmlTensor& x, const T* none) {
    if (x.data == nullptr) return none;
    return at_offset(static_cast<const T*>(x.data), static_cast<std::int64_t>(x.nb[3]) * sequence);
  };
  const auto strides = [](const GgmlTensor& x) {
    return ByteStrides{.head = static_cast<std::int64_t>(x.nb[2]),
                       .token = static_cast<std::int64_t>(x.nb[1])};
  };
  return StridedKeyValues<K, V>::create({.keys = at(k, static_cast<const K*>(nullptr)),
                                         .values = at(v, static_cast<const V*>(nullptr)),
                                         .key_strides = strides(k),
                                         .value_strides = strides(v),
                                         .kv_heads = static_cast<int>(k.ne[2]),
                                         .head_dim = static_cast<int>(k.ne[0]),
                                         .value_dim = static_cast<int>(v.ne[0]),
                                         .tokens = static_cast<TokenId>(k.ne[1])});
}

/// Types of keys and of values that a host wants code for.
template <class K, class V = K>
struct GgmlPair {};
template <class... Pairs>
struct GgmlPairs {};

/// Keys and values of the same type, as llama.cpp's flash attention has them unless it was built
/// for all pairs.
using SameGgmlTypes =
    GgmlPairs<GgmlPair<float>, GgmlPair<fp16>, GgmlPair<bf16>, GgmlPair<q8_0>, GgmlPair<q4_0>>;

/// The loop over pairs of visit_ggml_key_values().
template <class Visit>
struct GgmlVisitor {
  const GgmlTensor& k;
  const GgmlTensor& v;
  const Visit& visit;
  int sequence = 0;
  Status status = {};

  template <class... Pairs>
  void visit_one_of(const GgmlPairs<Pairs...>*) {
    if ((visit_if(static_cast<const Pairs*>(nullptr)) || ...)) return;
    status = Status::error(ErrorCode::kInvalidArgument,
                           "k.type %d with v.type %d is none of the %zu pairs compiled in",
                           static_cast<int>(k.type), static_cast<int>(v.type), sizeof...(Pairs));
  }

 private:
  // Visits the source of this pair if the tensors have these types, and says whether they have.
  template <class K, class V>
  bool visit_if(const GgmlPair<K, V>*) {
    if (k.type != kGgmlType<K> || v.type != kGgmlType<V>) return false;
    const Result<StridedKeyValues<K, V>> source = ggml_key_values<K, V>(k, v, sequence);
    status = source.ok() ? visit(*source) : source.status();
    return true;
  }
};

/// Types known when running: calls visit(source) with the StridedKeyValues<K, V> of the pair, among
/// Pairs, that the tensors have, and returns the Status it returns. `visit` is compiled once for
/// each pair. Errors: as ggml_key_values(), and a pair that is not among them.
///
///   visit_ggml_key_values<GgmlPairs<GgmlPair<fp16>, GgmlPair<q8_0, fp16>>>(k, v, decode_with)
template <class Pairs = SameGgmlTypes, class Visit>
[[nodiscard]] Status visit_ggml_key_values(const GgmlTensor& k, const GgmlTensor& v,
                                           const Visit& visit, int sequence = 0) {
  GgmlVisitor<Visit> visitor{.k = k, .v = v, .visit = visit, .sequence = sequence};
  visitor.visit_one_of(static_cast<const Pairs*>(nullptr));
  return visitor.status;
}

}  // namespace magicpig::inline MAGICPIG_ABI
