// SPDX-License-Identifier: Apache-2.0
// Captures: queries, keys and values of one attention layer of a real model, read from safetensors.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/core/views.hpp"
#include "safetensors.hpp"

namespace magicpig::bench {

/// One layer: q [query_heads, n_q, head_dim], k [kv_heads, n, head_dim], v [kv_heads, n,
/// value_dim], with rotary embedding applied. Query row i stands at token n - n_q + i and sees
/// tokens 0 to n - n_q + i. Keys and values of F16 stay so,
/// other types become float, which holds all their values.
class Capture {
 public:
  /// Errors name the field of the header, or the tensor, that is at fault.
  [[nodiscard]] static Result<Capture> parse(std::span<const std::byte> file) {
    const Result<Container> container = parse_safetensors(file);
    if (!container.ok()) return container.status();
    Capture capture;
    Status status = capture.read_shape(*container);
    if (status.ok()) status = capture.read_scale(*container);
    if (status.ok()) status = capture.read_queries(*container->find("q"));
    if (status.ok()) status = capture.read_key_values(*container->find("k"), *container->find("v"));
    if (!status.ok()) return status;
    return capture;
  }

  /// Errors: those of parse(), and a file that cannot be read; the path is part of the message.
  [[nodiscard]] static Result<Capture> read(const std::string& path) {
    std::vector<std::byte> bytes;
    Status status = read_file(path, bytes);
    if (!status.ok()) return status;
    Result<Capture> capture = parse(bytes);
    if (capture.ok()) return capture;
    return Status::error(capture.status().code(), "%.120s: %s", path.c_str(),
                         capture.status().message());
  }

  [[nodiscard]] const Shape& shape() const { return shape_; }
  [[nodiscard]] TokenId tokens() const { return tokens_; }
  [[nodiscard]] int query_rows() const { return query_rows_; }
  /// logit = scale * q.k: the metadata's "scale", or 1 / sqrt(head_dim).
  [[nodiscard]] float scale() const { return scale_; }
  /// Row i of all query heads, [query_heads, head_dim].
  [[nodiscard]] std::span<const float> query(int row) const {
    const auto size =
        static_cast<std::size_t>(shape_.query_heads) * static_cast<std::size_t>(shape_.head_dim);
    return std::span(queries_).subspan(static_cast<std::size_t>(row) * size, size);
  }
  /// Makes the context shorter: as if the tokens of `range`, before the first query row's, had
  /// never been there. Those behind them keep their keys, rotary embedding included.
  void forget(TokenRange range) {
    std::visit([&](auto& arrays) { arrays.forget(shape_, tokens_, range); }, arrays_);
    tokens_ -= range.size();
  }

  /// Tokens that query row i sees.
  [[nodiscard]] TokenId visible(int row) const { return tokens_ - query_rows_ + row + 1; }
  /// body(StridedKeyValues<T>) over this capture's memory, T the type of keys and values.
  template <class Body>
  decltype(auto) with_key_values(const Body& body) const {
    return std::visit([&](const auto& arrays) { return body(arrays.view(shape_, tokens_)); },
                      arrays_);
  }

 private:
  template <class T>
  struct Arrays {
    std::vector<T> keys;    // [kv_heads, n, head_dim]
    std::vector<T> values;  // [kv_heads, n, value_dim]

    void forget(const Shape& shape, TokenId tokens, TokenRange range) {
      for (int h = shape.kv_heads - 1; h >= 0; --h) {
        const auto erase = [&](std::vector<T>& rows, int dim) {
          const std::int64_t head = std::int64_t{h} * tokens;
          rows.erase(rows.begin() + (head + range.begin) * dim,
                     rows.begin() + (head + range.end) * dim);
        };
        erase(keys, shape.head_dim);
        erase(values, shape.value_dim);
      }
    }

    [[nodiscard]] StridedKeyValues<T> view(const Shape& shape, TokenId tokens) const {
      return *StridedKeyValues<T>::head_major(keys.data(), values.data(), shape, tokens);
    }
  };

  static Status error(const char* name, const char* what) {
    return Status::error(ErrorCode::kShapeMismatch, "%s.shape: %s", name, what);
  }

  Status read_shape(const Container& container) {
    for (const char* name : {"q", "k", "v"}) {
      const Tensor* tensor = container.find(name);
      if (tensor == nullptr) {
        return Status::error(ErrorCode::kInvalidArgument, "%s: no such tensor in the header", name);
      }
      if (tensor->shape.size() != 3) return error(name, "must have 3 dimensions");
      for (const std::uint64_t size : tensor->shape) {
        if (size < 1 || size > std::numeric_limits<TokenId>::max()) {
          return error(name, "every dimension must lie in [1, 2^31 - 1]");
        }
      }
    }
    return read_dimensions(container.find("q")->shape, container.find("k")->shape,
                           container.find("v")->shape);
  }

  Status read_dimensions(const std::vector<std::uint64_t>& q, const std::vector<std::uint64_t>& k,
                         const std::vector<std::uint64_t>& v) {
    if (q[2] != k[2]) return error("q", "its head_dim is not that of k");
    if (k[2] > kMaxDim) return error("k", "its head_dim is above 16,384");
    if (v[2] > kMaxDim) return error("v", "its value_dim is above 16,384");
    if (v[0] != k[0]) return error("v", "its KV heads are not as many as those of k");
    if (v[1] != k[1]) return error("v", "its tokens are not as many as those of k");
    if (q[0] % k[0] != 0) return error("q", "its heads are no multiple of the KV heads of k");
    if (q[0] / k[0] > kMaxGroup) return error("q", "it has more than 32 heads per KV head");
    if (q[1] > k[1]) return error("q", "it has more rows than k has tokens");
    shape_ = {.query_heads = static_cast<int>(q[0]),
              .kv_heads = static_cast<int>(k[0]),
              .head_dim = static_cast<int>(k[2]),
              .value_dim = static_cast<int>(v[2])};
    query_rows_ = static_cast<int>(q[1]);
    tokens_ = static_cast<TokenId>(k[1]);
    return Status();
  }

  Status read_scale(const Container& container) {
    scale_ = 1.0F / std::sqrt(static_cast<float>(shape_.head_dim));
    for (const auto& [name, text] : container.metadata) {
      if (name != "scale") continue;
      char* end = nullptr;
      scale_ = std::strtof(text.c_str(), &end);
      if (end != text.c_str() + text.size() || !std::isfinite(scale_) || !(scale_ > 0.0F)) {
        return Status::error(ErrorCode::kInvalidArgument,
                             "__metadata__.scale: \"%.60s\" is not a positive number",
                             text.c_str());
      }
    }
    return Status();
  }

  // [heads, rows, dim] to [rows, heads, dim].
  Status read_queries(const Tensor& tensor) {
    std::vector<float> values;
    const Status status = to_floats(tensor, values);
    if (!status.ok()) return status;
    queries_.resize(values.size());
    const auto heads = static_cast<std::size_t>(shape_.query_heads);
    const auto rows = static_cast<std::size_t>(query_rows_);
    const auto dim = static_cast<std::size_t>(shape_.head_dim);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::size_t head = i / dim / rows;
      const std::size_t row = i / dim % rows;
      queries_[(row * heads + head) * dim + i % dim] = values[i];
    }
    return Status();
  }

  Status read_key_values(const Tensor& k, const Tensor& v) {
    if (k.type == ScalarType::kF16 && v.type == ScalarType::kF16) {
      auto& arrays = arrays_.emplace<Arrays<fp16>>();
      const Status status = convert<fp16>(k, arrays.keys);
      return status.ok() ? convert<fp16>(v, arrays.values) : status;
    }
    auto& arrays = arrays_.emplace<Arrays<float>>();
    const Status status = to_floats(k, arrays.keys);
    return status.ok() ? to_floats(v, arrays.values) : status;
  }

  Shape shape_;
  TokenId tokens_ = 0;
  int query_rows_ = 0;
  float scale_ = 0.0F;
  std::vector<float> queries_;  // [n_q, query_heads, head_dim]
  std::variant<Arrays<fp16>, Arrays<float>> arrays_;
};

}  // namespace magicpig::bench
