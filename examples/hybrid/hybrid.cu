// SPDX-License-Identifier: Apache-2.0
// The split that MagicPIG is published with: hashes on the device, hash tables and all but the
// newest keys and values in the host's memory. Per step the device hashes the queries and attends
// to the tokens that it kept, while the host looks up, gathers and attends to its own; the two
// parts are one softmax by their log-sum-exps.
//
// hybrid [TOKENS [STEPS]]: one layer of 32 query heads, 8 KV heads, head_dim 128, bf16, (K, L) =
// (10, 150), random keys (sizes in host_part.hpp). Prints what a step takes and how far it is from
// attending to everything. Without a device it says so and returns 77.
#include <cublas_v2.h>
#include <cuda_runtime.h>
#include <thrust/device_vector.h>
#include <thrust/universal_vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <magicpig/cuda/exact_attention.cuh>
#include <magicpig/cuda/key_hasher.cuh>
#include <magicpig/cuda/sign_planes.cuh>
#include <span>
#include <vector>

#include "host_part.hpp"

namespace magicpig::hybrid {

// The device keeps pages: the first one, of attention sinks, and up to kLocalPages newest. The
// oldest of these goes to the host when the last one is full.
constexpr int kPageTokens = 64;
constexpr int kLocalPages = 4;
constexpr int kPages = 1 + kLocalPages;
constexpr std::size_t kRowsOfPage = std::size_t{kKvHeads} * kPageTokens;

template <class T>
using Device = thrust::device_vector<T>;
template <class T>
using Pinned = thrust::universal_host_pinned_vector<T>;

template <class T>
[[nodiscard]] T* at(Device<T>& vector, std::size_t place = 0) {
  return vector.data().get() + place;
}
template <class T>
[[nodiscard]] T* at(Pinned<T>& vector, std::size_t place = 0) {
  return vector.data().get() + place;
}
[[nodiscard]] std::span<std::byte> bytes_of(Device<std::byte>& memory) {
  return {at(memory), memory.size()};
}

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "hybrid: %s\n", cudaGetErrorString(error));
  std::exit(1);
}
void require(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "hybrid: %s\n", status.message());
  std::exit(1);
}
template <class T>
T required(Result<T> result) {
  require(result.status());
  return std::move(*result);
}

[[nodiscard]] double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
[[nodiscard]] double median(std::vector<double> times) {
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2];
}

/// What the layer's projections would give: keys around a mean, as those of models are, and queries
/// that look for one of them each.
class Model {
 public:
  Model() : mean_(normals(kKvHeads * kDim, 1, 1.0F)) {}
  [[nodiscard]] std::vector<bf16> keys(TokenId tokens, std::uint32_t part) const {
    std::vector<float> x =
        normals(kKvHeads * static_cast<std::size_t>(tokens) * kDim, 100 + part, 1.0F);
    const std::size_t head = x.size() / kKvHeads;
    for (std::size_t i = 0; i < x.size(); ++i) x[i] += mean_[i / head * kDim + i % kDim];
    return rounded(x);
  }
  [[nodiscard]] std::vector<bf16> values(TokenId tokens, std::uint32_t part) const {
    return rounded(
        normals(kKvHeads * static_cast<std::size_t>(tokens) * kDim, 100000 + part, 1.0F));
  }
  /// Each of them looks for one token of a prompt with these keys.
  [[nodiscard]] std::vector<bf16> queries(const std::vector<bf16>& keys, std::uint32_t step) const {
    std::vector<float> x = normals(kQueryHeads * kDim, 200000 + step, 1.0F);
    const std::size_t tokens = keys.size() / kKvHeads / kDim;
    for (std::size_t h = 0; h < kQueryHeads; ++h) {
      const std::size_t kv_head = h / (kQueryHeads / kKvHeads);
      const std::size_t token = (step * 7919 + h * 104729) % tokens;
      for (std::size_t j = 0; j < kDim; ++j) {
        const float key = to_float(keys[(kv_head * tokens + token) * kDim + j]);
        x[h * kDim + j] += key - mean_[kv_head * kDim + j];
      }
    }
    return rounded(x);
  }

 private:
  static std::vector<float> normals(std::size_t size, std::uint32_t part, float scale) {
    const RandomStream stream({.seed = 1, .stream = part});
    std::vector<float> to(size + 1);
    for (std::size_t i = 0; i < size; i += 2) {
      const auto pair = stream.normals(static_cast<std::uint32_t>(i / 2));
      to[i] = scale * static_cast<float>(pair[0]);
      to[i + 1] = scale * static_cast<float>(pair[1]);
    }
    to.resize(size);
    return to;
  }
  static std::vector<bf16> rounded(const std::vector<float>& from) {
    std::vector<bf16> to(from.size());
    std::transform(from.begin(), from.end(), to.begin(), [](float x) { return to_bf16(x); });
    return to;
  }

  std::vector<float> mean_;  // [kv_heads, dim]
};

/// Keys and values [kKvHeads, capacity, kDim] of the host's, in memory that copies need not stage.
struct HostRows {
  explicit HostRows(TokenId tokens)
      : capacity(tokens),
        keys(kKvHeads * static_cast<std::size_t>(tokens) * kDim),
        values(keys.size()) {}
  [[nodiscard]] std::size_t row(int kv_head, TokenId token) const {
    return static_cast<std::size_t>(kv_head * std::int64_t{capacity} + token) * kDim;
  }

  TokenId capacity;
  Pinned<bf16> keys;
  Pinned<bf16> values;
};

/// Hashes of `count` tokens, on the device and in the host's memory.
struct Hashes {
  explicit Hashes(TokenId tokens)
      : count(tokens),
        codes(kKvHeads * static_cast<std::size_t>(kTables) * static_cast<std::size_t>(tokens)),
        norms(kKvHeads * static_cast<std::size_t>(tokens)) {}
  /// As the host takes them, when they are the tokens from `first` on.
  [[nodiscard]] HashedKeys from(TokenId first) {
    return {.tokens = {.begin = first, .end = first + count},
            .codes = at(host_codes),
            .norms = at(host_norms)};
  }

  TokenId count;
  Device<Code> codes;   // [kKvHeads, L, count]
  Device<float> norms;  // [kKvHeads, count]
  Pinned<Code> host_codes = Pinned<Code>(codes.size());
  Pinned<float> host_norms = Pinned<float>(norms.size());
};

/// The device's part: planes, the first page of tokens and the newest ones.
class DevicePart {
 public:
  explicit DevicePart(const SimHash& family)
      : planes_memory_(cuda::SignPlanes::bytes(family)),
        planes_(required(cuda::SignPlanes::create(family, bytes_of(planes_memory_), nullptr))),
        hash_memory_(cuda::KeyHasher::workspace_bytes(planes_)),
        keys_(kPages * kRowsOfPage * kDim),
        values_(keys_.size()),
        workspace_(cuda::workspace_bytes(plan_, 1, kDim)) {
    if (cublasCreate(&blas_) != CUBLAS_STATUS_SUCCESS) {
      require(Status::error(ErrorCode::kDevice, "cublasCreate"));
    }
    require(cudaStreamCreate(&hashing_));
    require(cudaStreamCreate(&attending_));
    require(cudaEventCreateWithFlags(&queries_are_there_, cudaEventDisableTiming));
    require(cudaEventCreate(&attend_begins_));
    require(cudaEventCreate(&attend_ends_));
    for (int p = 0; p < kPages; ++p) pages_[p] = p;
  }
  ~DevicePart() {
    (void)cublasDestroy(blas_);
    for (cudaStream_t stream : {hashing_, attending_}) (void)cudaStreamDestroy(stream);
    for (cudaEvent_t event : {queries_are_there_, attend_begins_, attend_ends_}) {
      (void)cudaEventDestroy(event);
    }
  }
  DevicePart(const DevicePart&) = delete;
  DevicePart& operator=(const DevicePart&) = delete;

  /// A prompt [kKvHeads, tokens, kDim] as prefill leaves it: rows and hashes of tokens `to_host` go
  /// to the host, all others stay here. Returns the centres [kKvHeads, kDim].
  std::vector<float> begin(const std::vector<bf16>& keys, const std::vector<bf16>& values,
                           TokenRange to_host, HostRows& rows, Hashes& hashes) {
    const auto tokens = static_cast<TokenId>(keys.size() / kKvHeads / kDim);
    Device<bf16> all_keys(keys.begin(), keys.end());
    Device<bf16> all_values(values.begin(), values.end());
    const auto from = cuda::KeyValues<bf16>::head_major(at(all_keys), at(all_values), 1, kKvHeads,
                                                        tokens, kDim, at(table_, kPages));
    Arena arena(bytes_of(hash_memory_));
    const cuda::KeyHasher hasher(planes_, arena, blas_);
    require(hasher.make_centres(from, 0, to_host, at(centres_), hashing_));
    hash(from, to_host, hashes);
    for (int h = 0; h < kKvHeads; ++h) {
      const auto row = [&](TokenId t) {
        return static_cast<std::size_t>(h * std::int64_t{tokens} + t) * kDim;
      };
      const auto copy_both = [&](bf16* key, bf16* value, TokenId t, int count) {
        copy(key, at(all_keys, row(t)), count);
        copy(value, at(all_values, row(t)), count);
      };
      const std::size_t to = rows.row(h, to_host.begin);
      copy_both(at(rows.keys, to), at(rows.values, to), to_host.begin, to_host.size());
      copy_both(page(keys_, 0, h), page(values_, 0, h), 0, kPageTokens);
      for (TokenId t = to_host.end; t < tokens; t += kPageTokens) {
        const int p = 1 + (t - to_host.end) / kPageTokens;
        copy_both(page(keys_, p, h), page(values_, p, h), t, std::min(tokens - t, kPageTokens));
      }
    }
    std::vector<float> centres(centres_.size());
    require(cudaMemcpyAsync(centres.data(), at(centres_), centres.size() * sizeof(float),
                            cudaMemcpyDeviceToHost, hashing_));
    require(cudaStreamSynchronize(hashing_));
    tokens_ = kPageTokens + (tokens - to_host.end);
    return centres;
  }

  /// The newest token's rows [kv_heads, dim] to its page; the queries [kQueryHeads, dim], which are
  /// hashed on one stream, while the tokens that are here are attended to on another.
  void start(const std::vector<bf16>& key, const std::vector<bf16>& value,
             const std::vector<bf16>& queries) {
    std::copy(queries.begin(), queries.end(), staged_queries_.begin());
    std::copy(key.begin(), key.end(), staged_rows_.begin());
    std::copy(value.begin(), value.end(), staged_rows_.begin() + kKvHeads * kDim);
    const int slot = tokens_ % kPageTokens;
    const int newest = pages_[tokens_ / kPageTokens];
    for (int h = 0; h < kKvHeads; ++h) {
      const std::size_t row = static_cast<std::size_t>(slot) * kDim;
      const auto own = static_cast<std::size_t>(h) * kDim;
      copy(page(keys_, newest, h) + row, at(staged_rows_, own), 1, attending_);
      copy(page(values_, newest, h) + row, at(staged_rows_, kKvHeads * kDim + own), 1, attending_);
    }
    ++tokens_;
    for (int p = 0; p < kPages; ++p) staged_table_[p] = pages_[p];
    staged_table_[kPages] = tokens_;
    require(cudaMemcpyAsync(at(table_), at(staged_table_), (kPages + 1) * sizeof(std::int32_t),
                            cudaMemcpyHostToDevice, attending_));

    copy(at(queries_), at(staged_queries_), kQueryHeads, hashing_);
    require(cudaEventRecord(queries_are_there_, hashing_));
    require(cuda::hash_queries(planes_, at(queries_), kQueryHeads, at(codes_), hashing_));
    require(cudaMemcpyAsync(at(host_codes_), at(codes_), codes_.size() * sizeof(Code),
                            cudaMemcpyDeviceToHost, hashing_));

    require(cudaStreamWaitEvent(attending_, queries_are_there_, 0));
    require(cudaEventRecord(attend_begins_, attending_));
    const cuda::DecodeBatch<bf16> batch{
        .key_values = local(), .queries = at(queries_), .out = at(out_), .lse = at(lse_)};
    require(cuda::decode(plan_, batch, bytes_of(workspace_), attending_));
    require(cudaEventRecord(attend_ends_, attending_));
    require(cudaMemcpyAsync(at(host_out_), at(out_), out_.size() * sizeof(float),
                            cudaMemcpyDeviceToHost, attending_));
    require(cudaMemcpyAsync(at(host_lse_), at(lse_), lse_.size() * sizeof(float),
                            cudaMemcpyDeviceToHost, attending_));
  }

  /// The codes of the queries [kQueryHeads, L], as soon as they are here.
  std::span<const Code> codes() {
    require(cudaStreamSynchronize(hashing_));
    return {at(host_codes_), host_codes_.size()};
  }
  /// Adds what the device has attended to to the host's states, as soon as it is here.
  void merge_into(std::span<AttentionState> states) {
    require(cudaStreamSynchronize(attending_));
    for (std::size_t h = 0; h < states.size(); ++h) {
      merge(states[h], {.out = std::span(at(host_out_, h * kDim), kDim), .lse = at(host_lse_)[h]});
    }
  }
  /// Seconds between events of the last step.
  [[nodiscard]] double attend_time() const {
    float ms = 0.0F;
    require(cudaEventElapsedTime(&ms, attend_begins_, attend_ends_));
    return 1e-3 * static_cast<double>(ms);
  }

  [[nodiscard]] bool full() const { return tokens_ == kPages * kPageTokens; }
  /// Gives the oldest local page to the host, as its tokens from `first` on: rows and hashes.
  void evict(TokenId first, HostRows& rows, Hashes& hashes) {
    hash(local(), {.begin = kPageTokens, .end = 2 * kPageTokens}, hashes);
    for (int h = 0; h < kKvHeads; ++h) {
      copy(at(rows.keys, rows.row(h, first)), page(keys_, pages_[1], h), kPageTokens);
      copy(at(rows.values, rows.row(h, first)), page(values_, pages_[1], h), kPageTokens);
    }
    require(cudaStreamSynchronize(hashing_));
    std::rotate(pages_ + 1, pages_ + 2, pages_ + kPages);
    tokens_ -= kPageTokens;
  }

  [[nodiscard]] std::size_t bytes() const {
    return planes_memory_.size() + hash_memory_.size() + workspace_.size() +
           2 * keys_.size() * sizeof(bf16);
  }

 private:
  void copy(bf16* to, const bf16* from, int rows, cudaStream_t stream) {
    require(cudaMemcpyAsync(to, from, static_cast<std::size_t>(rows) * kDim * sizeof(bf16),
                            cudaMemcpyDefault, stream));
  }
  void copy(bf16* to, const bf16* from, int rows) { copy(to, from, rows, hashing_); }

  [[nodiscard]] static bf16* page(Device<bf16>& of, int number, int kv_head) {
    const std::size_t first = static_cast<std::size_t>(number) * kRowsOfPage +
                              static_cast<std::size_t>(kv_head) * kPageTokens;
    return at(of, first * kDim);
  }

  /// The pages, as one cache of tokens_ tokens.
  [[nodiscard]] cuda::KeyValues<bf16> local() {
    constexpr std::int64_t kRow = kDim * sizeof(bf16);
    const PageStrides strides{
        .page = kRow * kPageTokens * kKvHeads, .head = kRow * kPageTokens, .token = kRow};
    return {.keys = at(keys_),
            .values = at(values_),
            .key_strides = strides,
            .value_strides = strides,
            .block_table = at(table_),
            .table_stride = kPages,
            .page_tokens = kPageTokens,
            .tokens = at(table_, kPages),
            .requests = 1,
            .kv_heads = kKvHeads,
            .dim = kDim};
  }

  /// Starts hashing tokens and copying the hashes to memory that the host reads.
  void hash(const cuda::KeyValues<bf16>& from, TokenRange tokens, Hashes& to) {
    Arena arena(bytes_of(hash_memory_));
    const cuda::KeyHasher hasher(planes_, arena, blas_);
    const auto count = static_cast<std::size_t>(tokens.size());
    for (std::size_t h = 0; h < kKvHeads; ++h) {
      const cuda::HashPlaces places{.codes = at(to.codes, h * kTables * count),
                                    .stride = tokens.size(),
                                    .norms = at(to.norms, h * count)};
      require(hasher.hash(from, 0, static_cast<int>(h), tokens, at(centres_, h * kDim), places,
                          hashing_));
    }
    require(cudaMemcpyAsync(at(to.host_codes), at(to.codes), to.codes.size() * sizeof(Code),
                            cudaMemcpyDeviceToHost, hashing_));
    require(cudaMemcpyAsync(at(to.host_norms), at(to.norms), to.norms.size() * sizeof(float),
                            cudaMemcpyDeviceToHost, hashing_));
  }

  cuda::DecodePlan<Exact> plan_{.query_heads = kQueryHeads, .splits = 4};
  Device<std::byte> planes_memory_;
  cuda::SignPlanes planes_;
  Device<std::byte> hash_memory_;
  Device<bf16> keys_;  // [kPages, kv_heads, kPageTokens, dim]
  Device<bf16> values_;
  Device<std::byte> workspace_;
  Device<float> centres_ = Device<float>(kKvHeads * kDim);
  int pages_[kPages];   // of local tokens, in their order
  TokenId tokens_ = 0;  // that are here
  Device<std::int32_t> table_ = Device<std::int32_t>(kPages + 1);  // pages_, then tokens_
  Device<bf16> queries_ = Device<bf16>(kQueryHeads * kDim);
  Device<Code> codes_ = Device<Code>(kQueryHeads * kTables);
  Device<float> out_ = Device<float>(kQueryHeads * kDim);
  Device<float> lse_ = Device<float>(kQueryHeads);
  Pinned<bf16> staged_queries_ = Pinned<bf16>(kQueryHeads * kDim);
  Pinned<bf16> staged_rows_ = Pinned<bf16>(2 * kKvHeads * kDim);
  Pinned<std::int32_t> staged_table_ = Pinned<std::int32_t>(kPages + 1);
  Pinned<Code> host_codes_ = Pinned<Code>(kQueryHeads * kTables);
  Pinned<float> host_out_ = Pinned<float>(kQueryHeads * kDim);
  Pinned<float> host_lse_ = Pinned<float>(kQueryHeads);
  cublasHandle_t blas_ = nullptr;
  cudaStream_t hashing_ = nullptr;
  cudaStream_t attending_ = nullptr;
  cudaEvent_t queries_are_there_ = nullptr;
  cudaEvent_t attend_begins_ = nullptr;
  cudaEvent_t attend_ends_ = nullptr;
};

int run(TokenId prompt, int steps) {
  const auto family =
      required(SimHash::create({.dim = kDim, .bits = kFunctions, .tables = kTables}));
  const Model model;
  HostRows rows(prompt + steps);
  HostPart host(family, at(rows.keys), at(rows.values), rows.capacity);
  DevicePart device(family);
  // The first page stays on the device, and one or two newest.
  const TokenRange to_host{.begin = kPageTokens, .end = (prompt / kPageTokens - 1) * kPageTokens};
  const auto keys = model.keys(prompt, 0);
  double began = 0.0;
  {
    const auto values = model.values(prompt, 0);
    Hashes hashes(to_host.size());
    began = seconds();
    const auto centres = device.begin(keys, values, to_host, rows, hashes);
    HashedKeys hashed = hashes.from(to_host.begin);
    hashed.centres.keys = centres;
    const double hashed_in = seconds() - began;
    require(host.begin(hashed));
    std::printf(
        "prompt: %d of %d tokens to the device, hashed and back in %.2f s, their tables made "
        "in %.2f s\n",
        to_host.size(), prompt, hashed_in, seconds() - began - hashed_in);
  }

  Hashes page_hashes(kPageTokens);
  std::vector<double> codes_here, looked_up, waited, whole, attended, evicted;
  double square = 0.0;
  double off = 0.0;
  for (int step = 0; step < steps; ++step) {
    const auto number = static_cast<std::uint32_t>(step + 1);
    const auto key = model.keys(1, number);
    const auto value = model.values(1, number);
    const auto queries = model.queries(keys, number);
    std::vector<float> wide(queries.size());
    std::transform(queries.begin(), queries.end(), wide.begin(),
                   [](bf16 x) { return to_float(x); });

    began = seconds();
    device.start(key, value, queries);
    const auto codes = device.codes();
    codes_here.push_back(seconds() - began);
    require(host.attend(wide, codes));
    looked_up.push_back(seconds() - began - codes_here.back());
    device.merge_into(host.states());
    whole.push_back(seconds() - began);
    waited.push_back(whole.back() - codes_here.back() - looked_up.back());
    attended.push_back(device.attend_time());

    if (step % 16 == 0) {  // against attention to every token
      std::vector<float> drawn;
      for (const AttentionState& s : host.states()) {
        drawn.insert(drawn.end(), s.out.begin(), s.out.end());
      }
      require(host.attend_exactly(wide));
      device.merge_into(host.states());
      for (std::size_t i = 0; i < drawn.size(); ++i) {
        const double exact = host.states()[i / kDim].out[i % kDim];
        square += exact * exact;
        off += (static_cast<double>(drawn[i]) - exact) * (static_cast<double>(drawn[i]) - exact);
      }
    }
    if (device.full()) {
      began = seconds();
      const TokenId next = host.tokens().end;
      device.evict(next, rows, page_hashes);
      require(host.append(page_hashes.from(next)));
      evicted.push_back(seconds() - began);
    }
  }
  std::printf(
      "step, medians of %d: codes here %.0f us, host looks up and attends %.0f us, then waits "
      "for the device %.0f us; in all %.0f us\n",
      steps, 1e6 * median(codes_here), 1e6 * median(looked_up), 1e6 * median(waited),
      1e6 * median(whole));
  std::printf("meanwhile the device attends to its tokens: %.0f us\n", 1e6 * median(attended));
  std::printf("host: %s\n", HostPart::backend());
  if (!evicted.empty()) {
    std::printf("a page of %d tokens to the host and into its tables: %.0f us, %zu times\n",
                kPageTokens, 1e6 * median(evicted), evicted.size());
  }
  const double error = std::sqrt(off / square);
  std::printf("relative error of the output (rms): %.3f\n", error);
  std::printf("memory: %.1f MiB on the device beside cuBLAS's, %.1f MiB on the host\n",
              static_cast<double>(device.bytes()) / 0x1p20,
              static_cast<double>(host.bytes()) / 0x1p20);
  if (error < 0.3) return 0;
  std::fprintf(stderr, "hybrid: that is more than draws explain\n");
  return 1;
}

}  // namespace magicpig::hybrid

int main(int argc, char** argv) {
  const int tokens = argc > 1 ? std::atoi(argv[1]) : 32768;
  const int steps = argc > 2 ? std::atoi(argv[2]) : 256;
  if (tokens < 4 * magicpig::hybrid::kPageTokens || steps < 1) {
    std::fprintf(stderr, "usage: hybrid [TOKENS, at least %d [STEPS]]\n",
                 4 * magicpig::hybrid::kPageTokens);
    return 2;
  }
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("HYBRID NOT RUN: no device here (%s)\n", cudaGetErrorString(error));
    return 77;
  }
  return magicpig::hybrid::run(tokens, steps);
}
