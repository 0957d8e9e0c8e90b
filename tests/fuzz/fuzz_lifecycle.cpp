// SPDX-License-Identifier: Apache-2.0
// Fuzz target: after any script of growing and cutting a cache, build, append, truncate and decode,
// an index holds and draws the same bits as one made from scratch.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <span>
#include <vector>

#include "brute_force.hpp"
#include "magicpig/attention.hpp"
#include "magicpig/cpu/highway.hpp"
#include "problem.hpp"
#include "same_index.hpp"

namespace magicpig::test {
namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "not so: %s\n", what);
  std::abort();
}

/// The script, byte by byte; zeros once it is used up.
class Script {
 public:
  Script(const std::uint8_t* data, std::size_t size) : bytes_(data, size) {}

  [[nodiscard]] bool done() const { return at_ >= bytes_.size(); }
  int byte() { return done() ? 0 : bytes_[at_++]; }
  /// In [first, last], from two bytes where one is too few.
  int between(int first, int last) {
    const int choices = last - first + 1;
    const int value = choices > 256 ? byte() * 256 + byte() : byte();
    return first + value % choices;
  }

 private:
  std::span<const std::uint8_t> bytes_;
  std::size_t at_ = 0;
};

/// Three workers whose tasks run backwards: results may depend on neither.
struct BackwardsExecutor {
  [[nodiscard]] static int workers() { return 3; }
  template <class Body>
  void parallel_for(int tasks, const Body& body) {
    for (int task = tasks - 1; task >= 0; --task) body(task, task % 3);
  }
};

struct Config {
  Shape shape;
  TokenId capacity = 600;  ///< of the cache
  CollisionRule rule;
  BucketTablesConfig tables;
  int bits = 1;  ///< of signatures
  std::uint64_t seed = 0;

  static Config read_for_signatures(Script& script) {
    Config c = read_shape(script);
    c.bits = script.between(1, 4);
    // Now and then over the ends of segments.
    if (script.byte() % 2 != 0) c.capacity = 2 * kSignatureSegment + 1000;
    c.seed = static_cast<std::uint64_t>(script.byte());
    return c;
  }

  static Config read_for_tables(Script& script) {
    Config c = read_shape(script);
    c.rule.bits = script.between(1, 15);
    if (c.rule.bits > 9 && c.rule.bits < 15) c.rule.bits -= 6;  // large tables only now and then
    c.rule.tables = script.between(1, c.rule.bits > 9 ? 2 : 12);
    c.rule.at_least = std::min(script.between(1, 3), c.rule.tables);
    c.rule.radius = std::min(script.between(0, 2), c.rule.bits);
    constexpr int kSeals[] = {1, 2, 7, 64, 100, 1024};
    c.tables = {.kv_heads = c.shape.kv_heads,
                .segment_tokens = 64 + script.between(0, 80),
                .seal_tokens = kSeals[script.between(0, 5)]};
    c.seed = static_cast<std::uint64_t>(script.byte());
    return c;
  }

 private:
  static Config read_shape(Script& script) {
    Config c;
    c.shape.kv_heads = script.between(1, 2);
    c.shape.query_heads = c.shape.kv_heads * script.between(1, 4);
    c.shape.head_dim = script.between(1, 12);
    c.shape.value_dim = script.between(1, 6);
    return c;
  }
};

/// A cache that grows and shrinks; tokens that come again are new ones.
class Cache {
 public:
  explicit Cache(const Config& config)
      : shape_(config.shape),
        capacity_(config.capacity),
        random_(config.seed),
        keys_(static_cast<std::size_t>(shape_.kv_heads * capacity_ * shape_.head_dim)),
        values_(static_cast<std::size_t>(shape_.kv_heads * capacity_ * shape_.value_dim)) {}

  [[nodiscard]] TokenId tokens() const { return tokens_; }

  void grow(TokenId count) {
    const TokenId end = std::min(capacity_, tokens_ + count);
    for (; tokens_ < end; ++tokens_) {
      // Now and then a copy of the token before, or zeros.
      const int kind = random_.below(16);
      for (int h = 0; h < shape_.kv_heads; ++h) write_token(h, kind);
    }
  }

  void cut(TokenId tokens) { tokens_ = std::min(tokens_, tokens); }

  float* key(int h, TokenId t) {
    return keys_.data() + std::int64_t{h * capacity_ + t} * shape_.head_dim;
  }

  [[nodiscard]] StridedKeyValues<float> view() const {
    const std::int64_t key_row = 4 * std::int64_t{shape_.head_dim};
    const std::int64_t value_row = 4 * std::int64_t{shape_.value_dim};
    return *StridedKeyValues<float>::create(
        {.keys = keys_.data(),
         .values = values_.data(),
         .key_strides = {.head = key_row * capacity_, .token = key_row},
         .value_strides = {.head = value_row * capacity_, .token = value_row},
         .kv_heads = shape_.kv_heads,
         .head_dim = shape_.head_dim,
         .value_dim = shape_.value_dim,
         .tokens = tokens_});
  }

 private:
  void write_token(int h, int kind) {
    for (int j = 0; j < shape_.head_dim; ++j) {
      const float fresh = static_cast<float>(random_.normal() + 0.5);
      const bool repeat = kind == 0 && tokens_ > 0;
      key(h, tokens_)[j] = repeat ? key(h, tokens_ - 1)[j] : kind == 1 ? 0.0F : fresh;
    }
    for (int j = 0; j < shape_.value_dim; ++j) {
      values_[static_cast<std::size_t>((h * capacity_ + tokens_) * shape_.value_dim + j)] =
          static_cast<float>(random_.normal());
    }
  }

  Shape shape_;
  TokenId capacity_;
  Random random_;
  TokenId tokens_ = 0;
  std::vector<float> keys_;
  std::vector<float> values_;
};

/// Tables, drawn from as published: brute force knows which tokens.
class Tables {
 public:
  using Index = BucketTables<SimHash>;
  using Sampler = Defensive<Collisions>;

  explicit Tables(const Config& config)
      : config_(config),
        family_(std::move(*SimHash::create({.dim = config.shape.head_dim,
                                            .bits = config.rule.bits,
                                            .tables = config.rule.tables,
                                            .seed = config.seed}))),
        collisions_(make_collisions()),
        sampler_(std::move(*Sampler::create(make_collisions(), {.fraction = 0.03}))) {}

  /// `seal` tokens at a time are taken over.
  [[nodiscard]] Index empty(TokenId seal) const {
    BucketTablesConfig config = config_.tables;
    config.seal_tokens = seal;
    return std::move(*Index::create(family_, config));
  }
  [[nodiscard]] TokenId seal() const { return config_.tables.seal_tokens; }
  [[nodiscard]] const Sampler& sampler() const { return sampler_; }

  using Input = DrawInput<StridedKeyValues<float>, Index>;
  template <class Ops>
  void check_draw(const Input& input, const Input& again) const {
    const DrawnCandidates found = draw_candidates<Ops>(collisions_, input);
    const DrawnCandidates expected = draw_candidates<Ops>(collisions_, again);
    require(found.tokens == expected.tokens && found.members == expected.members,
            "the same tokens are drawn");
    const int last = input.queries.count - 1;
    std::size_t at = 0;
    for (const TokenDraw& draw : BruteForce::draw<Ops>(
             input.key_values, input.index, {.data = input.queries[last], .kv_head = input.kv_head},
             config_.rule)) {
      while (at < found.tokens.size() && found.tokens[at] < draw.token) ++at;
      const bool drawn = at < found.tokens.size() && found.tokens[at] == draw.token &&
                         ((found.members[at] >> last) & 1U) != 0;
      require(drawn == draw.drawn, "brute force draws the same tokens");
    }
  }

 private:
  [[nodiscard]] Collisions make_collisions() const {
    return std::move(*Collisions::create(
        family_, {.min_collisions = config_.rule.at_least, .probe_radius = config_.rule.radius}));
  }

  Config config_;
  SimHash family_;
  Collisions collisions_;
  Sampler sampler_;
};

/// Signatures, drawn from systematically.
class Codes {
 public:
  using Index = Signatures<HadamardQuantiser>;
  using Sampler = Systematic;

  explicit Codes(const Config& config)
      : config_(config),
        quantiser_(
            std::move(*HadamardQuantiser::create(config.shape.head_dim, config.bits, config.seed))),
        sampler_(std::move(*Sampler::create(quantiser_, {.budget = {.fraction = 0.1}}))) {}

  [[nodiscard]] Index empty(TokenId) const {
    return std::move(*Index::create(
        quantiser_, {.kv_heads = config_.shape.kv_heads, .value_dim = config_.shape.value_dim}));
  }
  [[nodiscard]] static TokenId seal() { return 1; }
  [[nodiscard]] const Sampler& sampler() const { return sampler_; }

  using Input = DrawInput<StridedKeyValues<float>, Index>;
  template <class Ops>
  void check_draw(const Input& input, const Input& again) const {
    const DrawnCandidates found = draw_candidates<Ops>(sampler_, input);
    require(found.tokens == draw_candidates<ScalarOps>(sampler_, again).tokens,
            "ScalarOps draw the same tokens");
    const TokenRange range = input.index.indexed();
    require(range.size() < 200 || !found.tokens.empty(), "some token is drawn");
    for (std::size_t i = 0; i < found.tokens.size(); ++i) {
      require(range.begin <= found.tokens[i] && found.tokens[i] < range.end, "it is indexed");
      require(i == 0 || found.tokens[i - 1] < found.tokens[i], "tokens ascend");
    }
  }

 private:
  Config config_;
  HadamardQuantiser quantiser_;
  Sampler sampler_;
};

/// Plays a script on one index and remembers how it could be made from scratch.
template <class Ops, class Subject>
class Lifecycle {
  using Index = typename Subject::Index;

 public:
  Lifecycle(const Config& config, Script& script)
      : config_(config),
        script_(script),
        cache_(config),
        subject_(config),
        index_(subject_.empty(subject_.seal())),
        origin_(config) {}

  void run() {
    for (int step = 0; step < 40 && !script_.done(); ++step) {
      switch (script_.byte() % 8) {
        case 0:
        case 1:
          cache_.grow(script_.between(1, config_.capacity / 4));
          break;
        case 2:
          cut_cache();
          break;
        case 3:
          build();
          break;
        case 4:
          append(script_.between(0, config_.capacity + 20));
          break;
        case 5:
          check();
          break;
        case 6:
          truncate(script_.between(-2, config_.capacity + 20));
          break;
        case 7:
          append_spoiled();
          break;
      }
      require(index_.indexed() == range_, "the range is the one expected");
    }
    check();
  }

 private:
  CpuBackend<Ops, BackwardsExecutor> backend() { return make_backend<Ops>(backwards_); }

  // What a host does when a sequence is rolled back: cache and index together.
  void cut_cache() {
    cache_.cut(script_.between(0, config_.capacity));
    truncate(cache_.tokens());
  }

  void build() {
    const TokenRange range{.begin = script_.between(-1, 80),
                           .end = script_.between(0, config_.capacity + 20)};
    const bool valid = range.begin >= 0 && range.begin <= range.end &&
                       (range.empty() || range.end <= cache_.tokens());
    require(index_.build(backend(), cache_.view(), range).ok() == valid, "build accepts ranges");
    if (valid) remember(range);
  }

  // The keys of `range` make the centre now.
  void remember(TokenRange range) {
    range_ = range;
    origin_ = cache_;
    origin_range_ = range;
    unchanged_end_ = range.end;
  }

  void append(TokenId end) {
    const bool valid = end <= range_.end || end <= cache_.tokens();
    require(index_.append(backend(), cache_.view(), end).ok() == valid, "append accepts ends");
    if (!valid || end <= range_.end) return;
    const TokenId seal = subject_.seal();
    const TokenId taken = (end - range_.end) / seal * seal;
    if (taken == 0) return;
    if (range_.empty()) {
      remember({.begin = range_.begin, .end = range_.end + taken});
    } else {
      range_.end += taken;
    }
  }

  void truncate(TokenId end) {
    require(index_.truncate(end).ok() == (end >= 0), "truncate refuses negative ends");
    if (end < 0 || end >= range_.end) return;
    range_.end = std::max(end, range_.begin);
    unchanged_end_ = std::min(unchanged_end_, range_.end);
  }

  // An append that meets a NaN changes nothing.
  void append_spoiled() {
    if (cache_.tokens() <= range_.end) return;
    const TokenId token = script_.between(range_.end, cache_.tokens() - 1);
    const TokenId end = script_.between(range_.end, cache_.tokens());
    const TokenId seal = subject_.seal();
    if (token >= range_.end + (end - range_.end) / seal * seal) return;  // it would not be read
    float& victim = cache_.key(config_.shape.kv_heads - 1, token)[config_.shape.head_dim - 1];
    const float before = victim;
    victim = std::numeric_limits<float>::quiet_NaN();
    require(index_.append(backend(), cache_.view(), end).code() == ErrorCode::kNonFinite,
            "append refuses NaN");
    victim = before;
  }

  void check() {
    if (range_.end > cache_.tokens() && !range_.empty()) return;  // a stale index is refused
    const Index scratch = rebuild();
    const char* difference = index_difference(index_, scratch);
    require(difference == nullptr, difference == nullptr ? "" : difference);
    check_decode(scratch);
    if (!range_.empty()) check_draw(scratch);
  }

  // The same content by the shortest way: centre from the keys that made it, then the rest at once.
  Index rebuild() {
    Index index = subject_.empty(1);
    const auto backend = make_backend<Ops>(serial_);
    require(index.build(backend, origin_.view(), origin_range_).ok(), "the origin is built");
    require(index.truncate(unchanged_end_).ok(), "the origin is cut");
    if (range_.empty()) return index;
    require(index.append(backend, cache_.view(), range_.end).ok(), "the rest is appended");
    return index;
  }

  void check_decode(const Index& scratch) {
    const Shape& shape = config_.shape;
    const auto source = cache_.view();
    make_queries();
    const DecodePlan<typename Subject::Sampler> plan{
        .shape = shape, .sampler = &subject_.sampler(), .exact_below = 0};
    Outputs outputs(shape);
    Outputs expected(shape);
    Request<StridedKeyValues<float>, Index> request{.key_values = &source,
                                                    .index = &index_,
                                                    .query = queries_,
                                                    .states = outputs.states,
                                                    .reports = outputs.reports};
    require(decode_one<Ops>(backwards_, plan, request).ok(), "the index decodes");
    request.index = &scratch;
    request.states = expected.states;
    request.reports = expected.reports;
    require(decode_one<Ops>(serial_, plan, request).ok(), "the rebuilt index decodes");
    require(same_bits(outputs, expected), "outputs have the same bits");
  }

  // The tokens that the last KV head draws.
  void check_draw(const Index& scratch) {
    const Shape& shape = config_.shape;
    const auto source = cache_.view();
    const int kv_head = shape.kv_heads - 1;
    const float* query = queries_.data() + std::int64_t{kv_head} * shape.group() * shape.head_dim;
    const auto input = [&](const Index& index) {
      return typename Subject::Input{
          .key_values = source,
          .index = index,
          .kv_head = kv_head,
          .queries = {.data = query, .count = shape.group(), .dim = shape.head_dim},
          .noise = {}};
    };
    subject_.template check_draw<Ops>(input(index_), input(scratch));
  }

  void make_queries() {
    Random random(config_.seed + 77);
    queries_.resize(static_cast<std::size_t>(config_.shape.query_heads * config_.shape.head_dim));
    for (float& q : queries_) q = static_cast<float>(random.normal());
  }

  Config config_;
  Script& script_;
  Cache cache_;
  Subject subject_;
  Index index_;
  SerialExecutor serial_;
  BackwardsExecutor backwards_;
  std::vector<float> queries_;
  TokenRange range_;           // what the index should cover
  Cache origin_;               // the cache when the centre was made
  TokenRange origin_range_;    // the tokens that made it
  TokenId unchanged_end_ = 0;  // tokens before this are the origin's
};

}  // namespace
}  // namespace magicpig::test

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace magicpig;
  using namespace magicpig::test;
  Script script(data, size);
  const int kind = script.byte() % 4;
  if (kind < 2) {
    const Config config = Config::read_for_tables(script);
    if (kind == 0) Lifecycle<ScalarOps, Tables>(config, script).run();
    if (kind == 1) Lifecycle<HighwayOps, Tables>(config, script).run();
  } else {
    const Config config = Config::read_for_signatures(script);
    if (kind == 2) Lifecycle<ScalarOps, Codes>(config, script).run();
    if (kind == 3) Lifecycle<HighwayOps, Codes>(config, script).run();
  }
  return 0;
}
