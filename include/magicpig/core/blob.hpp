// SPDX-License-Identifier: Apache-2.0
// Indexes as bytes: fields one after the other behind a header that says what they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "magicpig/core/checksum.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// What a blob holds; its number is in the header and never given to anything else.
enum class BlobKind : std::uint32_t {
  kSignatures = 1,
  kBucketTables = 2,
  kProductQuantiser = 3,
  kPerHeadIndex = 4,
};

/// Of all blobs: the layout of fields that this version of the library writes and reads.
inline constexpr std::uint32_t kBlobVersion = 1;

/// The first bytes of a blob, as this machine stores them: a reader whose byte order is another
/// sees it from `order`.
struct BlobHeader {
  static constexpr std::uint64_t kMagic = 0x3167697063696761ULL;  // "agicpig1" in little endian
  static constexpr std::uint32_t kOrder = 0x01020304;

  std::uint64_t magic = kMagic;
  std::uint32_t order = kOrder;
  std::uint32_t version = kBlobVersion;
  std::uint32_t kind = 0;
  std::uint32_t reserved = 0;
  std::uint64_t bytes = 0;     ///< of the blob, header and all
  std::uint64_t checksum = 0;  ///< Checksum of what is behind the header
};
static_assert(sizeof(BlobHeader) == 40);

/// Puts fields into memory, or only counts their bytes. Fields are not aligned.
class BlobWriter {
 public:
  /// Counts.
  BlobWriter() = default;
  /// Writes to `to`, which has room for all that follows.
  BlobWriter(BlobKind kind, std::span<std::byte> to) : kind_(kind), to_(to) {}

  template <class T>
  void put(T x) {
    static_assert(std::is_arithmetic_v<T>);
    put_array(std::span<const T>(&x, 1));
  }
  /// The values alone: how many there are follows from fields before.
  template <class T>
  void put_array(std::span<const T> values) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (!to_.empty() && !values.empty()) {
      std::memcpy(to_.data() + at_, values.data(), values.size_bytes());
    }
    at_ += values.size_bytes();
  }

  /// The blob that `inner` saves, behind its length.
  template <class Saved>
  void put_blob(const Saved& inner) {
    const std::size_t bytes = inner.saved_bytes();
    put(static_cast<std::uint64_t>(bytes));
    if (!to_.empty()) (void)inner.save(to_.subspan(at_, bytes));
    at_ += bytes;
  }

  /// So far, header and all.
  [[nodiscard]] std::size_t bytes() const { return at_; }

  /// Writes the header, after the last field.
  void finish() {
    Checksum sum;
    sum.add(to_.subspan(sizeof(BlobHeader), at_ - sizeof(BlobHeader)));
    const BlobHeader header{
        .kind = static_cast<std::uint32_t>(kind_), .bytes = at_, .checksum = sum.value()};
    std::memcpy(to_.data(), &header, sizeof header);
  }

 private:
  BlobKind kind_ = BlobKind::kSignatures;
  std::span<std::byte> to_;
  std::size_t at_ = sizeof(BlobHeader);
};

/// Takes fields from memory. Nothing is believed: after the first field that is not there, or that
/// is not what it must be, all others are zero and status() says which it was.
class BlobReader {
 public:
  /// Errors: bytes that are no blob, of another byte order, version or kind, of another length than
  /// their header says, or changed since they were written.
  BlobReader(BlobKind kind, std::span<const std::byte> from)
      : from_(from), status_(check(kind, from)) {}

  [[nodiscard]] bool ok() const { return status_.ok(); }
  [[nodiscard]] const Status& status() const { return status_; }

  /// A field; `name` is named where the blob ends before it.
  template <class T>
  [[nodiscard]] T take(const char* name) {
    T x{};
    take_array(name, std::span<T>(&x, 1));
    return x;
  }
  /// As many values as `values` has room for.
  template <class T>
  void take_array(const char* name, std::span<T> values) {
    static_assert(std::is_trivially_copyable_v<T>);
    if (!ok() || values.empty()) return;
    if (values.size_bytes() > left()) {
      status_ = Status::error(ErrorCode::kBadBlob, "blob: %s: %zu bytes are wanted, %zu are left",
                              name, values.size_bytes(), left());
      return;
    }
    std::memcpy(values.data(), from_.data() + at_, values.size_bytes());
    at_ += values.size_bytes();
  }
  /// What put_blob() put: a view, nothing but its length is checked.
  [[nodiscard]] std::span<const std::byte> take_blob(const char* name) {
    const auto bytes = take<std::uint64_t>(name);
    need(name, static_cast<std::size_t>(bytes), 1);
    if (!ok()) return {};
    at_ += static_cast<std::size_t>(bytes);
    return from_.subspan(at_ - static_cast<std::size_t>(bytes), static_cast<std::size_t>(bytes));
  }
  /// Refuses a blob that has no room for `count` values of `size` bytes, before memory for them is
  /// allocated on its word.
  void need(const char* name, std::size_t count, std::size_t size) {
    if (!ok() || left() / size >= count) return;
    status_ =
        Status::error(ErrorCode::kBadBlob, "blob: %s: %zu times %zu bytes are wanted, %zu are left",
                      name, count, size, left());
  }
  /// Bytes that are not taken yet.
  [[nodiscard]] std::size_t left() const { return ok() ? from_.size() - at_ : 0; }

  /// A field that has to be what the index at hand has.
  template <class T>
  void expect(const char* name, T own) {
    const T stored = take<T>(name);
    if (!ok() || stored == own) return;
    if constexpr (std::is_floating_point_v<T>) {
      status_ = Status::error(ErrorCode::kBadBlob, "blob: %s is %g, wanted is %g", name,
                              static_cast<double>(stored), static_cast<double>(own));
    } else {
      status_ = Status::error(ErrorCode::kBadBlob, "blob: %s is %lld, wanted is %lld", name,
                              static_cast<long long>(stored), static_cast<long long>(own));
    }
  }
  /// Refuses the blob unless `good`.
  void require(bool good, const char* name, long long value) {
    if (!ok() || good) return;
    status_ = Status::error(ErrorCode::kBadBlob, "blob: %s %lld is out of bounds", name, value);
  }
  /// After the last field: refuses bytes behind it.
  void end() {
    if (!ok() || left() == 0) return;
    status_ = Status::error(ErrorCode::kBadBlob, "blob: %zu bytes behind the last field", left());
  }

 private:
  [[nodiscard]] static Status check(BlobKind kind, std::span<const std::byte> from) {
    constexpr ErrorCode kBad = ErrorCode::kBadBlob;
    BlobHeader header;
    if (from.size() < sizeof header) {
      return Status::error(kBad, "blob: %zu bytes are fewer than the header's %zu", from.size(),
                           sizeof header);
    }
    std::memcpy(&header, from.data(), sizeof header);
    if (header.order == 0x04030201) {
      return Status::error(kBad, "blob: order: written on a machine of another byte order");
    }
    if (header.magic != BlobHeader::kMagic || header.order != BlobHeader::kOrder) {
      return Status::error(kBad, "blob: magic: these bytes are no blob");
    }
    if (header.version != kBlobVersion) {
      return Status::error(kBad, "blob: version is %u, this library reads %u", header.version,
                           kBlobVersion);
    }
    if (header.kind != static_cast<std::uint32_t>(kind)) {
      return Status::error(kBad, "blob: kind is %u, wanted is %u", header.kind,
                           static_cast<std::uint32_t>(kind));
    }
    if (header.reserved != 0) {
      return Status::error(kBad, "blob: reserved is %u, wanted is 0", header.reserved);
    }
    if (header.bytes != from.size()) {
      return Status::error(kBad, "blob: bytes: %zu are given, %llu were written", from.size(),
                           static_cast<unsigned long long>(header.bytes));
    }
    Checksum sum;
    sum.add(from.subspan(sizeof header));
    if (sum.value() == header.checksum) return Status();
    return Status::error(kBad, "blob: checksum: the bytes have changed");
  }

  std::span<const std::byte> from_;
  std::size_t at_ = sizeof(BlobHeader);
  Status status_;
};

/// How many bytes save_blob() writes of `index`.
template <class IndexType>
[[nodiscard]] std::size_t saved_bytes_of(const IndexType& index) noexcept {
  BlobWriter counting;
  index.put(counting);
  return counting.bytes();
}

/// Writes the fields of `index`, which put(writer) gives, to `to`. Error: fewer bytes than they
/// take; nothing is written then.
template <class IndexType>
[[nodiscard]] Status save_blob(BlobKind kind, const IndexType& index,
                               std::span<std::byte> to) noexcept {
  const std::size_t needed = saved_bytes_of(index);
  if (to.size() < needed) {
    return Status::error(ErrorCode::kWorkspaceTooSmall, "saving takes %zu bytes, %zu are given",
                         needed, to.size());
  }
  BlobWriter writer(kind, to.first(needed));
  index.put(writer);
  writer.finish();
  return Status();
}

}  // namespace magicpig::inline MAGICPIG_ABI
