// SPDX-License-Identifier: Apache-2.0
#include "device.hpp"

#include <ggml-backend-impl.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "cells.hpp"
#include "layer_attention.hpp"

namespace magicpig::llama {
namespace {

constexpr std::string_view kKeyCache = "cache_k_l";
constexpr std::string_view kValueCache = "cache_v_l";

const ggml_tensor* root_of(const ggml_tensor* tensor) {
  return tensor->view_src != nullptr ? tensor->view_src : tensor;
}

// The layer whose keys or values a tensor of llama.cpp holds, by its name; -1 for any other tensor.
int layer_of(const ggml_tensor* tensor) {
  const std::string_view name = root_of(tensor)->name;
  if (!name.starts_with(kKeyCache) && !name.starts_with(kValueCache)) return -1;
  int layer = -1;
  return std::sscanf(name.data() + kKeyCache.size(), "%d", &layer) == 1 ? layer : -1;
}

// That writes to a cache: new tokens, or a shift of positions where the keys are.
bool writes_cache(const ggml_tensor* op) {
  switch (op->op) {
    case GGML_OP_SET_ROWS:
    case GGML_OP_ROPE:
    case GGML_OP_CPY:
      return op->view_src != nullptr && layer_of(op) >= 0;
    default:
      return false;
  }
}

GgmlTensor view_of(const ggml_tensor* tensor) {
  GgmlTensor view{.data = tensor->data, .type = static_cast<GgmlType>(tensor->type)};
  std::copy_n(tensor->ne, 4, view.ne);
  std::copy_n(tensor->nb, 4, view.nb);
  return view;
}

float parameter(const ggml_tensor* op, int number) {
  float value = 0.0F;
  std::memcpy(&value, reinterpret_cast<const char*>(op->op_params) + number * 4, sizeof(value));
  return value;
}

Shape shape_of(const ggml_tensor* op) {
  return {.query_heads = static_cast<int>(op->src[0]->ne[2]),
          .kv_heads = static_cast<int>(op->src[1]->ne[2]),
          .head_dim = static_cast<int>(op->src[1]->ne[0]),
          .value_dim = static_cast<int>(op->src[2]->ne[0])};
}

// Few query rows for each stream, over a cache that the library reads.
bool is_supported_attention(const ggml_tensor* op, int max_rows) {
  const ggml_tensor* q = op->src[0];
  const ggml_tensor* k = op->src[1];
  const ggml_tensor* v = op->src[2];
  const ggml_tensor* mask = op->src[3];
  if (layer_of(k) < 0 || mask == nullptr || q->type != GGML_TYPE_F32 || q->ne[1] > max_rows)
    return false;
  const bool types = k->type == v->type && (k->type == GGML_TYPE_F16 || k->type == GGML_TYPE_Q8_0);
  const bool rows = k->nb[0] == ggml_type_size(k->type) && v->nb[0] == ggml_type_size(v->type) &&
                    q->nb[0] == sizeof(float);
  const bool masked = mask->type == GGML_TYPE_F16 && mask->ne[0] >= k->ne[1] && mask->ne[2] == 1 &&
                      mask->ne[3] == q->ne[3] && mask->nb[0] == sizeof(fp16);
  constexpr int kMaxBias = 1;
  return types && rows && masked && k->ne[3] == q->ne[3] && k->ne[1] <= INT32_MAX &&
         parameter(op, kMaxBias) == 0.0F && q->ne[2] % k->ne[2] == 0 &&
         q->ne[2] / k->ne[2] <= kMaxGroup && k->ne[0] <= kMaxDim && v->ne[0] <= kMaxDim;
}

// One stream of a layer's cache. The cells that were written are noted from the first step on, as
// its index is made of the cells as they are then.
struct Stream {
  std::unique_ptr<LayerAttention> attention;
  CellSet written;
  StreamCache cache;  // as of the last step
};

/// What the device keeps for a context.
class Context {
 public:
  explicit Context(const Settings& settings) : settings_(settings) {
    cpu_ = ggml_backend_cpu_init();
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context() { ggml_backend_free(cpu_); }

  void use(const Settings& settings) {
    settings_ = settings;
    invalidate();
  }
  void invalidate() { layers_.clear(); }
  void set_threads(int threads) { threads_ = threads; }
  [[nodiscard]] const Totals& totals() const { return totals_; }
  void reset_totals() { totals_ = {}; }

  [[nodiscard]] std::size_t index_bytes() const {
    std::size_t bytes = 0;
    for (const auto& [layer, streams] : layers_) {
      for (const auto& [number, stream] : streams) bytes += stream.attention->index_bytes();
    }
    return bytes;
  }

  [[nodiscard]] Status verify() const {
    for (const auto& [layer, streams] : layers_) {
      for (const auto& [number, stream] : streams) {
        const Status status = stream.attention->verify(stream.cache);
        if (!status.ok()) return status;
      }
    }
    return Status();
  }

  ggml_status compute(ggml_cgraph* graph) {
    for (int i = 0; i < ggml_graph_n_nodes(graph); ++i) {
      ggml_tensor* node = ggml_graph_node(graph, i);
      if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        const Status status = attend(node);
        if (status.ok()) continue;
        ++totals_.fallbacks;
        totals_.error = status.message();
      } else if (writes_cache(node)) {
        note_written(node);
      } else {
        continue;  // views
      }
      const ggml_status status = compute_on_cpu(node);
      if (status != GGML_STATUS_SUCCESS) return status;
    }
    return GGML_STATUS_SUCCESS;
  }

 private:
  // By a backend of our own for CPUs, on a graph of this node alone.
  ggml_status compute_on_cpu(ggml_tensor* node) {
    // A row or two are written faster than threads are woken.
    const bool small = node->op == GGML_OP_SET_ROWS && ggml_nrows(node->src[0]) <= 8;
    ggml_backend_cpu_set_n_threads(cpu_, small ? 1 : threads_);
    memory_.resize(ggml_tensor_overhead() + ggml_graph_overhead_custom(1, false));
    ggml_context* context =
        ggml_init({.mem_size = memory_.size(), .mem_buffer = memory_.data(), .no_alloc = true});
    ggml_cgraph* graph = ggml_new_graph_custom(context, 1, false);
    ggml_graph_add_node(graph, node);
    const ggml_status status = ggml_backend_graph_compute(cpu_, graph);
    ggml_free(context);
    return status;
  }

  void note_written(const ggml_tensor* node) {
    const auto found = layers_.find(layer_of(node));
    if (found == layers_.end()) return;  // never attended to: its index sees the cells as they are
    const ggml_tensor* root = root_of(node);
    const std::int64_t cells = root->ne[1];  // of a stream
    if (node->op != GGML_OP_SET_ROWS) {
      for (auto& [number, stream] : found->second) {
        stream.written.add({.begin = 0, .end = static_cast<TokenId>(cells)});
      }
      return;
    }
    const ggml_tensor* ids = node->src[1];
    for (std::int64_t i = 0; i < ids->ne[0]; ++i) {
      const char* at =
          static_cast<const char*>(ids->data) + i * static_cast<std::int64_t>(ids->nb[0]);
      std::int64_t id = 0;
      if (ids->type == GGML_TYPE_I64) {
        std::memcpy(&id, at, sizeof(id));
      } else {
        std::int32_t narrow = 0;
        std::memcpy(&narrow, at, sizeof(narrow));
        id = narrow;
      }
      const auto stream = found->second.find(static_cast<int>(id / cells));
      if (stream == found->second.end()) continue;
      stream->second.written.add(static_cast<TokenId>(id % cells));
    }
  }

  Status attend(ggml_tensor* op) {
    const int layer = layer_of(op->src[1]);
    const ggml_tensor* root = root_of(op->src[1]);
    // Streams are one behind the other in the cache; those of this step begin at its first.
    const auto offset =
        static_cast<const char*>(op->src[1]->data) - static_cast<const char*>(root->data);
    const int first =
        root->ne[2] > 1 ? static_cast<int>(offset / static_cast<std::int64_t>(root->nb[2])) : 0;
    const auto streams = static_cast<int>(op->src[0]->ne[3]);
    for (int i = 0; i < streams; ++i) {
      const Status status = attend(op, layer, first + i, i);
      if (!status.ok()) return status;
    }
    ++totals_.attentions;
    return Status();
  }

  // Stream `number` of the context, `i` of the step.
  Status attend(ggml_tensor* op, int layer, int number, int i) {
    const Shape shape = shape_of(op);
    auto& streams = layers_[layer];
    if (!streams.contains(number)) {
      auto made = make_layer_attention(settings_, shape, layer);
      if (!made.ok()) return made.status();
      streams[number].attention = std::move(*made);
    }
    Stream& stream = streams[number];
    stream.cache = {.keys = view_of(op->src[1]), .values = view_of(op->src[2]), .stream = i};

    const auto rows = static_cast<std::size_t>(op->src[0]->ne[1]);
    const auto heads = static_cast<std::size_t>(shape.query_heads);
    visible_.resize(rows);
    rows_.resize(rows);
    states_.resize(rows * heads);
    gather_queries(op, i);
    for (std::size_t row = 0; row < rows; ++row) {
      if (!visible_[row].read(mask_row(op, row, i))) {
        return Status::error(ErrorCode::kInvalidArgument,
                             "layer %d: the mask has other numbers than 0 and -inf", layer);
      }
      const std::span states = std::span(states_).subspan(row * heads, heads);
      for (std::size_t h = 0; h < heads; ++h) {
        char* out = static_cast<char*>(op->data) + h * op->nb[1] + row * op->nb[2] +
                    static_cast<std::size_t>(i) * op->nb[3];
        states[h].out = {reinterpret_cast<float*>(out), static_cast<std::size_t>(shape.value_dim)};
      }
      const auto size = heads * static_cast<std::size_t>(shape.head_dim);
      rows_[row] = {.query = std::span(queries_).subspan(row * size, size),
                    .states = states,
                    .visible = &visible_[row]};
    }
    const ggml_tensor* sinks = op->src[4];
    constexpr int kScale = 0;
    constexpr int kSoftCap = 2;
    const Step step{
        .cache = stream.cache,
        .shape = shape,
        .scale = parameter(op, kScale),
        .logits = {.soft_cap = parameter(op, kSoftCap),
                   .sink_logits = sinks == nullptr
                                      ? std::span<const float>()
                                      : std::span(static_cast<const float*>(sinks->data), heads)},
        .rows = rows_,
        .seed = settings_.seed + static_cast<std::uint64_t>(number),
        .threads = threads_};
    return stream.attention->attend(step, stream.written, workspace_, totals_);
  }

  // What a query row sees of its stream.
  static std::span<const fp16> mask_row(const ggml_tensor* op, std::size_t row, int stream) {
    const ggml_tensor* mask = op->src[3];
    const char* data = static_cast<const char*>(mask->data) + row * mask->nb[1] +
                       static_cast<std::size_t>(stream) * mask->nb[3];
    return {reinterpret_cast<const fp16*>(data), static_cast<std::size_t>(op->src[1]->ne[1])};
  }

  // [rows, query_heads, head_dim]
  void gather_queries(const ggml_tensor* op, int stream) {
    const ggml_tensor* q = op->src[0];
    const auto dim = static_cast<std::size_t>(q->ne[0]);
    const auto rows = static_cast<std::size_t>(q->ne[1]);
    const auto heads = static_cast<std::size_t>(q->ne[2]);
    queries_.resize(rows * heads * dim);
    const char* data =
        static_cast<const char*>(q->data) + static_cast<std::size_t>(stream) * q->nb[3];
    float* to = queries_.data();
    for (std::size_t row = 0; row < rows; ++row) {
      for (std::size_t h = 0; h < heads; ++h, to += dim) {
        std::memcpy(to, data + row * q->nb[1] + h * q->nb[2], dim * sizeof(float));
      }
    }
  }

  Settings settings_;
  ggml_backend_t cpu_ = nullptr;
  int threads_ = 1;
  std::map<int, std::map<int, Stream>> layers_;
  // Of the rows of a step.
  std::vector<VisibleCells> visible_;
  std::vector<StepRow> rows_;
  std::vector<float> queries_;
  std::vector<AttentionState> states_;
  std::vector<std::byte> workspace_;
  std::vector<std::byte> memory_;
  Totals totals_;
};

// All of the process.
struct Registered {
  std::mutex mutex;
  std::vector<Context*> contexts;
  Settings settings;
};

Registered& registered() {
  static Registered all;
  return all;
}

Context& context_of(ggml_backend_t backend) { return *static_cast<Context*>(backend->context); }

// The tables of functions that ggml calls.

const char* device_name(ggml_backend_dev_t) { return "magicpig"; }
const char* backend_name(ggml_backend_t) { return "magicpig"; }
const char* registry_name(ggml_backend_reg_t) { return "magicpig"; }
const char* device_description(ggml_backend_dev_t) {
  return "sampled attention of generated tokens";
}

void free_backend(ggml_backend_t backend) {
  const std::unique_ptr<Context> context(&context_of(backend));
  const std::lock_guard lock(registered().mutex);
  std::erase(registered().contexts, context.get());
  delete backend;
}

// Exceptions, of memory that is short, end here: the caller is C.
ggml_status compute_graph(ggml_backend_t backend, ggml_cgraph* graph) {
  try {
    return context_of(backend).compute(graph);
  } catch (...) {
    return GGML_STATUS_ALLOC_FAILED;
  }
}

void set_threads(ggml_backend_t backend, int threads) { context_of(backend).set_threads(threads); }

ggml_backend_t make_backend_of(ggml_backend_dev_t device, const char*) {
  static ggml_guid guid = {0x6d, 0x61, 0x67, 0x69, 0x63, 0x70, 0x69, 0x67,
                           0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x2d, 0x30, 0x31};
  const std::lock_guard lock(registered().mutex);
  auto context = std::make_unique<Context>(registered().settings);
  auto* backend = new ggml_backend{};
  backend->guid = &guid;
  backend->iface.get_name = backend_name;
  backend->iface.free = free_backend;
  backend->iface.graph_compute = compute_graph;
  backend->device = device;
  registered().contexts.push_back(context.get());
  backend->context = context.release();
  return backend;
}

// None of its own: it works in the CPU's memory.
void device_memory(ggml_backend_dev_t, std::size_t* free, std::size_t* total) {
  *free = *total = 0;
}
ggml_backend_buffer_type_t buffer_type(ggml_backend_dev_t) {
  return ggml_backend_cpu_buffer_type();
}
bool supports_buffer_type(ggml_backend_dev_t, ggml_backend_buffer_type_t type) {
  return ggml_backend_buft_is_host(type);
}
// Accelerators work beside the CPU, and every context makes a backend of each.
enum ggml_backend_dev_type device_type(ggml_backend_dev_t) {
  return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

void device_properties(ggml_backend_dev_t device, ggml_backend_dev_props* properties) {
  *properties = {};
  properties->name = device_name(device);
  properties->description = device_description(device);
  properties->type = device_type(device);
}

int max_rows() {
  const std::lock_guard lock(registered().mutex);
  return registered().settings.max_rows;
}

bool supports_operation(ggml_backend_dev_t, const ggml_tensor* op) {
  switch (op->op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
      return true;
    case GGML_OP_FLASH_ATTN_EXT:
      return is_supported_attention(op, max_rows());
    default:
      return writes_cache(op);
  }
}

std::size_t device_count(ggml_backend_reg_t) { return 1; }

ggml_backend_dev_t the_device(ggml_backend_reg_t registry, std::size_t) {
  static ggml_backend_device device = [&] {
    ggml_backend_device made{};
    made.iface.get_name = device_name;
    made.iface.get_description = device_description;
    made.iface.get_memory = device_memory;
    made.iface.get_type = device_type;
    made.iface.get_props = device_properties;
    made.iface.init_backend = make_backend_of;
    made.iface.get_buffer_type = buffer_type;
    made.iface.supports_op = supports_operation;
    made.iface.supports_buft = supports_buffer_type;
    made.reg = registry;
    return made;
  }();
  return &device;
}

// llama.cpp asks for it and calls it before each graph.
void* function_named(ggml_backend_reg_t, const char* name) {
  if (std::string_view(name) != "ggml_backend_set_n_threads") return nullptr;
  return reinterpret_cast<void*>(static_cast<ggml_backend_set_n_threads_t>(set_threads));
}

template <class Function>
void for_each_context(const Function& function) {
  const std::lock_guard lock(registered().mutex);
  for (Context* context : registered().contexts) function(*context);
}

}  // namespace

void register_device() {
  static ggml_backend_reg registry = [] {
    ggml_backend_reg made{};
    made.api_version = GGML_BACKEND_API_VERSION;
    made.iface.get_name = registry_name;
    made.iface.get_device_count = device_count;
    made.iface.get_device = the_device;
    made.iface.get_proc_address = function_named;
    return made;
  }();
  static const bool once = [] {
    ggml_backend_register(&registry);
    return true;
  }();
  (void)once;
}

void use(const Settings& settings) {
  {
    const std::lock_guard lock(registered().mutex);
    registered().settings = settings;
  }
  for_each_context([&](Context& context) { context.use(settings); });
}

void invalidate() {
  for_each_context([](Context& context) { context.invalidate(); });
}

std::size_t index_bytes() {
  std::size_t bytes = 0;
  for_each_context([&](const Context& context) { bytes += context.index_bytes(); });
  return bytes;
}

Totals totals() {
  Totals sum;
  for_each_context([&](const Context& context) {
    const Totals& one = context.totals();
    sum.counted += one.counted;
    sum.rows_read += one.rows_read;
    sum.bytes += one.bytes;
    sum.attentions += one.attentions;
    sum.fallbacks += one.fallbacks;
    if (!one.error.empty()) sum.error = one.error;
  });
  return sum;
}

void reset_totals() {
  for_each_context([](Context& context) { context.reset_totals(); });
}

Status verify_indexes() {
  Status status;
  for_each_context([&](const Context& context) {
    if (status.ok()) status = context.verify();
  });
  return status;
}

}  // namespace magicpig::llama
