// SPDX-License-Identifier: Apache-2.0
// What an engine calls: plain functions that run on the best instruction set of the processor.
#pragma once

#include <cstddef>
#include <magicpig/attention.hpp>
#include <span>

namespace engine {

// The types that this engine has chosen. They belong to the flags that its files are compiled with,
// the same for all of them.
using Cache = magicpig::StridedKeyValues<magicpig::bf16>;
using Index = magicpig::BucketTables<magicpig::SimHash>;
using Request = magicpig::Request<Cache, Index>;
using SampledPlan = magicpig::DecodePlan<magicpig::Collisions>;
using ExactPlan = magicpig::DecodePlan<magicpig::Exact>;

/// Name of Highway's target in use, "AVX3" for example.
[[nodiscard]] const char* target_name() noexcept;

/// index.build() of the tokens of `range`.
magicpig::Status build_index(Index& index, const Cache& cache, magicpig::TokenRange range,
                             magicpig::ThreadPool& threads) noexcept;

/// index.append() of the tokens up to `end`.
magicpig::Status append_to_index(Index& index, const Cache& cache, magicpig::TokenId end,
                                 magicpig::ThreadPool& threads) noexcept;

/// decode() of requests whose indexed tokens are sampled.
magicpig::Status decode_sampled(const SampledPlan& plan, std::span<const Request> requests,
                                std::span<std::byte> workspace,
                                magicpig::ThreadPool& threads) noexcept;

/// decode() over every token.
magicpig::Status decode_exact(const ExactPlan& plan, std::span<const Request> requests,
                              std::span<std::byte> workspace,
                              magicpig::ThreadPool& threads) noexcept;

}  // namespace engine
