// SPDX-License-Identifier: Apache-2.0
// A program that uses the library through its installed or vendored headers.
#include <cstdio>
#include <magicpig/version.hpp>
#if defined(CONSUMER_USES_HIGHWAY)
#include <magicpig/cpu/highway.hpp>
#endif

int main() { std::puts(MAGICPIG_VERSION_STRING); }
