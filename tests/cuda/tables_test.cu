// SPDX-License-Identifier: Apache-2.0
// Hash tables made on the device: the host's codes but for rounding, and its very tables of them.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "magicpig/cuda/bucket_tables.cuh"
#include "table_problem.cuh"

namespace magicpig::test {
namespace {

// Codes, norms and centres of a request's tokens [first, end), of which the first ones up to
// `centred` have made the centres, against what the host computes from the keys.
template <class T>
void check_hashes(const TableProblem<T>& problem, int request, TokenId end, TokenId centred) {
  const DownloadedTables got = problem.downloaded(request);
  const TokenId first = problem.config.first;
  REQUIRE(got.count == end - first);
  SerialExecutor serial;
  const auto backend = make_backend<ScalarOps>(serial);
  KeyHasher<SimHash> hasher(*problem.family);
  const auto source = problem.host(request, end);
  KeyReader<StridedKeyValues<T>> keys(source);
  REQUIRE(hasher.reserve(got.heads, 1));
  REQUIRE(keys.reserve(1, kMeanSlots));
  std::vector<float> centres(got.centres.size());
  hasher.make_centres(backend, keys, {.begin = first, .end = centred}, centres.data());
  CHECK(centres == got.centres);

  int rounded = 0;
  const auto dim = static_cast<std::size_t>(problem.config.dim);
  for (int h = 0; h < got.heads; ++h) {
    CAPTURE(h);
    bool codes_agree = true;
    double worst_norm = 0.0;
    for (int i = 0; i < got.count; ++i) {
      std::vector<float> centred_key(dim);
      double square = 0.0;
      for (std::size_t j = 0; j < dim; ++j) {
        const T x = source.key(h, first + i)[j];
        centred_key[j] = to_float(x) - centres[static_cast<std::size_t>(h) * dim + j];
        square += static_cast<double>(centred_key[j]) * static_cast<double>(centred_key[j]);
      }
      const auto at = static_cast<std::size_t>(h * got.count + i);
      worst_norm = std::max(worst_norm, std::abs(got.norms[at] / std::sqrt(square) - 1.0));
      // Codes of one token lie a row of tokens apart. Some tokens are enough.
      if (i % 7 != 0 && i + 5 < got.count) continue;
      const Code* codes =
          got.codes.data() + std::int64_t{h} * problem.setting.tables * got.count + i;
      codes_agree =
          codes_agree && same_codes(*problem.family, centred_key, codes, got.count, rounded);
    }
    CHECK(codes_agree);
    CHECK(worst_norm < 1e-6);
  }
  CHECK(rounded <= 20);  // of tens of thousands of bits
}

// The tables against those that the host makes of the same codes.
template <class T>
void check_tables(const TableProblem<T>& problem, int request) {
  const DownloadedTables got = problem.downloaded(request);
  const auto expected = problem.host_index(request);
  CHECK(expected->indexed().size() == got.count);
  const int segment_tokens = problem.setting.segment_tokens;
  bool same = true;
  for (int s = 0; s < expected->segment_count(); ++s) {
    for (int h = 0; h < got.heads; ++h) {
      for (int l = 0; l < problem.setting.tables; ++l) {
        const std::uint16_t* edges = got.edges(h, s, l);
        const std::uint16_t* ids = got.table_ids(h, s, l);
        for (int b = 0; b < got.from.buckets; ++b) {
          const auto bucket = expected->segment(s, h).bucket(l, b);
          same =
              same && std::equal(bucket.begin(), bucket.end(), ids + edges[b], ids + edges[b + 1]);
        }
      }
    }
  }
  CHECK(same);
  CHECK(expected->segment_count() == (got.count + segment_tokens - 1) / segment_tokens);
}

TEST_CASE("device: codes of queries are the host's but within rounding of a plane") {
  for (const int dim : {64, 96, 128, 256}) {
    CAPTURE(dim);
    const TableProblem<bf16> problem({.query_heads = 6, .kv_heads = 2, .dim = dim, .capacity = 64},
                                     {.bits = 10, .tables = 70});
    DeviceArray<Code> codes(12 * 70);
    require(cuda::hash_queries(problem.planes, problem.device_queries.data(), 12, codes.data(),
                               nullptr));
    const auto got = codes.get();
    int rounded = 0;
    for (int r = 0; r < 2; ++r) {
      const auto queries = problem.host_queries(r);
      for (int h = 0; h < 6; ++h) {
        const auto at = queries.begin() + h * dim;
        const Code* own = got.data() + (r * 6 + h) * 70;
        CHECK(same_codes(*problem.family, {at, at + dim}, own, 1, rounded));
        CHECK(std::count(own, own + 70, Code{0}) < 10);
      }
    }
    CHECK(rounded <= 4);
  }
}

TEST_CASE("device: tables have the codes, norms and centres of the host") {
  for (const int dim : {64, 96, 128, 256}) {
    CAPTURE(dim);
    TableProblem<bf16> problem({.dim = dim, .capacity = 700}, {});
    problem.set_tokens({700, 300});
    problem.build({640, 133});
    check_hashes(problem, 0, 640, 640);
    check_hashes(problem, 1, 133, 133);
    check_tables(problem, 0);
    check_tables(problem, 1);
  }
}

TEST_CASE("device: tables of float and of fp16 keys") {
  TableProblem<float> wide({.dim = 128, .capacity = 300}, {});
  wide.set_tokens({300, 300});
  wide.build({300, 200});
  check_hashes(wide, 0, 300, 300);
  check_tables(wide, 0);
  TableProblem<fp16> half({.dim = 128, .capacity = 300}, {});
  half.set_tokens({300, 300});
  half.build({300, 200});
  check_hashes(half, 1, 200, 200);
  check_tables(half, 1);
}

TEST_CASE("device: tables of 1 and of 15 bits, of one and of many tables") {
  for (const TableSetting& setting :
       {TableSetting{.bits = 1, .tables = 1}, TableSetting{.bits = 15, .tables = 2},
        TableSetting{.bits = 2, .tables = 150}, TableSetting{.bits = 10, .tables = 33}}) {
    CAPTURE(setting.bits);
    TableProblem<bf16> problem({.requests = 1, .capacity = 600}, setting);
    problem.set_tokens({600});
    problem.build({600});
    check_hashes(problem, 0, 600, 600);
    check_tables(problem, 0);
  }
}

TEST_CASE("device: keys that are hashed in several parts") {
  TableProblem<bf16> problem({.requests = 1, .query_heads = 1, .kv_heads = 1, .capacity = 5000},
                             {.bits = 4, .tables = 3, .segment_tokens = 4992});
  problem.set_tokens({5000});
  problem.build({4900});
  check_hashes(problem, 0, 4900, 4900);
  check_tables(problem, 0);
}

TEST_CASE("device: tables that are appended to and cut hold the tokens that are left") {
  TableProblem<bf16> problem({.requests = 2, .capacity = 1500}, {});
  problem.set_tokens({1500, 1500});
  problem.build({250, 4});
  const auto append = [&](int request, TokenId end, TokenId indexed) {
    require(problem.index->append(problem.device(), request, end, problem.workspace.span(),
                                  problem.blas.get(), nullptr));
    CHECK(problem.index->indexed(request).end == indexed);
  };
  const auto truncate = [&](int request, TokenId end, TokenId indexed) {
    require(problem.index->truncate(request, end, problem.workspace.span(), nullptr));
    CHECK(problem.index->indexed(request).end == indexed);
  };
  const auto check = [&](int request, TokenId end, TokenId centred) {
    check_hashes(problem, request, end, centred);
    check_tables(problem, request);
  };
  append(0, 349, 250);  // not yet a block of 100
  append(0, 350, 350);
  check(0, 350, 250);
  append(0, 1499, 1450);  // from the middle of a segment into another two
  check(0, 1450, 250);
  append(1, 300, 204);  // the first tokens make the centres
  check(1, 204, 204);
  truncate(0, 2000, 1450);
  truncate(0, 1028, 1028);  // to the end of a segment
  check(0, 1028, 250);
  truncate(0, 700, 700);
  check(0, 700, 250);
  append(0, 1400, 1400);
  check(0, 1400, 250);
  truncate(0, 0, 4);
  CHECK(problem.downloaded(0).count == 0);
  append(0, 104, 104);
  check(0, 104, 104);
  check(1, 204, 204);  // nobody has touched it
  require(problem.index->clear(nullptr));
  CHECK(problem.index->indexed(1).end == 4);
  CHECK(problem.downloaded(1).count == 0);
}

TEST_CASE("device: tokens beyond the capacity of tables stay exact") {
  TableProblem<bf16> problem({.requests = 1, .capacity = 600, .first = 40}, {});
  auto small = cuda::BucketTables::create(
      problem.planes, {.kv_heads = 2, .capacity = 300, .first = 40, .segment_tokens = 128},
      problem.memory.span(), nullptr);
  require(small.status());
  problem.set_tokens({600});
  require(small->build(problem.device(), 0, 600, problem.workspace.span(), problem.blas.get(),
                       nullptr));
  CHECK(small->indexed(0).end == 340);
  CHECK(DownloadedTables(small->view(), 0).count == 300);
  require(small->append(problem.device(), 0, 600, problem.workspace.span(), problem.blas.get(),
                        nullptr));
  CHECK(small->indexed(0).end == 340);
}

TEST_CASE("device: rebuilding is no different from building") {
  TableProblem<bf16> problem({.requests = 1, .capacity = 1000}, {});
  problem.set_tokens({1000});
  problem.build({900});
  const auto before = problem.downloaded(0);
  require(problem.index->append(problem.device(), 0, 1000, problem.workspace.span(),
                                problem.blas.get(), nullptr));
  problem.build({900});
  const auto after = problem.downloaded(0);
  CHECK(before.codes == after.codes);
  CHECK(before.norms == after.norms);
  CHECK(before.centres == after.centres);
}

TEST_CASE("device: tables refuse what they cannot do, and keep what they have") {
  TableProblem<bf16> problem({.requests = 1, .capacity = 500}, {});
  problem.set_tokens({500});
  problem.build({200});
  const auto before = problem.downloaded(0).codes;
  const auto refused = [&](const Status& status, ErrorCode code) {
    CHECK(status.code() == code);
    CHECK(problem.index->indexed(0).end == 200);
    CHECK(problem.downloaded(0).codes == before);
  };
  const auto append = [&](const cuda::KeyValues<bf16>& from, int request, TokenId end,
                          std::size_t workspace) {
    return problem.index->append(from, request, end, problem.workspace.span().first(workspace),
                                 problem.blas.get(), nullptr);
  };
  const std::size_t enough = problem.workspace.span().size();
  refused(append(problem.device(), 1, 400, enough), ErrorCode::kInvalidArgument);
  refused(append(problem.device(), -1, 400, enough), ErrorCode::kInvalidArgument);
  refused(append(problem.device(), 0, 400, enough - 1), ErrorCode::kWorkspaceTooSmall);
  cuda::KeyValues<bf16> wrong = problem.device();
  wrong.kv_heads = 1;
  refused(append(wrong, 0, 400, enough), ErrorCode::kShapeMismatch);
  wrong = problem.device();
  wrong.keys = nullptr;
  refused(append(wrong, 0, 400, enough), ErrorCode::kInvalidArgument);
  refused(problem.index->truncate(1, 100, problem.workspace.span(), nullptr),
          ErrorCode::kInvalidArgument);
  refused(problem.index->truncate(0, -1, problem.workspace.span(), nullptr),
          ErrorCode::kInvalidArgument);
  refused(problem.index->truncate(0, 100, {}, nullptr), ErrorCode::kWorkspaceTooSmall);
  const Status no_blas =
      problem.index->append(problem.device(), 0, 400, problem.workspace.span(), nullptr, nullptr);
  CHECK(no_blas.code() == ErrorCode::kDevice);
  CHECK(problem.index->indexed(0).end == 200);
}

}  // namespace
}  // namespace magicpig::test
