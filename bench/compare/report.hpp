// SPDX-License-Identifier: Apache-2.0
// Results as a table for reading and as JSON for programs.
#pragma once

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "compare/measure.hpp"
#include "magicpig/core/error.hpp"

namespace magicpig::bench {

inline void print_heading() {
  std::printf("  %-18s %-29s %7s %8s %8s %8s %8s %8s %9s %9s\n", "method", "setting", "rows",
              "index", "bytes", "error", "error", "error", "lse error", "time");
  std::printf("  %-18s %-29s %7s %8s %8s %8s %8s %8s %9s %9s\n", "", "", "%", "B/token", "read",
              "mean", "median", "p95", "mean", "us");
}

inline void print_row(const ResultRow& row) {
  std::printf("  %-18s %-29s %7.2f %8.1f %8.2f %8.4f %8.4f %8.4f %9.4f %9.1f\n", row.method.c_str(),
              row.setting.c_str(), 100.0 * row.rows, row.index_bytes_per_token,
              row.bytes_read_per_token, row.error_mean, row.error_median, row.error_p95,
              row.lse_error_mean, row.us_per_kv_head);
}

/// The results of one capture, or of all of them, under a title.
inline void print_block(const std::string& title, std::span<const ResultRow> rows) {
  std::printf("%s\n", title.c_str());
  print_heading();
  for (const ResultRow& row : rows) print_row(row);
  std::printf("\n");
  (void)std::fflush(stdout);
}

/// The mean over captures of every figure, by method and setting, in the order of the first.
[[nodiscard]] inline std::vector<ResultRow> mean_over_captures(std::span<const ResultRow> rows) {
  std::vector<ResultRow> means;
  for (const ResultRow& first : rows) {
    if (first.capture != rows.front().capture) break;
    ResultRow sum{.capture = "mean", .method = first.method, .setting = first.setting};
    double count = 0.0;
    for (const ResultRow& row : rows) {
      if (row.method == first.method && row.setting == first.setting) count += 1.0;
    }
    for (const ResultRow& row : rows) {
      if (row.method != first.method || row.setting != first.setting) continue;
      for (double ResultRow::*figure :
           {&ResultRow::rows, &ResultRow::index_bytes_per_token, &ResultRow::bytes_read_per_token,
            &ResultRow::error_mean, &ResultRow::bias_mean, &ResultRow::error_median,
            &ResultRow::error_p95, &ResultRow::lse_error_mean, &ResultRow::us_per_kv_head}) {
        sum.*figure += row.*figure / count;
      }
    }
    means.push_back(sum);
  }
  return means;
}

/// {"results": [...]} with one entry per capture, method and setting, and what they were run with.
[[nodiscard]] inline std::string to_json(std::span<const ResultRow> rows,
                                         const nlohmann::ordered_json& parameters) {
  nlohmann::ordered_json results = nlohmann::ordered_json::array();
  for (const ResultRow& row : rows) {
    results.push_back({{"capture", row.capture},
                       {"method", row.method},
                       {"setting", row.setting},
                       {"rows", row.rows},
                       {"index_bytes_per_token", row.index_bytes_per_token},
                       {"bytes_read_per_token", row.bytes_read_per_token},
                       {"error_mean", row.error_mean},
                       {"bias_mean", row.bias_mean},
                       {"error_median", row.error_median},
                       {"error_p95", row.error_p95},
                       {"lse_error_mean", row.lse_error_mean},
                       {"us_per_kv_head", row.us_per_kv_head},
                       {"error_by_seed", row.error_by_seed},
                       {"error_by_kv_head", row.error_by_kv_head}});
  }
  const nlohmann::ordered_json all{{"results", results}, {"parameters", parameters}};
  return all.dump(1) + "\n";
}

/// Error: a file that cannot be written.
[[nodiscard]] inline Status write_file(const std::string& path, const std::string& text) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  const bool written =
      file != nullptr && std::fwrite(text.data(), 1, text.size(), file) == text.size();
  const bool closed = file != nullptr && std::fclose(file) == 0;
  if (written && closed) return Status();
  return Status::error(ErrorCode::kInvalidArgument, "%.200s: cannot be written", path.c_str());
}

}  // namespace magicpig::bench
