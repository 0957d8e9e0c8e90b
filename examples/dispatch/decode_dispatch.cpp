// SPDX-License-Identifier: Apache-2.0
// The library for every instruction set that Highway knows, in one object file; the first call asks
// the processor which it is.

// Compile this file for the least processor that the binary is to run on, without -march, and link
// Highway's library (hwy::hwy). On x86 it then holds Highway's targets SSSE3, SSE4, AVX2 and AVX3
// (AVX3_DL too with -DHWY_WANT_AVX3_DL) and one without SIMD.
//
// Only what lies between HWY_BEFORE_NAMESPACE and HWY_AFTER_NAMESPACE is compiled for a target: the
// library's operations in highway-inl.hpp, and the functions below. The rest of the library is
// included before, stays what the flags say, and calls the operations a tile of rows at a time.
// That is why headers may not be included for the first time in a target's section, and why engine
// code between those lines must itself be in HWY_NAMESPACE: an inline function or lambda that
// targets shared could hold instructions that the processor lacks.
#include "decode_dispatch.hpp"

// This file includes itself through foreach_target.h, once per target: its name below must be
// found in a directory given with -I.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "decode_dispatch.cpp"
#include <hwy/foreach_target.h>

#include "magicpig/cpu/highway-inl.hpp"

HWY_BEFORE_NAMESPACE();
namespace engine {
namespace HWY_NAMESPACE {

// A type of its own per target, and so are all templates over it.
using Ops = magicpig::HWY_NAMESPACE::HighwayOps;

// Highway 1.0.3 cannot dispatch to functions that are noexcept, so only those further below are.

magicpig::Status build_index(Index& index, const Cache& cache, magicpig::TokenRange range,
                             magicpig::ThreadPool& threads) {
  return index.build(magicpig::make_backend<Ops>(threads), cache, range);
}

magicpig::Status append_to_index(Index& index, const Cache& cache, magicpig::TokenId end,
                                 magicpig::ThreadPool& threads) {
  return index.append(magicpig::make_backend<Ops>(threads), cache, end);
}

magicpig::Status decode_sampled(const SampledPlan& plan, std::span<const Request> requests,
                                std::span<std::byte> workspace, magicpig::ThreadPool& threads) {
  return magicpig::decode(magicpig::make_backend<Ops>(threads), plan, requests, workspace);
}

magicpig::Status decode_exact(const ExactPlan& plan, std::span<const Request> requests,
                              std::span<std::byte> workspace, magicpig::ThreadPool& threads) {
  return magicpig::decode(magicpig::make_backend<Ops>(threads), plan, requests, workspace);
}

const char* target_name() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace engine
HWY_AFTER_NAMESPACE();

// After the last target: the tables of functions, and the functions that the engine calls.
#if HWY_ONCE
namespace engine {

HWY_EXPORT(build_index);
HWY_EXPORT(append_to_index);
HWY_EXPORT(decode_sampled);
HWY_EXPORT(decode_exact);
HWY_EXPORT(target_name);

magicpig::Status build_index(Index& index, const Cache& cache, magicpig::TokenRange range,
                             magicpig::ThreadPool& threads) noexcept {
  return HWY_DYNAMIC_DISPATCH(build_index)(index, cache, range, threads);
}

magicpig::Status append_to_index(Index& index, const Cache& cache, magicpig::TokenId end,
                                 magicpig::ThreadPool& threads) noexcept {
  return HWY_DYNAMIC_DISPATCH(append_to_index)(index, cache, end, threads);
}

magicpig::Status decode_sampled(const SampledPlan& plan, std::span<const Request> requests,
                                std::span<std::byte> workspace,
                                magicpig::ThreadPool& threads) noexcept {
  return HWY_DYNAMIC_DISPATCH(decode_sampled)(plan, requests, workspace, threads);
}

magicpig::Status decode_exact(const ExactPlan& plan, std::span<const Request> requests,
                              std::span<std::byte> workspace,
                              magicpig::ThreadPool& threads) noexcept {
  return HWY_DYNAMIC_DISPATCH(decode_exact)(plan, requests, workspace, threads);
}

const char* target_name() noexcept { return HWY_DYNAMIC_DISPATCH(target_name)(); }

}  // namespace engine
#endif  // HWY_ONCE
