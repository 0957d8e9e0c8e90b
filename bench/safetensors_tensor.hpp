// SPDX-License-Identifier: Apache-2.0
// One tensor of a safetensors header: its entry read and checked, before its bytes are looked at.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"

namespace magicpig::bench {

enum class ScalarType { kF16, kBF16, kF32 };

[[nodiscard]] constexpr std::size_t bytes_of(ScalarType type) {
  return type == ScalarType::kF32 ? 4 : 2;
}

/// A tensor of a container; its bytes have any alignment and live as long as the container's.
struct Tensor {
  std::string name;
  ScalarType type = ScalarType::kF32;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin = 0;  ///< in the data, behind the header
  std::uint64_t end = 0;
  std::span<const std::byte> bytes;
};

inline constexpr ErrorCode kMalformed = ErrorCode::kInvalidArgument;

/// For %llu, whatever std::uint64_t is.
[[nodiscard]] constexpr unsigned long long printable(std::uint64_t value) { return value; }

[[nodiscard]] inline Status read_type(const nlohmann::json& entry, Tensor& tensor) {
  constexpr std::array<std::pair<const char*, ScalarType>, 3> kTypes{
      {{"F16", ScalarType::kF16}, {"BF16", ScalarType::kBF16}, {"F32", ScalarType::kF32}}};
  const auto field = entry.find("dtype");
  const bool text = field != entry.end() && field->is_string();
  for (const auto& [name, type] : kTypes) {
    if (!text || field->get_ref<const std::string&>() != name) continue;
    tensor.type = type;
    return Status();
  }
  return Status::error(kMalformed, "%.60s.dtype: %.60s is none of F16, BF16, F32",
                       tensor.name.c_str(),
                       text ? field->get_ref<const std::string&>().c_str() : "not a string, so it");
}

[[nodiscard]] inline Status read_offsets(const nlohmann::json& entry, Tensor& tensor) {
  const auto field = entry.find("data_offsets");
  if (field == entry.end() || !field->is_array() || field->size() != 2 ||
      !(*field)[0].is_number_unsigned() || !(*field)[1].is_number_unsigned()) {
    return Status::error(kMalformed, "%.60s.data_offsets: not two whole numbers from 0 to 2^64 - 1",
                         tensor.name.c_str());
  }
  tensor.begin = (*field)[0].get<std::uint64_t>();
  tensor.end = (*field)[1].get<std::uint64_t>();
  if (tensor.begin > tensor.end) {
    return Status::error(kMalformed, "%.60s.data_offsets: begins at %llu, behind its end %llu",
                         tensor.name.c_str(), printable(tensor.begin), printable(tensor.end));
  }
  return Status();
}

[[nodiscard]] inline Status read_shape(const nlohmann::json& entry, Tensor& tensor) {
  const char* name = tensor.name.c_str();
  const auto field = entry.find("shape");
  if (field == entry.end() || !field->is_array()) {
    return Status::error(kMalformed, "%.60s.shape: not an array", name);
  }
  std::uint64_t bytes = bytes_of(tensor.type);
  for (const nlohmann::json& dimension : *field) {
    const std::size_t at = tensor.shape.size();
    if (!dimension.is_number_unsigned()) {
      return Status::error(kMalformed, "%.60s.shape[%zu]: not a whole number from 0 to 2^64 - 1",
                           name, at);
    }
    const auto size = dimension.get<std::uint64_t>();
    if (size != 0 && bytes > UINT64_MAX / size) {
      return Status::error(kMalformed, "%.60s.shape: its bytes overflow 64 bits", name);
    }
    bytes *= size;
    tensor.shape.push_back(size);
  }
  if (bytes != tensor.end - tensor.begin) {
    return Status::error(kMalformed,
                         "%.60s.data_offsets: hold %llu bytes, its shape and dtype need %llu", name,
                         printable(tensor.end - tensor.begin), printable(bytes));
  }
  return Status();
}

/// The tensor that a header's entry describes, without bytes. Errors name the field at fault: one
/// that is unknown, missing or of another kind, or offsets that disagree with shape and dtype.
[[nodiscard]] inline Result<Tensor> parse_tensor_entry(const std::string& name,
                                                       const nlohmann::json& entry) {
  if (!entry.is_object()) return Status::error(kMalformed, "%.60s: not an object", name.c_str());
  for (const auto& item : entry.items()) {
    if (item.key() != "dtype" && item.key() != "shape" && item.key() != "data_offsets") {
      return Status::error(kMalformed, "%.60s.%.60s: unknown field", name.c_str(),
                           item.key().c_str());
    }
  }
  Tensor tensor;
  tensor.name = name;
  Status status = read_type(entry, tensor);
  if (status.ok()) status = read_offsets(entry, tensor);
  if (status.ok()) status = read_shape(entry, tensor);
  if (!status.ok()) return status;
  return tensor;
}

/// Appends a tensor of Ts to `out`. Error: a value that is not finite.
template <class T, class Out>
[[nodiscard]] Status convert(const Tensor& tensor, std::vector<Out>& out) {
  const std::size_t count = tensor.bytes.size() / sizeof(T);
  out.reserve(out.size() + count);
  for (std::size_t i = 0; i < count; ++i) {
    T value;  // copied, for a container does not align its tensors
    std::memcpy(&value, tensor.bytes.data() + i * sizeof(T), sizeof(T));
    if (!std::isfinite(to_float(value))) {
      return Status::error(ErrorCode::kNonFinite, "%.60s: value %zu is not finite",
                           tensor.name.c_str(), i);
    }
    if constexpr (std::is_same_v<Out, float>) {
      out.push_back(to_float(value));
    } else {
      out.push_back(value);
    }
  }
  return Status();
}

/// The same of a tensor of any type, as floats, which hold all their values.
[[nodiscard]] inline Status to_floats(const Tensor& tensor, std::vector<float>& out) {
  if (tensor.type == ScalarType::kF16) return convert<fp16>(tensor, out);
  if (tensor.type == ScalarType::kBF16) return convert<bf16>(tensor, out);
  return convert<float>(tensor, out);
}

}  // namespace magicpig::bench
