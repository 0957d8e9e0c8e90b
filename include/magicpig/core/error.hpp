// SPDX-License-Identifier: Apache-2.0
// Errors as values: Status, and Result for what can fail to be made; neither allocates or throws.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <new>
#include <optional>
#include <type_traits>
#include <utility>

#include "magicpig/version.hpp"

#if defined(__cpp_exceptions)
#include <stdexcept>
#endif

namespace magicpig::inline MAGICPIG_ABI {

enum class ErrorCode {
  kOk,
  kInvalidArgument,    ///< a value outside the bounds that its message names
  kShapeMismatch,      ///< two arguments disagree on heads, dimensions or tokens
  kNonFinite,          ///< NaN or infinity where a finite number is needed
  kOutOfMemory,        ///< an allocation of the index failed; the index is unchanged
  kWorkspaceTooSmall,  ///< the message names the bytes that are needed
  kBadBlob,  ///< saved bytes that are not what they should be; the message names the field
  kDevice,   ///< a call of the device's runtime failed, see Status::device_error()
};

/// Success, or an error code with a message that names the value and its bound. Trivially
/// copyable, 256 bytes, no allocation.
class [[nodiscard]] Status {
 public:
  constexpr Status() = default;

  /// An error; `format` and what follows as in printf, cut at 247 characters.
  [[gnu::format(printf, 2, 3)]] static Status error(ErrorCode code, const char* format,
                                                    ...) noexcept {
    Status status;
    status.code_ = code;
    std::va_list arguments;
    va_start(arguments, format);
    (void)std::vsnprintf(status.message_, sizeof status.message_, format, arguments);
    va_end(arguments);
    return status;
  }

  /// kDevice: what a call of the device's runtime returned, and the name of that call.
  [[nodiscard]] static Status device(int device_error, const char* call,
                                     const char* meaning) noexcept {
    Status status = error(ErrorCode::kDevice, "%s: %s (%d)", call, meaning, device_error);
    status.device_error_ = device_error;
    return status;
  }

  [[nodiscard]] constexpr bool ok() const { return code_ == ErrorCode::kOk; }
  [[nodiscard]] constexpr ErrorCode code() const { return code_; }
  /// Empty when ok().
  [[nodiscard]] constexpr const char* message() const { return message_; }
  /// The runtime's own number of a kDevice error, a cudaError_t; 0 for all others.
  [[nodiscard]] constexpr int device_error() const { return device_error_; }

 private:
  ErrorCode code_ = ErrorCode::kOk;
  int device_error_ = 0;
  char message_[248] = {};
};

/// A value, or the reason why there is none.
template <class T>
class [[nodiscard]] Result {
 public:
  // Two constructors, not one by value: nvcc moves a local only to what takes a reference.
  Result(T&& value) noexcept : value_(std::move(value)) {}  // NOLINT: implicit by design
  Result(const T& value) noexcept requires std::is_copy_constructible_v<T>  // NOLINT
      : value_(value) {}
  Result(const Status& error) noexcept : status_(error) {}  // NOLINT

  [[nodiscard]] bool ok() const { return value_.has_value(); }
  [[nodiscard]] const Status& status() const { return status_; }
  /// Undefined unless ok().
  [[nodiscard]] T& operator*() { return *value_; }
  [[nodiscard]] const T& operator*() const { return *value_; }
  [[nodiscard]] T* operator->() { return &*value_; }
  [[nodiscard]] const T* operator->() const { return &*value_; }

#if defined(__cpp_exceptions)
  /// The value; throws std::runtime_error with the message of status() when there is none. Only
  /// where exceptions are on.
  [[nodiscard]] T value() && {
    if (!ok()) throw std::runtime_error(status_.message());
    return std::move(*value_);
  }
#endif

 private:
  std::optional<T> value_;
  Status status_;
};

}  // namespace magicpig::inline MAGICPIG_ABI
