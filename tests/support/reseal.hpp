// SPDX-License-Identifier: Apache-2.0
// Blobs that were tampered with by someone who knows how to compute a checksum.
#pragma once

#include <cstddef>
#include <cstring>
#include <span>

#include "magicpig/core/blob.hpp"

namespace magicpig::test {

/// Makes the header of `bytes`, at least a header long, right again.
inline void reseal(std::span<std::byte> bytes) {
  BlobHeader header;
  std::memcpy(&header, bytes.data(), sizeof header);
  Checksum sum;
  sum.add(bytes.subspan(sizeof header));
  header.bytes = bytes.size();
  header.checksum = sum.value();
  std::memcpy(bytes.data(), &header, sizeof header);
}

}  // namespace magicpig::test
