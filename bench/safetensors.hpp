// SPDX-License-Identifier: Apache-2.0
// Reader of safetensors containers: 8 bytes of header length, a JSON header, and the tensors'
// bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "magicpig/core/error.hpp"
#include "safetensors_tensor.hpp"

namespace magicpig::bench {

/// The tensors of a container in the order of their bytes, and the strings of its metadata.
struct Container {
  std::vector<Tensor> tensors;
  std::vector<std::pair<std::string, std::string>> metadata;

  [[nodiscard]] const Tensor* find(const char* name) const {
    for (const Tensor& tensor : tensors) {
      if (tensor.name == name) return &tensor;
    }
    return nullptr;
  }
};

/// Longest header that the format allows.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;

/// Parses one container. Nothing of the header is believed: every error names the field at fault.
class SafetensorsParser {
 public:
  explicit SafetensorsParser(std::span<const std::byte> file) : file_(file) {}

  /// The tensors refer to the file's memory.
  [[nodiscard]] Result<Container> parse() {
    Status status = split();
    nlohmann::json header;
    if (status.ok()) status = parse_header(header);
    if (status.ok()) status = read_entries(header);
    if (status.ok()) status = place_tensors();
    if (!status.ok()) return status;
    return std::move(container_);
  }

 private:
  using Json = nlohmann::json;

  // Splits the file into header_ and data_.
  Status split() {
    constexpr std::size_t kLengthBytes = 8;
    if (file_.size() < kLengthBytes) {
      return Status::error(kMalformed,
                           "header length: the file has %zu bytes, fewer than the 8 of that field",
                           file_.size());
    }
    std::uint64_t length = 0;
    for (std::size_t i = kLengthBytes; i-- > 0;) {
      length = length << 8 | std::to_integer<std::uint64_t>(file_[i]);
    }
    const std::uint64_t rest = file_.size() - kLengthBytes;
    if (length > kMaxHeaderBytes || length > rest) {
      return Status::error(
          kMalformed, "header length: %llu bytes, but the format allows %llu and the file has %llu",
          printable(length), printable(kMaxHeaderBytes), printable(rest));
    }
    header_ = file_.subspan(kLengthBytes, static_cast<std::size_t>(length));
    data_ = file_.subspan(kLengthBytes + static_cast<std::size_t>(length));
    return Status();
  }

  // JSON lets names repeat and nests without bound; a header does neither.
  Status parse_header(Json& header) {
    constexpr int kMaxDepth = 3;
    std::vector<std::set<std::string>> names;
    std::string repeated;
    bool too_deep = false;
    const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
      too_deep = too_deep || depth > kMaxDepth;
      if (event == Json::parse_event_t::object_start) names.emplace_back();
      if (event == Json::parse_event_t::object_end) names.pop_back();
      if (event == Json::parse_event_t::key && !too_deep) {
        const std::string& name = parsed.get_ref<const std::string&>();
        if (!names.back().insert(name).second && repeated.empty()) repeated = name;
      }
      return !too_deep;
    };
    const auto* text = reinterpret_cast<const char*>(header_.data());
    header = Json::parse(text, text + header_.size(), check, false);
    if (too_deep)
      return Status::error(kMalformed, "header: nested deeper than %d levels", kMaxDepth);
    if (header.is_discarded()) return Status::error(kMalformed, "header: not valid JSON");
    if (!header.is_object()) return Status::error(kMalformed, "header: not a JSON object");
    if (!repeated.empty())
      return Status::error(kMalformed, "%.60s: occurs twice in the header", repeated.c_str());
    return Status();
  }

  Status read_entries(const Json& header) {
    for (const auto& [name, entry] : header.items()) {
      Status status = name == "__metadata__" ? read_metadata(entry) : Status();
      if (name != "__metadata__") {
        Result<Tensor> tensor = parse_tensor_entry(name, entry);
        status = tensor.status();
        if (tensor.ok()) container_.tensors.push_back(std::move(*tensor));
      }
      if (!status.ok()) return status;
    }
    return Status();
  }

  Status read_metadata(const Json& entry) {
    if (!entry.is_object()) return Status::error(kMalformed, "__metadata__: not an object");
    for (const auto& [name, value] : entry.items()) {
      if (!value.is_string())
        return Status::error(kMalformed, "__metadata__.%.60s: not a string", name.c_str());
      container_.metadata.emplace_back(name, value.get_ref<const std::string&>());
    }
    return Status();
  }

  // The tensors cover the data from its first byte to its last, once.
  Status place_tensors() {
    std::vector<Tensor>& tensors = container_.tensors;
    std::sort(tensors.begin(), tensors.end(), [](const Tensor& a, const Tensor& b) {
      return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    std::uint64_t place = 0;
    for (Tensor& tensor : tensors) {
      const char* name = tensor.name.c_str();
      if (tensor.end > data_.size()) {
        return Status::error(kMalformed,
                             "%.60s.data_offsets: end at %llu, the data have %llu bytes", name,
                             printable(tensor.end), printable(data_.size()));
      }
      if (tensor.begin != place) {
        return Status::error(
            kMalformed,
            "%.60s.data_offsets: begin at %llu, %s the tensor before them, which ends at "
            "%llu",
            name, printable(tensor.begin),
            tensor.begin < place ? "overlapping" : "leaving a hole behind", printable(place));
      }
      tensor.bytes = data_.subspan(static_cast<std::size_t>(tensor.begin),
                                   static_cast<std::size_t>(tensor.end - tensor.begin));
      place = tensor.end;
    }
    if (place != data_.size()) {
      return Status::error(kMalformed, "data: %llu bytes follow the last tensor",
                           printable(data_.size() - place));
    }
    return Status();
  }

  std::span<const std::byte> file_;
  std::span<const std::byte> header_;
  std::span<const std::byte> data_;
  Container container_;
};

/// All bytes of a file. Error: one that cannot be opened or read, with its path.
[[nodiscard]] inline Status read_file(const std::string& path, std::vector<std::byte>& bytes) {
  const auto failed = [&path](const char* what) {
    return Status::error(ErrorCode::kInvalidArgument, "%.120s: %s", path.c_str(), what);
  };
  const auto close = [](std::FILE* file) { (void)std::fclose(file); };
  const std::unique_ptr<std::FILE, decltype(close)> file(std::fopen(path.c_str(), "rb"), close);
  if (file == nullptr) return failed("cannot be opened");
  constexpr std::size_t kChunk = std::size_t{1} << 20;
  std::size_t got = kChunk;
  while (got == kChunk) {
    const std::size_t at = bytes.size();
    bytes.resize(at + kChunk);
    got = std::fread(bytes.data() + at, 1, kChunk, file.get());
    bytes.resize(at + got);
  }
  return std::ferror(file.get()) != 0 ? failed("cannot be read") : Status();
}

/// The container in `file`, whose memory its tensors refer to. Errors name the field at fault.
[[nodiscard]] inline Result<Container> parse_safetensors(std::span<const std::byte> file) {
  return SafetensorsParser(file).parse();
}

}  // namespace magicpig::bench
