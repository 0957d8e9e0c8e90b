// SPDX-License-Identifier: Apache-2.0
// Blobs come back as they were written, and nothing that was changed, cut or made up is believed.
#include "magicpig/core/blob.hpp"

#include <doctest/doctest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <vector>

namespace {

using namespace magicpig;

const std::array<std::int16_t, 5> kNumbers = {1, -2, 3, -4, 5};

void put(BlobWriter& writer) {
  writer.put(7);
  writer.put(2.5F);
  writer.put(std::uint64_t{1} << 63);
  writer.put_array(std::span<const std::int16_t>(kNumbers));
}

std::vector<std::byte> written(BlobKind kind = BlobKind::kSignatures) {
  BlobWriter counting;
  put(counting);
  std::vector<std::byte> bytes(counting.bytes());
  BlobWriter writer(kind, bytes);
  put(writer);
  CHECK(writer.bytes() == bytes.size());
  writer.finish();
  return bytes;
}

std::string message_of(std::span<const std::byte> bytes) {
  const BlobReader reader(BlobKind::kSignatures, bytes);
  if (!reader.ok()) CHECK(reader.status().code() == ErrorCode::kBadBlob);
  return reader.status().message();
}

bool says(const std::string& message, const char* words) {
  return message.find(words) != std::string::npos;
}

TEST_CASE("Blob.fields_come_back_as_they_were_put") {
  const auto bytes = written();
  CHECK(bytes.size() == sizeof(BlobHeader) + 4 + 4 + 8 + 10);
  BlobReader reader(BlobKind::kSignatures, bytes);
  CHECK(reader.take<int>("seven") == 7);
  CHECK(reader.take<float>("number") == 2.5F);
  CHECK(reader.take<std::uint64_t>("bits") == std::uint64_t{1} << 63);
  std::array<std::int16_t, 5> numbers{};
  CHECK(reader.left() == 10);
  reader.take_array("numbers", std::span<std::int16_t>(numbers));
  CHECK(numbers == kNumbers);
  reader.end();
  CHECK(reader.ok());
}

TEST_CASE("Blob.any_changed_byte_is_found") {
  const auto good = written();
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const int bit : {0, 7}) {
      auto bytes = good;
      bytes[i] ^= static_cast<std::byte>(1 << bit);
      CAPTURE(i);
      CHECK_FALSE(message_of(bytes).empty());
    }
  }
}

TEST_CASE("Blob.errors_name_the_field") {
  const auto good = written();
  CHECK(says(message_of({}), "0 bytes are fewer than the header's 40"));
  CHECK(says(message_of(std::span(good).first(39)), "39 bytes"));
  CHECK(says(message_of(std::span(good).first(good.size() - 1)), "bytes: 65 are given, 66 were"));
  auto longer = good;
  longer.push_back(std::byte{0});
  CHECK(says(message_of(longer), "bytes: 67 are given"));
  CHECK(says(message_of(written(BlobKind::kBucketTables)), "kind is 2, wanted is 1"));
  const auto with = [&](std::size_t at, auto value) {
    auto bytes = good;
    std::memcpy(bytes.data() + at, &value, sizeof value);
    return message_of(bytes);
  };
  CHECK(says(with(0, std::uint64_t{0}), "magic"));
  CHECK(says(with(8, std::uint32_t{0x04030201}), "order"));
  CHECK(says(with(8, std::uint32_t{5}), "magic"));
  CHECK(says(with(12, std::uint32_t{2}), "version is 2, this library reads 1"));
  CHECK(says(with(50, std::uint8_t{77}), "checksum"));
}

TEST_CASE("Blob.after_the_first_bad_field_all_are_zero_and_the_first_is_named") {
  const auto bytes = written();
  BlobReader reader(BlobKind::kSignatures, bytes);
  reader.expect("seven", 8);
  CHECK(says(reader.status().message(), "seven is 7, wanted is 8"));
  CHECK(reader.take<float>("number") == 0.0F);
  CHECK(reader.left() == 0);
  reader.require(false, "later", 1);
  reader.end();
  CHECK(says(reader.status().message(), "seven"));

  BlobReader greedy(BlobKind::kSignatures, bytes);
  std::vector<std::int64_t> many(4, 9);
  greedy.take_array("many", std::span(many));
  CHECK(says(greedy.status().message(), "many: 32 bytes are wanted, 26 are left"));
  CHECK(many[0] == 9);

  BlobReader early(BlobKind::kSignatures, bytes);
  (void)early.take<int>("seven");
  early.end();
  CHECK(says(early.status().message(), "22 bytes behind the last field"));
}

TEST_CASE("Checksum.tells_lengths_orders_and_zeros_apart") {
  const auto of = [](std::span<const std::uint8_t> bytes) {
    Checksum sum;
    sum.add(std::as_bytes(bytes));
    return sum.value();
  };
  std::vector<std::uint64_t> seen;
  std::array<std::uint8_t, 17> bytes{};
  for (std::size_t n = 0; n <= bytes.size(); ++n) seen.push_back(of(std::span(bytes).first(n)));
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    bytes[i] = 1;
    seen.push_back(of(bytes));
    bytes[i] = 0;
  }
  for (std::size_t i = 0; i < seen.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) CHECK(seen[i] != seen[j]);
  }
}

}  // namespace
