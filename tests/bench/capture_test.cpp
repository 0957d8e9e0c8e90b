// SPDX-License-Identifier: Apache-2.0
// The capture reader on valid files of each type and on every way in which a header can lie.
#include "capture.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

namespace {

using magicpig::ErrorCode;
using magicpig::Result;
using magicpig::bench::Capture;
using Json = nlohmann::ordered_json;

constexpr int kQueryHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kRows = 3;
constexpr int kTokens = 5;
constexpr int kHeadDim = 6;
constexpr int kValueDim = 7;
constexpr int kQueryValues = kQueryHeads * kRows * kHeadDim;
constexpr int kKeyValues = kKvHeads * kTokens * kHeadDim;
constexpr int kValueValues = kKvHeads * kTokens * kValueDim;

// Value i of the file: a multiple of 1/8 below 32, which all three types hold exactly.
float value_at(int i) { return static_cast<float>(i % 256 - 128) / 8.0F; }

void append(std::string& bytes, const void* data, std::size_t size) {
  bytes.append(static_cast<const char*>(data), size);
}

std::string as_bytes(const std::string& dtype, float value) {
  std::string bytes;
  if (dtype == "F32") {
    append(bytes, &value, sizeof value);
  } else if (dtype == "F16") {
    const auto half = magicpig::to_fp16(value);
    append(bytes, &half.bits, sizeof half.bits);
  } else {
    const auto brain = magicpig::to_bf16(value);
    append(bytes, &brain.bits, sizeof brain.bits);
  }
  return bytes;
}

// A valid header and its data, for tests to spoil.
struct File {
  explicit File(const std::string& dtype = "F16") {
    const std::size_t scalar = dtype == "F32" ? 4 : 2;
    const auto add = [&](const char* name, std::vector<int> shape) {
      const std::size_t begin = data.size();
      const int count = shape[0] * shape[1] * shape[2];
      for (int i = 0; i < count; ++i) {
        data += as_bytes(dtype, value_at(static_cast<int>(begin / scalar) + i));
      }
      header[name] = {{"dtype", dtype}, {"shape", shape}, {"data_offsets", {begin, data.size()}}};
    };
    add("q", {kQueryHeads, kRows, kHeadDim});
    add("k", {kKvHeads, kTokens, kHeadDim});
    add("v", {kKvHeads, kTokens, kValueDim});
  }

  [[nodiscard]] std::string bytes() const { return with_text(header.dump()); }

  [[nodiscard]] std::string with_text(const std::string& text) const {
    std::string file;
    for (int i = 0; i < 8; ++i) {
      file += static_cast<char>((std::uint64_t{text.size()} >> (8 * i)) & 0xffU);
    }
    return file + text + data;
  }

  Json header;
  std::string data;
};

Result<Capture> parse(const std::string& bytes) {
  return Capture::parse(std::as_bytes(std::span(bytes)));
}

// The message of the error that `bytes` must give.
std::string refusal(const std::string& bytes) {
  const Result<Capture> capture = parse(bytes);
  REQUIRE_FALSE(capture.ok());
  return capture.status().message();
}

bool begins(const std::string& text, const std::string& start) { return text.rfind(start, 0) == 0; }

// The file's value that the reader must give for head, row and dimension.
float expected(int first, int index) { return value_at(first + index); }

}  // namespace

TEST_SUITE("Capture") {
  TEST_CASE("reads every value of files in each of the three types") {
    for (const char* dtype : {"F16", "BF16", "F32"}) {
      CAPTURE(dtype);
      const Result<Capture> capture = parse(File(dtype).bytes());
      REQUIRE(capture.ok());
      CHECK(capture->shape() == magicpig::Shape{.query_heads = kQueryHeads,
                                                .kv_heads = kKvHeads,
                                                .head_dim = kHeadDim,
                                                .value_dim = kValueDim});
      CHECK(capture->tokens() == kTokens);
      CHECK(capture->query_rows() == kRows);
      CHECK(capture->visible(0) == kTokens - kRows + 1);
      CHECK(capture->visible(kRows - 1) == kTokens);
      for (int i = 0; i < kQueryValues; ++i) {
        const int head = i / (kRows * kHeadDim);
        const int at = head * kHeadDim + i % kHeadDim;
        CHECK(capture->query(i / kHeadDim % kRows)[static_cast<std::size_t>(at)] == expected(0, i));
      }
      capture->with_key_values([&](const auto& source) {
        for (int i = 0; i < kKeyValues; ++i) {
          const auto* key = source.key(i / (kTokens * kHeadDim), i / kHeadDim % kTokens);
          CHECK(magicpig::to_float(key[i % kHeadDim]) == expected(kQueryValues, i));
        }
        for (int i = 0; i < kValueValues; ++i) {
          const auto* value = source.value(i / (kTokens * kValueDim), i / kValueDim % kTokens);
          CHECK(magicpig::to_float(value[i % kValueDim]) == expected(kQueryValues + kKeyValues, i));
        }
      });
    }
  }

  TEST_CASE("forgets a range of tokens and keeps the others as they were") {
    Result<Capture> capture = parse(File().bytes());
    const Result<Capture> whole = parse(File().bytes());
    REQUIRE(capture.ok());
    const magicpig::TokenRange range{0, 2};
    capture->forget(range);
    CHECK(capture->tokens() == kTokens - 2);
    CHECK(capture->visible(0) == whole->visible(0) - 2);
    CHECK(capture->query(0)[0] == whole->query(0)[0]);
    capture->with_key_values([&](const auto& kept) {
      CHECK(kept.tokens() == kTokens - 2);
      whole->with_key_values([&](const auto& all) {
        for (int h = 0; h < kKvHeads; ++h) {
          for (int t = 0; t < kTokens - 2; ++t) {
            const int from = t < range.begin ? t : t + 2;
            for (int j = 0; j < kHeadDim; ++j) {
              CHECK(magicpig::to_float(kept.key(h, t)[j]) ==
                    magicpig::to_float(all.key(h, from)[j]));
            }
            for (int j = 0; j < kValueDim; ++j) {
              CHECK(magicpig::to_float(kept.value(h, t)[j]) ==
                    magicpig::to_float(all.value(h, from)[j]));
            }
          }
        }
      });
    });
  }

  TEST_CASE("takes keys and values of different types") {
    File file("F16");
    const File wide("F32");
    file.data.resize(static_cast<std::size_t>(2 * (kQueryValues + kKeyValues)));
    file.data += wide.data.substr(static_cast<std::size_t>(4 * (kQueryValues + kKeyValues)));
    file.header["v"]["dtype"] = "F32";
    file.header["v"]["data_offsets"][1] = file.data.size();
    const Result<Capture> capture = parse(file.bytes());
    REQUIRE(capture.ok());
    capture->with_key_values([&](const auto& source) {
      CHECK(magicpig::to_float(source.key(1, 2)[3]) ==
            expected(kQueryValues, (kTokens + 2) * kHeadDim + 3));
      CHECK(magicpig::to_float(source.value(1, 2)[3]) ==
            expected(kQueryValues + kKeyValues, (kTokens + 2) * kValueDim + 3));
    });
  }

  TEST_CASE("reads data at odd addresses, other tensors, and padding of the header") {
    File file;
    const std::string padding(3, ' ');
    REQUIRE(parse(file.with_text(file.header.dump() + padding)).ok());
    file.header["extra"] = {{"dtype", "F32"},
                            {"shape", Json::array()},
                            {"data_offsets", {file.data.size(), file.data.size() + 4}}};
    file.data += std::string(4, '\0');
    CHECK(parse(file.bytes()).ok());
  }

  TEST_CASE("takes the scale from the metadata, or 1 / sqrt(head_dim)") {
    File file;
    CHECK(parse(file.bytes())->scale() == doctest::Approx(0.4082483));
    file.header["__metadata__"] = {{"scale", "0.25"}, {"model", "any"}};
    CHECK(parse(file.bytes())->scale() == 0.25F);
    for (const char* bad : {"", "0", "-1", "inf", "nan", "0.5x", "1e99"}) {
      CAPTURE(bad);
      file.header["__metadata__"]["scale"] = bad;
      CHECK(begins(refusal(file.bytes()), "__metadata__.scale: "));
    }
  }

  TEST_CASE("names the header's length when it is truncated, beyond the file or above the cap") {
    const std::string whole = File().bytes();
    for (std::size_t size = 0; size < 8; ++size) {
      CHECK(begins(refusal(whole.substr(0, size)), "header length: "));
    }
    for (const std::uint64_t length :
         {std::uint64_t{whole.size()} - 7, std::uint64_t{100'000'001}, UINT64_MAX}) {
      std::string file = whole;
      std::memcpy(file.data(), &length, sizeof length);
      CHECK(begins(refusal(file), "header length: "));
    }
  }

  TEST_CASE("refuses every truncation of a file") {
    const std::string whole = File().bytes();
    for (std::size_t size = 0; size < whole.size(); ++size) {
      CHECK_FALSE(parse(whole.substr(0, size)).ok());
    }
  }

  TEST_CASE("names the header when it is not a JSON object") {
    const File file;
    for (const char* text : {"", "{", "[]", "1", "null", "{} {}", "{\"q\":1e400}", "\xff"}) {
      CAPTURE(text);
      CHECK(begins(refusal(file.with_text(text)), "header: "));
    }
    CHECK(begins(refusal(file.with_text("{\"q\":" + std::string(100'000, '['))), "header: nested"));
  }

  TEST_CASE("names a tensor or a field that occurs twice") {
    const File file;
    std::string text = file.header.dump();
    text.insert(1, "\"k\":" + file.header["k"].dump() + ",");
    CHECK(refusal(file.with_text(text)) == "k: occurs twice in the header");
    text = file.header.dump();
    text.insert(text.find("\"shape\""), "\"shape\":[1],");
    CHECK(refusal(file.with_text(text)) == "shape: occurs twice in the header");
  }

  TEST_CASE("names a tensor that is missing or is no object, and fields that it cannot have") {
    for (const char* name : {"q", "k", "v"}) {
      File file;
      file.header["other"] = file.header[name];
      file.header.erase(name);
      CHECK(refusal(file.bytes()) == std::string(name) + ": no such tensor in the header");
      file.header[name] = 3;
      CHECK(refusal(file.bytes()) == std::string(name) + ": not an object");
      file = File();
      file.header[name]["strides"] = {1, 1, 1};
      CHECK(refusal(file.bytes()) == std::string(name) + ".strides: unknown field");
    }
    File file;
    file.header["__metadata__"] = 3;
    CHECK(refusal(file.bytes()) == "__metadata__: not an object");
    file.header["__metadata__"] = {{"layer", 3}};
    CHECK(refusal(file.bytes()) == "__metadata__.layer: not a string");
  }

  TEST_CASE("names a dtype that is none of the three") {
    for (const Json& dtype : {Json("F64"), Json("I8"), Json("f16"), Json(16), Json()}) {
      File file;
      file.header["k"]["dtype"] = dtype;
      CHECK(begins(refusal(file.bytes()), "k.dtype: "));
    }
    File file;
    file.header["k"].erase("dtype");
    CHECK(begins(refusal(file.bytes()), "k.dtype: "));
  }

  TEST_CASE("names a shape that is not three whole numbers, overflows, or is another size") {
    const std::uint64_t huge = std::uint64_t{1} << 62;
    const std::vector<std::pair<Json, const char*>> cases{
        {Json(), "k.shape: "},
        {Json(60), "k.shape: "},
        {Json::array({2, -5, 6}), "k.shape[1]: "},
        {Json::array({2, 5.0, 6}), "k.shape[1]: "},
        {Json::array({2, "5", 6}), "k.shape[1]: "},
        {Json::array({2, 1e30, 6}), "k.shape[1]: "},
        {Json::array({2, 5, huge}), "k.shape: its bytes overflow"},
        {Json::array({huge, huge, huge}), "k.shape: its bytes overflow"},
        {Json::array({2, 5, 7}), "k.data_offsets: hold 120 bytes, its shape and dtype need 140"},
        {Json::array({0, huge, huge}), "k.data_offsets: hold 120 bytes"},
        {Json::array({2, 30}), "k.shape: must have 3 dimensions"},
        {Json::array({2, 5, 3, 2}), "k.shape: must have 3 dimensions"}};
    for (const auto& [shape, start] : cases) {
      const std::string text = shape.dump();
      CAPTURE(text);
      File file;
      file.header["k"]["shape"] = shape;
      const std::string message = refusal(file.bytes());
      CAPTURE(message);
      CHECK(begins(message, start));
    }
  }

  TEST_CASE("names offsets that are no pair of whole numbers, or run backwards") {
    for (const char* offsets : {"null", "[0]", "[0,1,2]", "[-1,120]", "[0.5,1]", "[\"0\",\"1\"]",
                                "[144,24]", "[0,18446744073709551616]"}) {
      CAPTURE(offsets);
      File file;
      file.header["k"]["data_offsets"] = Json::parse(offsets);
      CHECK(begins(refusal(file.bytes()), "k.data_offsets: "));
    }
  }

  TEST_CASE("names tensors that overlap, leave holes, or end beyond the data or before their end") {
    File overlap;
    overlap.header["k"]["data_offsets"] = {142, 262};
    CHECK(begins(refusal(overlap.bytes()), "k.data_offsets: begin at 142, overlapping"));
    File same;
    same.header["k"] = same.header["v"];
    CHECK(begins(refusal(same.bytes()), "k.data_offsets: begin at 264, leaving a hole"));
    File hole;
    hole.data += "hole";
    hole.header["v"]["data_offsets"] = {268, 408};
    CHECK(begins(refusal(hole.bytes()), "v.data_offsets: begin at 268, leaving a hole"));
    File beyond;
    beyond.data.pop_back();
    CHECK(begins(refusal(beyond.bytes()), "v.data_offsets: end at 404, the data have 403 bytes"));
    File trailing;
    trailing.data += '\0';
    CHECK(refusal(trailing.bytes()) == "data: 1 bytes follow the last tensor");
  }

  TEST_CASE("names the tensor whose dimensions disagree with the others") {
    // Shapes of the same sizes as the data, so that only their meaning is at fault.
    const std::vector<std::pair<Json, std::string>> cases{
        {{{"q", {4, 2, 9}}}, "q.shape: its head_dim"},
        {{{"q", {3, 4, 6}}}, "q.shape: its heads are no multiple"},
        {{{"q", {2, 6, 6}}}, "q.shape: it has more rows"},
        {{{"v", {7, 5, 2}}}, "v.shape: its KV heads"},
        {{{"v", {2, 7, 5}}}, "v.shape: its tokens"}};
    for (const auto& [shapes, start] : cases) {
      const std::string& expected = start;
      CAPTURE(expected);
      File file;
      for (const auto& [name, shape] : shapes.items()) file.header[name]["shape"] = shape;
      CHECK(begins(refusal(file.bytes()), start));
    }
  }

  TEST_CASE("names tensors that are empty or larger than the library allows") {
    const auto with = [](Json q, Json k, Json v) {
      File file;
      file.data.clear();
      for (const auto& [name, shape] : {std::pair{"q", q}, std::pair{"k", k}, std::pair{"v", v}}) {
        const std::size_t begin = file.data.size();
        std::size_t count = 2;
        for (const Json& size : shape) count *= size.get<std::size_t>();
        file.data.resize(begin + count, '\0');
        file.header[name] = {
            {"dtype", "F16"}, {"shape", shape}, {"data_offsets", {begin, begin + count}}};
      }
      return file.bytes();
    };
    CHECK(parse(with({32, 1, 1}, {1, 1, 1}, {1, 1, 1})).ok());
    CHECK(begins(refusal(with({33, 1, 1}, {1, 1, 1}, {1, 1, 1})), "q.shape: it has more than 32"));
    CHECK(begins(refusal(with({1, 0, 1}, {1, 1, 1}, {1, 1, 1})), "q.shape: every dimension"));
    CHECK(begins(refusal(with({1, 1, 1}, {1, 0, 1}, {1, 1, 1})), "k.shape: every dimension"));
    CHECK(begins(refusal(with({1, 1, 1}, {1, 1, 1}, {1, 1, 0})), "v.shape: every dimension"));
    CHECK(begins(refusal(with({1, 1, 16385}, {1, 1, 16385}, {1, 1, 1})), "k.shape: its head_dim"));
    CHECK(begins(refusal(with({1, 1, 1}, {1, 1, 1}, {1, 1, 16385})), "v.shape: its value_dim"));
  }

  TEST_CASE("names the tensor that holds a value which is not finite") {
    for (const char* name : {"q", "k", "v"}) {
      for (const unsigned bits : {0x7c00U, 0xfc00U, 0x7e01U}) {  // inf, -inf, NaN
        File file;
        const auto end = file.header[name]["data_offsets"][1].get<std::size_t>();
        file.data[end - 2] = static_cast<char>(bits & 0xffU);
        file.data[end - 1] = static_cast<char>(bits >> 8);
        const Result<Capture> capture = parse(file.bytes());
        REQUIRE_FALSE(capture.ok());
        CHECK(capture.status().code() == ErrorCode::kNonFinite);
        CHECK(begins(capture.status().message(), std::string(name) + ": value "));
      }
    }
  }

  TEST_CASE("reads files, and names the file that it cannot read") {
    const Result<Capture> missing = Capture::read("no-such-capture.safetensors");
    REQUIRE_FALSE(missing.ok());
    CHECK(std::string(missing.status().message()) ==
          "no-such-capture.safetensors: cannot be opened");
    const Result<Capture> folder = Capture::read(MAGICPIG_TEST_DIR);
    REQUIRE_FALSE(folder.ok());
    CHECK(std::string(folder.status().message()).find("cannot be read") != std::string::npos);
    const std::string path = "capture_test.safetensors";
    std::ofstream(path, std::ios::binary) << File().bytes();
    CHECK(Capture::read(path).ok());
    std::ofstream(path, std::ios::binary) << File().bytes().substr(1);
    const Result<Capture> spoilt = Capture::read(path);
    REQUIRE_FALSE(spoilt.ok());
    CHECK(begins(spoilt.status().message(), path + ": header length: "));
    (void)std::remove(path.c_str());
  }

  TEST_CASE("reads the captures that are shipped") {
    int captures = 0;
    for (const auto& entry : std::filesystem::directory_iterator(MAGICPIG_TEST_DATA_DIR)) {
      if (entry.path().extension() != ".safetensors") continue;
      ++captures;
      const Result<Capture> capture = Capture::read(entry.path().string());
      CAPTURE(entry.path().string());
      REQUIRE_MESSAGE(capture.ok(), capture.status().message());
      CHECK(capture->shape().query_heads >= capture->shape().kv_heads);
      CHECK(capture->tokens() > 1000);
      CHECK(capture->query_rows() >= 16);
    }
    CHECK(captures > 0);
  }
}
