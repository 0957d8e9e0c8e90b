// SPDX-License-Identifier: Apache-2.0
// What the host computes for the device: sizes, places, splits, and which arguments are refused.
#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cuda/attention.cuh"

namespace magicpig::test {
namespace {

TEST_CASE("the bits of a word of codes are those of the places that blocks have") {
  for (int word = 0; word < 16; ++word) {
    std::uint32_t all = 0;
    for (int token = 0; token < kSignatureBlock; ++token) {
      const CodePlace place = CodePlace::of(token);
      const std::uint32_t bits = cuda::code_bits(word, token, token + 1);
      const std::uint32_t own =
          place.byte / 4 != word ? 0U : 15U << (place.byte % 4 * 8 + 4 * place.upper);
      CHECK(bits == own);
      CHECK((all & bits) == 0U);
      all |= bits;
    }
    CHECK(all == ~0U);
    CHECK(cuda::code_bits(word, 0, kSignatureBlock) == ~0U);
    CHECK(cuda::code_bits(word, 5, 5) == 0U);
  }
}

TEST_CASE("rows of a table change places in pairs, and rows 8 apart lie in different halves") {
  for (int r = 0; r < 256; r += 2) {
    CHECK(cuda::table_row(r) / 2 == r / 2);
    CHECK(cuda::table_row(r + 1) == (cuda::table_row(r) ^ 1));
    CHECK(cuda::table_row(r) % 2 != cuda::table_row(r + 8) % 2);
  }
}

TEST_CASE("a pilot has all blocks of a short index and one of each stratum of a long one") {
  for (const int blocks : {1, 2, 63, 64, 65, 100, 768, 4096, 16777215}) {
    const int pilots = blocks < cuda::kPilotBlocks ? blocks : cuda::kPilotBlocks;
    int before = -1;
    for (int i = 0; i < pilots; ++i) {
      const int block = cuda::pilot_block(i, blocks, pilots);
      CHECK(block > before);
      if (blocks <= cuda::kPilotBlocks) CHECK(block == i);
      before = block;
    }
    CHECK(before < blocks);
  }
}

TEST_CASE("splits fill the device, but none is smaller than its least") {
  CHECK(cuda::splits_for(1, 8, 98304, 132) == 33);  // 264 blocks of threads
  CHECK(cuda::splits_for(8, 8, 98304, 132) == 5);
  CHECK(cuda::splits_for(1, 8, 4096, 132) == 4);  // 1,024 tokens each
  CHECK(cuda::splits_for(64, 8, 98304, 132) == 1);
  CHECK(cuda::splits_for(1, 8, 1, 132) == 1);
  CHECK(cuda::splits_for(1, 8, 0, 132) == 1);
  CHECK(cuda::splits_for(0, 8, 4096, 132) == 1);
  CHECK(cuda::splits_for(1, 1, INT32_MAX, 132) == 264);
}

TEST_CASE("signatures need what their arrays need, measured by the code that carves them") {
  const auto quantiser = HadamardQuantiser::create(128, 2, 1);
  REQUIRE(quantiser.ok());
  const cuda::SignaturesConfig config{.requests = 3, .kv_heads = 8, .capacity = 10000};
  const std::size_t blocks = 79;  // of 128 tokens
  const std::size_t heads = 24;
  const std::size_t least =
      heads * blocks * 128 * (32 + 2) + heads * 3 * 4 + heads * 128 * 4 + 3 * 4;
  const std::size_t bytes = cuda::Signatures::bytes(quantiser->shape(), config);
  CHECK(bytes >= least);
  CHECK(bytes <= least + 6 * kAlignment);
  std::vector<std::byte> memory(bytes);  // only carved
  const auto made = cuda::Signatures::create(*quantiser, config, memory);
  REQUIRE(made.ok());
  CHECK(made->view().blocks == 79);
  CHECK(made->view().segments() == 3);
  CHECK(reinterpret_cast<std::byte*>(made->view().counts + 3) <= memory.data() + bytes);
  CHECK(cuda::Signatures::create(*quantiser, config, std::span(memory).first(bytes - 1))
            .status()
            .code() == ErrorCode::kWorkspaceTooSmall);
}

TEST_CASE("signatures refuse sizes out of bounds") {
  const auto quantiser = HadamardQuantiser::create(64, 1, 1);
  REQUIRE(quantiser.ok());
  const auto code_of = [&](const cuda::SignaturesConfig& config) {
    return cuda::Signatures::create(*quantiser, config, {}).status().code();
  };
  CHECK(code_of({.requests = 0, .capacity = 100}) == ErrorCode::kInvalidArgument);
  CHECK(code_of({.requests = 65536, .capacity = 100}) == ErrorCode::kInvalidArgument);
  CHECK(code_of({.kv_heads = 0, .capacity = 100}) == ErrorCode::kInvalidArgument);
  CHECK(code_of({.capacity = 0}) == ErrorCode::kInvalidArgument);
  CHECK(code_of({.capacity = INT32_MAX}) == ErrorCode::kInvalidArgument);
  CHECK(code_of({.capacity = 100, .first = -1}) == ErrorCode::kInvalidArgument);
  const auto wide = HadamardQuantiser::create(264, 1, 1);
  REQUIRE(wide.ok());
  CHECK(cuda::Signatures::create(*wide, {.capacity = 100}, {}).status().code() ==
        ErrorCode::kInvalidArgument);
}

TEST_CASE("tables of segments and heads lie behind one another") {
  std::array<std::uint16_t, 1> none{};
  std::array<float, 1> norms{};
  const cuda::TableView view{.ids = none.data(),
                             .offsets = none.data(),
                             .norms = norms.data(),
                             .requests = 3,
                             .kv_heads = 2,
                             .tables = 5,
                             .buckets = 8,
                             .segments = 4,
                             .segment_tokens = 96,
                             .first = 4,
                             .capacity = 300};
  CHECK(view.heads() == 6);
  CHECK(view.words() == 12);
  std::int64_t segment = 0;
  for (int r = 0; r < 3; ++r) {
    for (int h = 0; h < 2; ++h) {
      CHECK(view.head_norms(view.head(r, h)) - norms.data() == segment * 96);
      for (int s = 0; s < 4; ++s, ++segment) {
        CHECK(view.segment_ids(view.head(r, h), s) - none.data() == segment * 5 * 96);
        CHECK(view.segment_offsets(view.head(r, h), s) - none.data() == segment * 5 * 9);
      }
    }
  }
  CHECK(view.count_at(0) == 0);
  CHECK(view.count_at(4) == 0);
  CHECK(view.count_at(5) == 1);
  CHECK(view.count_at(303) == 299);
  CHECK(view.count_at(INT32_MAX) == 300);
}

TEST_CASE("edges of tables are where they begin, and where their tokens end") {
  const cuda::TableEdges begins{.stride = 96};
  const cuda::TableEdges ends = cuda::TableEdges{.stride = 96, .tokens = 70} + 2;
  CHECK(begins[0] == 0);
  CHECK(begins[3] == 288);
  CHECK(*ends == 262);
  CHECK(ends[1] == 358);
}

TEST_CASE("tables need what their documentation says") {
  const auto family = SimHash::create({.dim = 128, .bits = 10, .tables = 150});
  REQUIRE(family.ok());
  const std::size_t tokens = 12 * 8192;
  const std::size_t heads = 8 * 2;
  const std::size_t bytes = cuda::BucketTables::bytes(
      *family, {.requests = 2, .kv_heads = 8, .capacity = 98000, .segment_tokens = 8192});
  const std::size_t expected =
      heads * (tokens * (2 * 150 + 4) + std::size_t{12} * 2 * 150 * 1025 + 4 * 128);
  CHECK(bytes >= expected);
  CHECK(bytes < expected + 1024);
  const std::size_t planes = cuda::SignPlanes::bytes(*family);
  CHECK(planes >= 10 * 1500 * 128);
  CHECK(planes < 10 * 1500 * 128 + 512);
}

TEST_CASE("planes and rules refuse memory that is too small, and what has no kernel") {
  const auto family = SimHash::create({.dim = 64, .bits = 4, .tables = 6});
  REQUIRE(family.ok());
  std::vector<std::byte> memory(cuda::SignPlanes::bytes(*family) - 1);
  CHECK(cuda::SignPlanes::create(*family, memory, nullptr).status().code() ==
        ErrorCode::kWorkspaceTooSmall);
  const auto rule = Collisions::create(*family, {});
  REQUIRE(rule.ok());
  memory.resize(cuda::Collisions::bytes(*rule) - 1);
  CHECK(cuda::Collisions::create(*rule, memory, nullptr).status().code() ==
        ErrorCode::kWorkspaceTooSmall);
  const auto wide = SimHash::create({.dim = 1025, .bits = 1, .tables = 1});
  REQUIRE(wide.ok());
  CHECK(cuda::SignPlanes::create(*wide, {}, nullptr).status().code() ==
        ErrorCode::kInvalidArgument);
}

TEST_CASE("errors of the runtime keep their number") {
  const Status status = cuda::status_of(cudaErrorInvalidValue, "some call");
  CHECK(status.code() == ErrorCode::kDevice);
  CHECK(status.device_error() == static_cast<int>(cudaErrorInvalidValue));
  CHECK(std::string_view(status.message()).starts_with("some call: "));
  CHECK(cuda::status_of(cudaSuccess, "some call").ok());
}

}  // namespace
}  // namespace magicpig::test
