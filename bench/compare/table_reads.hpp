// SPDX-License-Identifier: Apache-2.0
// Bytes that lookups in bucket tables read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "compare/trial.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/hash/hamming_ball.hpp"

namespace magicpig::bench {

/// What looking up the queries of one KV head reads: two offsets and the ids of each bucket within
/// `radius` flips, once for all heads of the group. `kv_head` is the number in `index`.
template <class Family>
[[nodiscard]] double lookup_bytes(const BucketTables<Family>& index, int kv_head,
                                  const QueryGroup& queries, int radius) {
  const Family& family = index.family();
  const auto tables = static_cast<std::size_t>(family.tables());
  const HammingBall ball = HammingBall::create(family.bits(), radius).value();
  std::vector<Code> codes(static_cast<std::size_t>(queries.count) * tables);
  std::vector<float> scratch(family.scratch_floats(queries.count));
  family.template hash<Ops>(queries.data, queries.count, codes.data(), scratch.data());
  std::set<std::pair<std::size_t, int>> buckets;  // table and code
  for (std::size_t i = 0; i < codes.size(); ++i) {
    for (const Code mask : ball.masks()) buckets.insert({i % tables, codes[i] ^ mask});
  }
  std::size_t bytes = 0;
  for (int s = 0; s < index.segment_count(); ++s) {
    for (const auto& [table, code] : buckets) {
      bytes += 2 * sizeof(std::uint16_t) +
               index.segment(s, kv_head).bucket(static_cast<int>(table), code).size_bytes();
    }
  }
  return static_cast<double>(bytes);
}

/// The queries of one KV head in a row of a capture.
[[nodiscard]] inline QueryGroup queries_of(const Capture& capture, int row, int kv_head) {
  const Shape& shape = capture.shape();
  return {
      .data = capture.query(row).data() + std::int64_t{kv_head} * shape.group() * shape.head_dim,
      .count = shape.group(),
      .dim = shape.head_dim};
}

/// What looking up all query rows reads in tables of all KV heads, and the norm of each candidate.
template <class Family>
[[nodiscard]] IndexReads table_reads(int radius, const BucketTables<Family>& index,
                                     const Workbench& bench) {
  IndexReads reads{.bytes_per_row = sizeof(float)};
  for (const int row : bench.rows()) {
    for (int h = 0; h < index.kv_heads(); ++h) {
      reads.lookups.push_back(lookup_bytes(index, h, queries_of(bench.capture(), row, h), radius));
    }
  }
  return reads;
}

}  // namespace magicpig::bench
