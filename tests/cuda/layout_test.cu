// SPDX-License-Identifier: Apache-2.0
// What the host computes for the device: sizes, places, splits, and which arguments are refused.
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "magicpig/attention.hpp"
#include "magicpig/cuda/attention.cuh"

namespace {

using namespace magicpig;

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

// Nothing of these is on a device, and nothing gets that far.
struct Refused {
  Refused() {
    batch.key_values =
        cuda::KeyValues<bf16>::head_major(rows.data(), rows.data(), 1, 2, 4, 64, tokens.data());
    batch.queries = rows.data();
    batch.seeds = seeds.data();
    batch.steps = steps.data();
    batch.out = out.data();
    plan = {.query_heads = 8, .sampler = &*sampler};
  }
  [[nodiscard]] ErrorCode code() const {
    return cuda::decode(plan, *index, batch, {}, nullptr).code();
  }

  alignas(16) std::array<bf16, 2 * 4 * 64> rows{};
  std::array<std::int32_t, 1> tokens{};
  std::array<std::uint64_t, 1> seeds{};
  std::array<std::uint32_t, 1> steps{};
  std::array<float, 8 * 64> out{};
  Result<HadamardQuantiser> quantiser = HadamardQuantiser::create(64, 2, 1);
  std::vector<std::byte> memory =
      std::vector<std::byte>(cuda::Signatures::bytes(quantiser->shape(), config()));
  Result<cuda::Signatures> index = cuda::Signatures::create(*quantiser, config(), memory);
  Result<Poisson> sampler = Poisson::create(*quantiser, {.budget = {.fraction = 0.02}});
  cuda::DecodePlan plan;
  cuda::DecodeBatch<bf16> batch;

  static cuda::SignaturesConfig config() { return {.kv_heads = 2, .capacity = 100}; }
};

TEST_CASE("a step refuses arguments that do not fit, and starts nothing") {
  CHECK(Refused().code() == ErrorCode::kWorkspaceTooSmall);  // all else is in order
  const auto code_with = [](const auto& change) {
    Refused step;
    change(step);
    return step.code();
  };
  using enum ErrorCode;
  CHECK(code_with([](Refused& s) { s.plan.query_heads = 7; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.query_heads = 34; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.query_heads = 0; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.sampler = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.plan.scale = NAN; }) == kNonFinite);
  CHECK(code_with([](Refused& s) { s.plan.splits = 0; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.out = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.queries = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.queries = s.rows.data() + 1; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.seeds = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.steps = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.keys = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.tokens = nullptr; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.page_tokens = 24; }) == kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.key_strides.token = 130; }) ==
        kInvalidArgument);
  CHECK(code_with([](Refused& s) { s.batch.key_values.requests = 2; }) == kShapeMismatch);
  CHECK(code_with([](Refused& s) { s.batch.key_values.dim = 128; }) == kShapeMismatch);
  const auto others = HadamardQuantiser::create(64, 3, 1);
  REQUIRE(others.ok());
  const auto sampler = Poisson::create(*others, {.budget = {.fraction = 0.02}});
  CHECK(code_with([&](Refused& s) { s.plan.sampler = &*sampler; }) == kShapeMismatch);
}

TEST_CASE("a dimension that has no kernel is refused") {
  const auto quantiser = HadamardQuantiser::create(80, 2, 1);
  REQUIRE(quantiser.ok());
  const cuda::SignaturesConfig config{.kv_heads = 2, .capacity = 100};
  std::vector<std::byte> memory(cuda::Signatures::bytes(quantiser->shape(), config));
  const auto index = cuda::Signatures::create(*quantiser, config, memory);
  REQUIRE(index.ok());
  Refused step;
  step.batch.key_values.dim = 80;
  step.batch.key_values.key_strides =
      step.batch.key_values.value_strides = {.page = 0, .head = 640, .token = 160};
  CHECK(cuda::decode(step.plan, *index, step.batch, {}, nullptr).code() ==
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
