// SPDX-License-Identifier: Apache-2.0
// Fuzz target: any bytes are either refused with a message or are a capture that can be read
// through.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>

#include "capture.hpp"

namespace {

using magicpig::to_float;

void require(bool condition) {
  if (!condition) std::abort();
}

void read_through(const magicpig::bench::Capture& capture) {
  const magicpig::Shape& shape = capture.shape();
  require(shape.query_heads % shape.kv_heads == 0);
  require(capture.query_rows() >= 1 && capture.visible(0) >= 1);
  require(capture.visible(capture.query_rows() - 1) == capture.tokens());
  for (int row = 0; row < capture.query_rows(); ++row) {
    for (const float x : capture.query(row)) require(std::isfinite(x));
  }
  capture.with_key_values([&](const auto& key_values) {
    for (int head = 0; head < shape.kv_heads; ++head) {
      for (magicpig::TokenId token = 0; token < capture.tokens(); ++token) {
        for (int j = 0; j < shape.head_dim; ++j) {
          require(std::isfinite(to_float(key_values.key(head, token)[j])));
        }
        for (int j = 0; j < shape.value_dim; ++j) {
          require(std::isfinite(to_float(key_values.value(head, token)[j])));
        }
      }
    }
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto capture = magicpig::bench::Capture::parse(std::as_bytes(std::span(data, size)));
  if (capture.ok()) {
    read_through(*capture);
  } else {
    require(std::strlen(capture.status().message()) > 0);
  }
  return 0;
}
