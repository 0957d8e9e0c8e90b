// SPDX-License-Identifier: Apache-2.0
// Huge pages for the arrays of an index, where the system has them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Asks for huge pages under the whole pages of an array; a MemoryAdvice. On Linux this is
/// madvise(MADV_HUGEPAGE), with effect where /sys/kernel/mm/transparent_hugepage/enabled says
/// `madvise` or `always`; elsewhere it does nothing. A refusal is ignored: the array then has pages
/// of the usual size and everything else is the same.
inline void advise_huge_pages(void* data, std::size_t bytes) noexcept {
#if defined(__linux__)
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t begin = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + bytes) / page * page;
  if (begin < end) (void)::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace magicpig::inline MAGICPIG_ABI
