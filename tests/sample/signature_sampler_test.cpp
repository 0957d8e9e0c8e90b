// SPDX-License-Identifier: Apache-2.0
// Draws by signatures, token by token (Poisson) and systematic.
#include "magicpig/sample/signature_sampler.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "backends.hpp"
#include "magicpig/attention.hpp"
#include "oracle.hpp"
#include "problem.hpp"
#include "statistics.hpp"

#define MAGICPIG_TEST_SAMPLERS magicpig::Poisson, magicpig::Systematic

namespace {

using namespace magicpig;
using namespace magicpig::test;

using Index = Signatures<HadamardQuantiser>;

constexpr Shape kShape{.query_heads = 6, .kv_heads = 2, .head_dim = 24, .value_dim = 8};
constexpr TokenId kTokens = 600;
constexpr TokenRange kRange{.begin = 4, .end = 580};

// tau is in sixteenths of a power of 2, the nearer of two.
constexpr double kTauStep = 1.0 / 33.0;

struct SettingConfig {
  int bits = 2;
  double query_scale = 1.0;
  Shape shape = kShape;
  TokenId tokens = kTokens;
  TokenRange range = kRange;
  int value_dim = 0;
};

struct Setting {
  explicit Setting(const SettingConfig& config)
      : problem(
            {.shape = config.shape, .tokens = config.tokens, .query_scale = config.query_scale}),
        range(config.range) {
    auto made = HadamardQuantiser::create(config.shape.head_dim, config.bits, 5);
    REQUIRE(made.ok());
    quantiser = std::make_unique<HadamardQuantiser>(std::move(*made));
    auto empty = Index::create(*quantiser,
                               {.kv_heads = config.shape.kv_heads, .value_dim = config.value_dim});
    REQUIRE(empty.ok());
    index = std::make_unique<Index>(std::move(*empty));
    build();
  }
  /// Anew, after keys were changed.
  void build() {
    SerialExecutor executor;
    REQUIRE(index->build(make_backend<ScalarOps>(executor), problem.source(), range).ok());
  }
  template <class Sampler>
  [[nodiscard]] Sampler sampler(const SignatureSamplerConfig& config) const {
    const auto made = Sampler::create(*quantiser, config);
    REQUIRE(made.ok());
    return *made;
  }

  Problem<float> problem;
  TokenRange range;
  std::unique_ptr<HadamardQuantiser> quantiser;
  std::unique_ptr<Index> index;
};

// Takes every token, so that a draw shows the probabilities of all.
struct EveryToken : UnbiasedSelection {
  template <class Input>
  explicit EveryToken(const Input&) {}

  template <class Ops>
  void draw(const std::int16_t*, int n, const ScoreRule&, TokenId, std::uint64_t* drawn) {
    std::fill_n(drawn, n / 64, ~std::uint64_t{0});
  }
};

// Systematic, with the same start in every step: what it must not be.
class SameStart : public UnbiasedSelection {
 public:
  template <class Input>
  explicit SameStart(const Input&) {}

  template <class Ops>
  void draw(const std::int16_t* scores, int n, const ScoreRule& rule, TokenId,
            std::uint64_t* drawn) {
    Ops::draw_systematic(scores, n, rule, tracks_, drawn);
  }

 private:
  std::uint16_t tracks_[kSystematicTracks] = {};
};

// What every token's probability is.
std::vector<double> design(const Setting& s, const SignatureSamplerConfig& config,
                           int kv_head = 0) {
  const auto sampler = s.sampler<SignatureSampler<EveryToken>>(config);
  const Drawn drawn = draw_tokens(sampler, s.problem, *s.index, {}, kv_head);
  REQUIRE(drawn.tokens.size() == static_cast<std::size_t>(s.range.size()));
  std::vector<double> pi;
  for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
    REQUIRE(drawn.tokens[i] == s.range.begin + static_cast<TokenId>(i));
    const double units = std::exp(static_cast<double>(drawn.log_pi[0][i])) * 65536.0;
    REQUIRE(std::abs(units - std::round(units)) < 0.01);  // a multiple of 2^-16
    REQUIRE(units > 0.5);
    REQUIRE(units < 65536.5);
    pi.push_back(std::round(units) / 65536.0);
  }
  return pi;
}

double sum_of(const std::vector<double>& pi) {
  double sum = 0.0;
  for (const double p : pi) sum += p;
  return sum;
}

// Of the tokens of each systematic draw that are not certain, the probabilities; and how many are.
struct Track {
  double sum = 0.0;
  int certain = 0;
};

std::vector<Track> tracks_of(const std::vector<double>& pi) {
  std::vector<Track> tracks(kSystematicTracks);
  for (std::size_t i = 0; i < pi.size(); ++i) {
    Track& track = tracks[i % kSystematicTracks];
    if (pi[i] == 1.0) {
      ++track.certain;
    } else {
      track.sum += pi[i];
    }
  }
  return tracks;
}

// Independent draws of each token, or eight numbers rounded up or down.
template <class Sampler>
double variance_of_rows(const std::vector<double>& pi) {
  double variance = 0.0;
  if constexpr (std::is_same_v<Sampler, Poisson>) {
    for (const double p : pi) variance += p * (1.0 - p);
  } else {
    for (const Track& track : tracks_of(pi)) {
      const double fraction = track.sum - std::floor(track.sum);
      variance += fraction * (1.0 - fraction);
    }
  }
  return variance;
}

TEST_CASE_TEMPLATE("SignatureSampler.draws_each_token_as_often_as_it_says", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  for (const double query_scale : {1.0, 4.0}) {
    CAPTURE(query_scale);
    const Setting s({.query_scale = query_scale});
    const SignatureSamplerConfig config{.budget = {.tokens = 60}};
    const std::vector<double> pi = design(s, config);
    const auto sampler = s.sampler<Sampler>(config);
    const int draws = replications(20000);
    INFO("seed ", first_seed());
    std::vector<double> counts(pi.size());
    Sample rows;
    Sample tokens;  // Horvitz-Thompson estimate of their number
    int wrong = 0;
    for (int d = 0; d < draws; ++d) {
      const Drawn drawn =
          draw_tokens(sampler, s.problem, *s.index,
                      {.seed = first_seed(), .step = static_cast<std::uint32_t>(d)});
      REQUIRE(drawn.members.empty());
      REQUIRE(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
      rows.add(static_cast<double>(drawn.tokens.size()));
      double estimate = 0.0;
      for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
        const auto at = static_cast<std::size_t>(drawn.tokens[i] - kRange.begin);
        const double p = std::exp(static_cast<double>(drawn.log_pi[0][i]));
        wrong += std::abs(p / pi[at] - 1.0) > 1e-6;
        counts[at] += 1.0;
        estimate += 1.0 / p;
      }
      tokens.add(estimate);
    }
    CHECK(wrong == 0);
    CHECK(std::abs(sum_of(pi) - 60.0) < kTauStep * 60.0);
    CHECK(std::abs(rows.z(sum_of(pi))) < kZ);
    CHECK(std::abs(rows.variance_z(variance_of_rows<Sampler>(pi))) < kZ);
    for (std::size_t i = 0; i < pi.size(); ++i) {
      if (pi[i] == 1.0) {
        CHECK(counts[i] == draws);
      } else if (draws * pi[i] > 5.0) {
        CHECK(std::abs(frequency_z(counts[i] / draws, pi[i], draws)) < kZ + 0.5);
      }
    }
    if (query_scale == 1.0) CHECK(std::abs(tokens.z(kRange.size())) < kZ);
  }
}

TEST_CASE("Poisson.draws_two_tokens_together_as_often_as_independent_ones") {
  const Setting s({.query_scale = 0.5});
  const SignatureSamplerConfig config{.budget = {.tokens = 200}};
  const std::vector<double> pi = design(s, config);
  const auto sampler = s.sampler<Poisson>(config);
  const int draws = replications(4000);
  INFO("seed ", first_seed());
  // Of tokens whose numbers come from the same random bits, and of others.
  const std::size_t gaps[] = {1, 2, 4, 7, 8, 64, 128};
  std::vector<Sample> pairs(std::size(gaps));
  for (int d = 0; d < draws; ++d) {
    const Drawn drawn = draw_tokens(sampler, s.problem, *s.index,
                                    {.seed = first_seed(), .step = static_cast<std::uint32_t>(d)});
    std::vector<double> in(pi.size());
    for (const TokenId t : drawn.tokens) in[static_cast<std::size_t>(t - kRange.begin)] = 1.0;
    for (std::size_t g = 0; g < std::size(gaps); ++g) {
      double sum = 0.0;
      for (std::size_t i = gaps[g]; i < pi.size(); ++i) {
        sum += (in[i] - pi[i]) * (in[i - gaps[g]] - pi[i - gaps[g]]);
      }
      pairs[g].add(sum);
    }
  }
  for (const Sample& pair : pairs) CHECK(std::abs(pair.z(0.0)) < kZ);
}

TEST_CASE("Systematic.draws_of_each_eighth_of_the_tokens_the_whole_number_above_or_below") {
  for (const double query_scale : {0.0, 0.5, 3.0}) {
    CAPTURE(query_scale);
    const Setting s({.query_scale = query_scale});
    const SignatureSamplerConfig config{.budget = {.tokens = 70}};
    const std::vector<Track> tracks = tracks_of(design(s, config));
    const auto sampler = s.sampler<Systematic>(config);
    int wrong = 0;
    for (std::uint32_t step = 0; step < 500; ++step) {
      const Drawn drawn = draw_tokens(sampler, s.problem, *s.index, {.seed = 3, .step = step});
      std::vector<int> counts(kSystematicTracks);
      for (const TokenId t : drawn.tokens) {
        ++counts[static_cast<std::size_t>((t - kRange.begin) % kSystematicTracks)];
      }
      for (std::size_t i = 0; i < counts.size(); ++i) {
        wrong += std::abs(counts[i] - tracks[i].certain - tracks[i].sum) >= 1.0;
      }
    }
    CHECK(wrong == 0);
  }
}

// The weighted sum and the normaliser, scaled back from a state: out * exp(lse) and exp(lse).
struct Sums {
  Sample normaliser;
  Sample weighted;
};

template <class Sampler, class Estimator = SelfNormalised>
Sums run(const Setting& s, const SignatureSamplerConfig& config, int head, int draws,
         const Estimator& estimator = {}) {
  const auto sampler = s.sampler<Sampler>(config);
  const DecodePlan<Sampler, Estimator> plan{
      .shape = s.problem.shape(), .sampler = &sampler, .estimator = estimator, .exact_below = 0};
  Outputs outputs(s.problem.shape());
  SerialExecutor executor;
  const auto source = s.problem.source();
  auto request = make_request(s.problem, source, s.index.get(), outputs);
  request.seed = first_seed();
  Sums sums;
  for (int d = 0; d < draws; ++d) {
    request.step = static_cast<std::uint32_t>(d);
    REQUIRE(decode_one<ScalarOps>(executor, plan, request).ok());
    const double normaliser = std::exp(static_cast<double>(outputs.lse(head)));
    sums.normaliser.add(normaliser);
    sums.weighted.add(normaliser * static_cast<double>(outputs.out(head)[2]));
  }
  return sums;
}

TEST_CASE_TEMPLATE(
    "SignatureSampler.sums_are_unbiased_given_the_codes_and_uncorrected_ones_are_not", Sampler,
    MAGICPIG_TEST_SAMPLERS) {
  for (const int bits : {1, 3}) {
    CAPTURE(bits);
    // Values count in the scores of one of the two.
    const Setting s({.bits = bits, .query_scale = 1.5, .value_dim = bits == 3 ? 8 : 0});
    const int head = 4;
    const OracleState exact = oracle_attention(
        s.problem.source(),
        {.data = s.problem.query(head), .kv_head = 1, .scale = 1.0 / std::sqrt(24.0)},
        every_token({.begin = 0, .end = kTokens}));
    const double normaliser = std::exp(exact.lse);
    INFO("seed ", first_seed());
    const int draws = replications(4000);
    const SignatureSamplerConfig config{.budget = {.fraction = 0.1}};
    const Sums right = run<Sampler>(s, config, head, draws);
    CHECK(std::abs(right.normaliser.z(normaliser)) < kZ);
    CHECK(std::abs(right.weighted.z(normaliser * exact.out[2])) < kZ);
    for (const SignatureSamplerConfig& other :
         {SignatureSamplerConfig{.budget = {.fraction = 0.1}, .least = 0.05},
          SignatureSamplerConfig{.budget = {.fraction = 0.1}, .certain = 0.5}}) {
      const Sums sums = run<Sampler>(s, other, head, draws);
      CHECK(std::abs(sums.normaliser.z(normaliser)) < kZ);
      CHECK(std::abs(sums.weighted.z(normaliser * exact.out[2])) < kZ);
    }
    // Controls that the test can fail: no correction, and a floor under every probability.
    const Sums uncorrected = run<Sampler>(s, config, head, draws / 4, Uncorrected{});
    CHECK(std::abs(uncorrected.normaliser.z(normaliser)) > 10.0);
    const Sums floored = run<Sampler>(s, config, head, draws / 4, Floored{.floor = 0.1F});
    CHECK(std::abs(floored.normaliser.z(normaliser)) > 10.0);
  }
}

// A control: unbiased only over starts.
TEST_CASE("Systematic.would_be_biased_if_all_steps_had_the_same_start") {
  const Setting s({.bits = 2, .query_scale = 1.5});
  const OracleState exact =
      oracle_attention(s.problem.source(),
                       {.data = s.problem.query(4), .kv_head = 1, .scale = 1.0 / std::sqrt(24.0)},
                       every_token({.begin = 0, .end = kTokens}));
  const Sums sums = run<SignatureSampler<SameStart>>(s, {.budget = {.fraction = 0.1}}, 4, 100);
  CHECK(std::abs(sums.normaliser.z(std::exp(exact.lse))) > 10.0);
}

TEST_CASE_TEMPLATE("SignatureSampler.keeps_its_budget_in_the_mean_whatever_the_logits", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  INFO("seed ", first_seed());
  for (const double query_scale : {0.0, 0.5, 2.0, 6.0}) {
    const Setting s({.query_scale = query_scale});
    for (const TokenId budget : {6, 30, 150, 500}) {
      CAPTURE(query_scale);
      CAPTURE(budget);
      const SignatureSamplerConfig config{.budget = {.tokens = budget}};
      const double expected = sum_of(design(s, config));
      // Of probabilities, which are rounded down to a multiple of 2^-16.
      CHECK(std::abs(expected - budget) < kTauStep * budget + kRange.size() * 0x1p-16);
      const auto sampler = s.sampler<Sampler>(config);
      Sample rows;
      for (std::uint32_t d = 0; d < 400; ++d) {
        rows.add(static_cast<double>(
            draw_tokens(sampler, s.problem, *s.index, {.seed = first_seed(), .step = d})
                .tokens.size()));
      }
      // Equal probabilities can make all eight fractions of a systematic draw 0 or nearly so.
      CHECK(std::abs(rows.mean() - expected) < kZ * rows.standard_error() + 0.1);
    }
  }
}

TEST_CASE_TEMPLATE("SignatureSampler.reads_everything_with_certainty_where_the_budget_allows",
                   Sampler, MAGICPIG_TEST_SAMPLERS) {
  const Setting s({});
  for (const SignatureSamplerConfig config :
       {SignatureSamplerConfig{.budget = {.fraction = 1.0}},
        SignatureSamplerConfig{.budget = {.tokens = kRange.size()}},
        SignatureSamplerConfig{.budget = {.tokens = 100000}},
        SignatureSamplerConfig{.budget = {.tokens = 1}, .least = 1.0}}) {
    const Drawn drawn = draw_tokens(s.sampler<Sampler>(config), s.problem, *s.index, {.seed = 1});
    REQUIRE(drawn.tokens.size() == static_cast<std::size_t>(kRange.size()));
    for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
      CHECK(drawn.tokens[i] == kRange.begin + static_cast<TokenId>(i));
    }
    for (const float log_pi : drawn.log_pi[0]) CHECK(log_pi == 0.0F);
  }
}

TEST_CASE("SignatureSampler.gives_no_token_less_than_the_least_and_takes_that_on_top") {
  const Setting s({.query_scale = 4.0});
  const std::vector<double> before = design(s, {.budget = {.tokens = 30}});
  for (const double least : {0.0, 1e-5, 0.01, 0.05, 0.9}) {
    CAPTURE(least);
    const std::vector<double> pi = design(s, {.budget = {.tokens = 30}, .least = least});
    int wrong = 0;
    for (std::size_t i = 0; i < pi.size(); ++i) {
      // The least in units is the next above it: 17/16 of it, or one unit more.
      const double most = std::max(before[i], least * 17.0 / 16.0 + 0x1p-16);
      wrong += !(pi[i] >= least && pi[i] >= before[i] && pi[i] <= most);
    }
    CHECK(wrong == 0);
  }
}

TEST_CASE("SignatureSampler.takes_its_certain_share_from_the_largest_scores_and_draws_the_rest") {
  const Setting s({.query_scale = 0.5});
  const std::vector<double> plain = design(s, {.budget = {.tokens = 100}});
  for (const double share : {0.2, 0.5, 0.9}) {
    CAPTURE(share);
    const std::vector<double> pi = design(s, {.budget = {.tokens = 100}, .certain = share});
    int certain = 0;
    double least_certain = 1.0;
    double most_drawn = 0.0;
    for (std::size_t i = 0; i < pi.size(); ++i) {
      if (pi[i] == 1.0) {
        ++certain;
        least_certain = std::min(least_certain, plain[i]);
      } else {
        most_drawn = std::max(most_drawn, plain[i]);
      }
    }
    CHECK(most_drawn < least_certain);
    // Ties within a sixteenth of a power of 2 come together.
    CHECK(std::abs(certain - 100.0 * share) < 12.0);
    CHECK(std::abs(sum_of(pi) - 100.0) < kTauStep * 100.0);
    // Those that are drawn keep their proportions.
    for (std::size_t i = 1; i < pi.size(); ++i) {
      if (pi[i] == 1.0 || pi[i - 1] == 1.0 || std::min(pi[i], pi[i - 1]) < 0.01) continue;
      CHECK(pi[i] / pi[i - 1] == doctest::Approx(plain[i] / plain[i - 1]).epsilon(0.15));
    }
  }
  // Less than what is certain anyway changes nothing.
  const Setting sharp({.query_scale = 4.0});
  CHECK(design(sharp, {.budget = {.tokens = 100}, .certain = 0.01}) ==
        design(sharp, {.budget = {.tokens = 100}}));
}

TEST_CASE_TEMPLATE("SignatureSampler.draws_anew_for_every_noise_key_and_the_same_for_the_same",
                   Sampler, MAGICPIG_TEST_SAMPLERS) {
  const Setting s({});
  const auto sampler = s.sampler<Sampler>({.budget = {.fraction = 0.2}});
  const auto draw = [&](const NoiseKey& key, int kv_head = 0) {
    return draw_tokens(sampler, s.problem, *s.index, key, kv_head).tokens;
  };
  const NoiseKey key{.seed = 1, .step = 2, .layer = 3};
  CHECK(draw(key) == draw(key));
  CHECK(draw(key) != draw({.seed = 2, .step = 2, .layer = 3}));
  CHECK(draw(key) != draw({.seed = 1, .step = 3, .layer = 3}));
  CHECK(draw(key) != draw({.seed = 1, .step = 2, .layer = 4}));
  CHECK(draw(key, 0) != draw(key, 1));
}

// Budget, order and range for one number of tokens; more than a pilot reads may miss the budget.
template <class Sampler>
void check_tokens(TokenId tokens) {
  CAPTURE(tokens);
  const Setting s({.shape = {.query_heads = 2, .kv_heads = 1, .head_dim = 16, .value_dim = 1},
                   .tokens = tokens + 3,
                   .range = {.begin = 2, .end = tokens + 2}});
  const SignatureSamplerConfig config{.budget = {.fraction = 0.05}};
  const TokenId budget = config.budget.of(tokens);
  const double expected = sum_of(design(s, config));
  const bool read_whole = tokens <= Sampler::kPilotBlocks * kSignatureBlock;
  CHECK(std::abs(expected - budget) <= (read_whole ? kTauStep : 0.1) * budget + tokens * 0x1p-16);
  const auto sampler = s.sampler<Sampler>(config);
  Sample rows;
  for (std::uint32_t step = 0; step < 20; ++step) {
    const Drawn drawn = draw_tokens(sampler, s.problem, *s.index, {.seed = 4, .step = step});
    for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
      REQUIRE(drawn.tokens[i] >= (i == 0 ? s.range.begin : drawn.tokens[i - 1] + 1));
      REQUIRE(drawn.tokens[i] < s.range.end);
    }
    rows.add(static_cast<double>(drawn.tokens.size()));
  }
  // A Poisson number's variance is below its mean.
  CHECK(std::abs(rows.mean() - expected) < kZ * std::sqrt(expected / 20.0) + 0.1);
}

TEST_CASE_TEMPLATE("SignatureSampler.keeps_budget_and_order_for_any_number_of_tokens", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  constexpr TokenId kPilot = Sampler::kPilotBlocks * kSignatureBlock;
  for (const TokenId tokens : {1,
                               2,
                               63,
                               64,
                               127,
                               128,
                               129,
                               255,
                               257,
                               4095,
                               4097,
                               kPilot - 127,
                               kPilot - 1,
                               kPilot,
                               kPilot + 1,
                               kPilot + 127,
                               kPilot + 129,
                               2 * kPilot - 5,
                               2 * kPilot + 5,
                               20000}) {
    check_tokens<Sampler>(tokens);
  }
}

TEST_CASE("SignatureSampler.draws_nothing_from_an_empty_range") {
  const Setting s({.range = {.begin = 5, .end = 5}});
  const SignatureSamplerConfig config{.budget = {.fraction = 0.5}};
  CHECK(draw_tokens(s.sampler<Poisson>(config), s.problem, *s.index).tokens.empty());
  CHECK(draw_tokens(s.sampler<Systematic>(config), s.problem, *s.index).tokens.empty());
}

TEST_CASE_TEMPLATE("SignatureSampler.takes_any_dimension_and_number_of_bits", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  for (const int head_dim : {1, 3, 65, 257}) {
    for (int bits = 1; bits <= 4; ++bits) {
      CAPTURE(head_dim);
      CAPTURE(bits);
      const Setting s(
          {.bits = bits,
           .shape = {.query_heads = 3, .kv_heads = 1, .head_dim = head_dim, .value_dim = 2},
           .value_dim = 2});
      const SignatureSamplerConfig config{.budget = {.tokens = 50}};
      const std::vector<double> pi = design(s, config);
      // So few different codes that many tokens' probabilities step together.
      const double step = head_dim == 1 ? 2.0 * kTauStep : kTauStep;
      CHECK(std::abs(sum_of(pi) - 50.0) < step * 50.0);
      const auto sampler = s.sampler<Sampler>(config);
      for (std::uint32_t d = 0; d < 20; ++d) {
        const Drawn drawn = draw_tokens(sampler, s.problem, *s.index, {.seed = 9, .step = d});
        CHECK(std::abs(static_cast<double>(drawn.tokens.size()) - 50.0) < 40.0);
        CHECK(drawn.tokens.front() >= kRange.begin);
        CHECK(drawn.tokens.back() < kRange.end);
      }
    }
  }
}

TEST_CASE("SignatureSampler.gives_equal_keys_equal_probabilities") {
  Setting s({});
  for (TokenId t = 0; t < kTokens; ++t) {
    for (int h = 0; h < 2; ++h) {
      for (int j = 0; j < 24; ++j) s.problem.key(h, t)[j] = 0.37F * static_cast<float>(j - 9);
    }
  }
  s.build();
  for (const TokenId budget : {1, 60, 400, 575}) {
    CAPTURE(budget);
    const std::vector<double> pi = design(s, {.budget = {.tokens = budget}}, 1);
    const double equal = static_cast<double>(budget) / kRange.size();
    CHECK(std::abs(pi[0] - equal) < kTauStep * equal + 0x1p-16);
    CHECK(std::count(pi.begin(), pi.end(), pi[0]) == kRange.size());
  }
}

// Keys of 1e-20 to 1e30, times `largest` / 1e30.
template <class Sampler>
void check_wild_norms(double largest, double query_scale) {
  CAPTURE(largest);
  CAPTURE(query_scale);
  Setting s({.query_scale = query_scale, .value_dim = 8});
  Random random(12);
  for (TokenId t = 0; t < kTokens; ++t) {
    const double scale = largest * std::pow(10.0, -50.0 * random.uniform());
    for (int h = 0; h < 2; ++h) {
      for (int j = 0; j < 24; ++j) {
        float& x = s.problem.key(h, t)[j];
        x = static_cast<float>(static_cast<double>(x) * scale);
      }
      for (int j = 0; j < 8; ++j) {
        float& x = s.problem.value(h, t)[j];
        x = static_cast<float>(static_cast<double>(x) * scale);
      }
    }
  }
  s.build();
  const SignatureSamplerConfig config{.budget = {.tokens = 60}};
  const double expected = sum_of(design(s, config));
  CHECK(expected > 30.0);
  CHECK(expected < 120.0);
  const auto sampler = s.sampler<Sampler>(config);
  for (std::uint32_t step = 0; step < 20; ++step) {
    const Drawn drawn = draw_tokens(sampler, s.problem, *s.index, {.seed = 2, .step = step});
    REQUIRE(std::abs(static_cast<double>(drawn.tokens.size()) - expected) < 6.0 * std::sqrt(60.0));
    REQUIRE(std::is_sorted(drawn.tokens.begin(), drawn.tokens.end()));
    REQUIRE(drawn.tokens.front() >= kRange.begin);
    REQUIRE(drawn.tokens.back() < kRange.end);
  }
}

TEST_CASE_TEMPLATE("SignatureSampler.keeps_its_budget_for_keys_and_values_of_any_norms", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  for (const double largest : {1e30, 1.0, 1e-5, 1e-25}) {
    for (const double query_scale : {1e-20, 1.0, 1e4}) {
      check_wild_norms<Sampler>(largest, query_scale);
    }
  }
}

TEST_CASE_TEMPLATE("SignatureSampler.draws_the_same_on_every_backend", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  for (int bits = 1; bits <= 4; ++bits) {
    for (const int group : {1, 3, 8}) {
      const Setting s({.bits = bits,
                       .query_scale = 1.5,
                       .shape = {.query_heads = 2 * group,
                                 .kv_heads = 2,
                                 .head_dim = bits == 2 ? 60 : 24,
                                 .value_dim = 5},
                       .value_dim = bits % 2 * 5});
      const auto sampler = s.sampler<Sampler>({.budget = {.fraction = 0.1}});
      const auto everything =
          s.sampler<SignatureSampler<EveryToken>>({.budget = {.fraction = 0.1}});
      const NoiseKey key{.seed = 5, .step = 6};
      for (const int kv_head : {0, 1}) {
        const Drawn expected = draw_tokens<ScalarOps>(sampler, s.problem, *s.index, key, kv_head);
        const Drawn all = draw_tokens<ScalarOps>(everything, s.problem, *s.index, key, kv_head);
        for_each_backend([&]<class Ops>() {
          const Drawn drawn = draw_tokens<Ops>(sampler, s.problem, *s.index, key, kv_head);
          CHECK(drawn.tokens == expected.tokens);
          CHECK(drawn.log_pi == expected.log_pi);
          CHECK(draw_tokens<Ops>(everything, s.problem, *s.index, key, kv_head).log_pi ==
                all.log_pi);
        });
      }
    }
  }
}

TEST_CASE("SignatureSampler.takes_the_temperature_of_its_codes_unless_it_is_told_one") {
  for (const int bits : {1, 2, 3, 4}) {
    CAPTURE(bits);
    const Setting s({.bits = bits, .query_scale = 1.5});
    const Budget budget{.tokens = 40};
    const auto own = design(s, {.budget = budget});
    CHECK(own == design(s, {.budget = budget, .temperature = code_temperature(bits)}));
    CHECK(own != design(s, {.budget = budget, .temperature = 0.5}));
    if (bits > 1) CHECK(code_temperature(bits) > code_temperature(bits - 1));
  }
}

TEST_CASE("TopScores.takes_the_tokens_of_the_largest_probabilities_and_no_others") {
  static_assert(!TopScores::kUnbiased);
  for (const double query_scale : {0.5, 2.0}) {
    for (const TokenId budget : {6, 60}) {
      CAPTURE(query_scale);
      CAPTURE(budget);
      const Setting s({.query_scale = query_scale});
      const SignatureSamplerConfig config{.budget = {.tokens = budget}};
      // With a single expected row next to nothing is certain: probabilities are as scores are.
      const std::vector<double> pi = design(s, {.budget = {.tokens = 1}});
      const Drawn drawn = draw_tokens(s.sampler<TopScores>(config), s.problem, *s.index, {});
      double least = 1.0;
      for (std::size_t i = 0; i < drawn.tokens.size(); ++i) {
        CHECK(drawn.log_pi[0][i] == 0.0F);
        least = std::min(least, pi[static_cast<std::size_t>(drawn.tokens[i] - s.range.begin)]);
      }
      std::size_t above = 0;
      std::size_t ties = 0;
      for (const double p : pi) {
        above += p > least ? 1 : 0;
        ties += p == least ? 1 : 0;
      }
      CHECK(above + ties >= drawn.tokens.size());
      CHECK(above <= drawn.tokens.size());
      CHECK(std::abs(static_cast<double>(drawn.tokens.size()) - budget) <=
            static_cast<double>(ties));
      for_each_backend([&]<class Ops>() {
        CHECK(draw_tokens<Ops>(s.sampler<TopScores>(config), s.problem, *s.index, {}).tokens ==
              drawn.tokens);
      });
    }
  }
}

TEST_CASE_TEMPLATE("SignatureSampler.decodes_to_the_same_bits_with_any_number_of_workers", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  const Setting s({.query_scale = 1.5, .value_dim = 8});
  const auto sampler = s.sampler<Sampler>({.budget = {.fraction = 0.1}});
  const DecodePlan<Sampler> plan{.shape = kShape, .sampler = &sampler, .exact_below = 0};
  const auto source = s.problem.source();
  for_each_backend([&]<class Ops>() {
    Outputs expected(kShape);
    SerialExecutor serial;
    const Draw draw{.seed = 3, .step = 8};
    REQUIRE(decode_one<Ops>(serial, plan,
                            make_request(s.problem, source, s.index.get(), expected, draw))
                .ok());
    for (int workers = 1; workers <= 7; ++workers) {
      CAPTURE(workers);
      const auto pool = ThreadPool::create(workers);
      REQUIRE(pool.ok());
      Index index = std::move(*Index::create(*s.quantiser, {.kv_heads = 2, .value_dim = 8}));
      REQUIRE(index.build(make_backend<Ops>(**pool), source, kRange).ok());
      Outputs outputs(kShape);
      REQUIRE(decode_one<Ops>(**pool, plan, make_request(s.problem, source, &index, outputs, draw))
                  .ok());
      CHECK(same_bits(outputs, expected));
    }
  });
}

// Numbers that no library of functions has a say in: FNV-1a of the tokens of some draws.
TEST_CASE_TEMPLATE("SignatureSampler.draws_the_same_tokens_on_every_machine", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  std::uint64_t hash = 14695981039346656037ULL;
  for (const int bits : {1, 2, 3, 4}) {
    Setting s({.bits = bits,
               .shape = {.query_heads = 6, .kv_heads = 2, .head_dim = 64, .value_dim = 7},
               .value_dim = 7});
    auto number = [state = std::uint32_t{1}]() mutable {
      state = state * 1664525U + 1013904223U;
      return static_cast<float>(state >> 16) / 16384.0F - 2.0F;
    };
    for (int h = 0; h < 2; ++h) {
      for (TokenId t = 0; t < kTokens; ++t) {
        for (int j = 0; j < 64; ++j) s.problem.key(h, t)[j] = number() + number();
        for (int j = 0; j < 7; ++j) s.problem.value(h, t)[j] = number();
      }
    }
    for (float& x : s.problem.query()) x = number() + number();
    s.build();
    const auto sampler = s.sampler<Sampler>({.budget = {.fraction = 0.05}});
    for (const int kv_head : {0, 1}) {
      const Drawn drawn = draw_tokens(sampler, s.problem, *s.index, {.seed = 3}, kv_head);
      for (const TokenId t : drawn.tokens) {
        hash = (hash ^ static_cast<std::uint32_t>(t)) * 1099511628211ULL;
      }
    }
  }
  CHECK(hash ==
        (std::is_same_v<Sampler, Poisson> ? 15968628248554804366ULL : 6574925981179720926ULL));
}

TEST_CASE_TEMPLATE("SignatureSampler.refuses_what_is_out_of_bounds", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  const Setting s({});
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const SignatureSamplerConfig config :
       {SignatureSamplerConfig{}, SignatureSamplerConfig{.budget = {.fraction = nan}},
        SignatureSamplerConfig{.budget = {.fraction = 1.5}},
        SignatureSamplerConfig{.budget = {.tokens = -1}},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .temperature = -0.1},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .temperature = 4.5},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .temperature = nan},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .least = -0.1},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .least = 1.5},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .least = nan},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .certain = -0.1},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .certain = 1.0},
        SignatureSamplerConfig{.budget = {.tokens = 5}, .certain = nan}}) {
    CHECK(Sampler::create(*s.quantiser, config).status().code() == ErrorCode::kInvalidArgument);
  }
}

TEST_CASE_TEMPLATE("SignatureSampler.supports_indexes_of_its_bits_and_dimension_only", Sampler,
                   MAGICPIG_TEST_SAMPLERS) {
  const Setting s({});
  const SignatureSamplerConfig config{.budget = {.tokens = 5}};
  CHECK(Sampler::create(*s.quantiser, config)->supports(*s.index).ok());
  for (const auto& [dim, bits] : {std::pair{24, 3}, std::pair{23, 2}, std::pair{64, 2}}) {
    const auto other = HadamardQuantiser::create(dim, bits, 1);
    REQUIRE(other.ok());
    CHECK(Sampler::create(*other, config)->supports(*s.index).code() == ErrorCode::kShapeMismatch);
  }
}

}  // namespace
