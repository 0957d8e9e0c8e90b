// SPDX-License-Identifier: Apache-2.0
// Signatures made on the device: the very bits of the host's.
#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "magicpig/cuda/signatures.cuh"
#include "signature_problem.cuh"

namespace magicpig::test {
namespace {

// What the device's index has, downloaded.
struct Downloaded {
  explicit Downloaded(const cuda::SignatureView& from)
      : view(from),
        heads(static_cast<std::size_t>(from.requests * from.kv_heads)),
        codes(download(from.codes, heads * static_cast<std::size_t>(from.blocks * from.rows * 16))),
        factors(download(from.factors,
                         heads * static_cast<std::size_t>(from.blocks * kSignatureBlock))),
        largest(download(from.largest, heads * static_cast<std::size_t>(from.segments()))),
        centres(download(from.centres, heads * static_cast<std::size_t>(from.dim))),
        counts(download(from.counts, static_cast<std::size_t>(from.requests))) {}

  cuda::SignatureView view;
  std::size_t heads;
  std::vector<std::uint32_t> codes;
  std::vector<bf16> factors;
  std::vector<std::uint32_t> largest;
  std::vector<float> centres;
  std::vector<std::int32_t> counts;
};

// Codes, factors and largest factors of a request's tokens against the host's.
template <class Index>
void check_same(const Downloaded& got, int request, const Index& expected) {
  const int count = expected.indexed().size();
  REQUIRE(got.counts[static_cast<std::size_t>(request)] == count);
  const int rows = got.view.rows;
  for (int h = 0; h < got.view.kv_heads; ++h) {
    const auto head = static_cast<std::size_t>(request * got.view.kv_heads + h);
    int wrong_codes = 0;
    int wrong_factors = 0;
    for (int b = 0; b < expected.block_count(); ++b) {
      const CodeBlocks own = expected.blocks(b, 1, h);
      const int last = std::min(count - b * kSignatureBlock, kSignatureBlock);
      const std::size_t block =
          head * static_cast<std::size_t>(got.view.blocks) + static_cast<std::size_t>(b);
      for (int i = 0; i < rows * 16; ++i) {
        std::uint32_t word = 0;
        std::memcpy(&word, own.codes + 4 * i, sizeof word);
        const std::uint32_t other =
            got.codes[block * static_cast<std::size_t>(rows * 16) + static_cast<std::size_t>(i)];
        wrong_codes += ((word ^ other) & cuda::code_bits(i % 16, 0, last)) != 0U ? 1 : 0;
      }
      for (int t = 0; t < last; ++t) {
        wrong_factors +=
            got.factors[block * kSignatureBlock + static_cast<std::size_t>(t)] == own.factors[t]
                ? 0
                : 1;
      }
      const float scale =
          std::bit_cast<float>(got.largest[head * static_cast<std::size_t>(got.view.segments()) +
                                           static_cast<std::size_t>(b / cuda::kSegmentBlocks)]);
      CHECK((scale > 0x1p-100F ? 32767.0F / scale : 0.0F) == own.factor_scale);
    }
    CHECK(wrong_codes == 0);
    CHECK(wrong_factors == 0);
    CHECK(std::memcmp(got.centres.data() + head * static_cast<std::size_t>(got.view.dim),
                      expected.centre(h),
                      sizeof(float) * static_cast<std::size_t>(got.view.dim)) == 0);
  }
}

template <class T>
void check_build(const DeviceCacheConfig& config, const std::vector<std::int32_t>& ends) {
  CAPTURE(config.dim);
  CAPTURE(config.bits);
  SignatureProblem<T> problem(config);
  problem.set_tokens(ends);
  problem.build(ends);
  const Downloaded got(problem.index.view());
  for (int r = 0; r < config.requests; ++r) {
    check_same(got, r, *problem.host_index(r, ends[static_cast<std::size_t>(r)]));
  }
}

TEST_CASE("device: signatures are the host's, bit by bit, for all bits and dimensions") {
  for (const int bits : {1, 2, 3, 4}) {
    for (const int dim : {64, 80, 96, 128, 256}) {
      check_build<bf16>({.dim = dim, .bits = bits, .capacity = 700}, {517, 132});
    }
  }
}

TEST_CASE("device: signatures are the host's for each type of keys") {
  check_build<float>({.dim = 128, .capacity = 400}, {300, 261});
  check_build<fp16>({.dim = 128, .capacity = 400}, {300, 261});
}

TEST_CASE("device: centres are the host's where it reads some of the keys only") {
  check_build<bf16>({.requests = 1, .kv_heads = 1, .dim = 64, .bits = 1, .capacity = 20000},
                    {19003});
}

TEST_CASE("device: signatures that are appended to, cut and appended to again are the host's") {
  SignatureProblem<bf16> problem({.requests = 3, .dim = 64, .capacity = 9000});
  std::vector<std::unique_ptr<SignatureProblem<bf16>::Index>> hosts;
  std::vector<std::int32_t> ends = {200, 4000, 5};
  problem.set_tokens({9000, 9000, 9000});
  problem.build(ends);
  for (int r = 0; r < 3; ++r) {
    hosts.push_back(problem.host_index(r, ends[static_cast<std::size_t>(r)]));
  }
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  const auto check = [&] {
    const Downloaded got(problem.index.view());
    for (int r = 0; r < 3; ++r) check_same(got, r, *hosts[static_cast<std::size_t>(r)]);
  };
  check();
  const auto append = [&](const std::vector<std::int32_t>& up_to) {
    problem.ends.set(up_to);
    require(problem.index.append(problem.device(), problem.ends.data(), 5000, nullptr));
    for (int r = 0; r < 3; ++r) {
      const auto i = static_cast<std::size_t>(r);
      require(hosts[i]->append(backend, problem.host(r, 9000), up_to[i]));
    }
    check();
  };
  const auto truncate = [&](const std::vector<std::int32_t>& to) {
    problem.ends.set(to);
    require(problem.index.truncate(problem.ends.data(), nullptr));
    for (int r = 0; r < 3; ++r) {
      const auto i = static_cast<std::size_t>(r);
      require(hosts[i]->truncate(to[i]));
    }
    check();
  };
  append({201, 4099, 5});    // one token, the last of a segment, none
  append({900, 8996, 137});  // across segments; to the end of a block and one more
  append({100, 8996, 137});  // nothing
  truncate({517, 4101, 9000});
  append({518, 4102, 138});
  truncate({517, 4100, 60});  // a segment of one token goes
  append({2000, 8000, 61});
}

TEST_CASE("device: tokens beyond the capacity stay out of an index, none at all leave it empty") {
  SignatureProblem<bf16> problem({.dim = 64, .capacity = 256});
  problem.set_tokens({256, 256});
  const cuda::SignaturesConfig small{.requests = 2, .kv_heads = 2, .capacity = 128};
  DeviceArray<std::byte> memory(cuda::Signatures::bytes(problem.quantiser->shape(), small));
  const auto index = cuda::Signatures::create(*problem.quantiser, small, memory.span());
  require(index.status());
  problem.ends.set({256, 3});
  require(index->build(problem.device(), problem.ends.data(), 256, nullptr));
  CHECK(download(index->view().counts, 2) == std::vector<std::int32_t>{128, 0});
}

TEST_CASE("device: a key that is not finite has no factor, and its neighbours keep theirs") {
  SignatureProblem<float> problem(
      {.requests = 1, .query_heads = 1, .kv_heads = 1, .dim = 64, .capacity = 128});
  problem.set_tokens({128});
  problem.build({100});
  const Downloaded before(problem.index.view());
  std::vector<float> keys = problem.keys;
  keys[104 * 64 + 3] = std::numeric_limits<float>::infinity();
  problem.device_keys.set(keys);
  problem.ends.set({120});
  require(problem.index.append(problem.device(), problem.ends.data(), 128, nullptr));
  const Downloaded after(problem.index.view());
  for (std::size_t i = 0; i < 116; ++i) {
    CAPTURE(i);
    if (i < 96) CHECK(after.factors[i] == before.factors[i]);
    CHECK((to_float(after.factors[i]) == 0.0F) == (i == 100));
  }
}

TEST_CASE("device: signatures refuse keys of another shape") {
  SignatureProblem<bf16> problem({.dim = 64, .capacity = 256});
  problem.set_tokens({256, 256});
  auto other = problem.device();
  other.kv_heads = 1;
  CHECK(problem.index.build(other, problem.ends.data(), 256, nullptr).code() ==
        ErrorCode::kShapeMismatch);
}

}  // namespace
}  // namespace magicpig::test
