// The layers of lean.py in C++. Where all products of the layers are of lean_avx512.h, it computes whole layers with the
// kernels there; else it makes lean.py's calls around attention, on the same tensors, so with the same bits. native.py
// compiles this file. Shapes are lean.py's.

#include <ATen/TensorIterator.h>
#include <torch/extension.h>
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define TIDAR_AVX512
#include "lean_avx512.h"
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

template <class Signature>
auto find(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

using Scalars = c10::List<std::optional<at::Scalar>>;

// Whether lean_avx512.h has kernels of this dtype for this processor.
bool has_own_kernels(at::ScalarType dtype) {
#ifdef TIDAR_AVX512
  bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  return has && (dtype == at::kFloat || (dtype == at::kBFloat16 && __builtin_cpu_supports("avx512bf16")));
#else
  return false;
#endif
}

bool is_half(const Tensor& tensor) { return tensor.scalar_type() == at::kBFloat16; }

template <class Number>
Number* numbers_of(const Tensor& tensor) {
  return static_cast<Number*>(tensor.data_ptr());
}

// Calls `work` with a number of the tensor's dtype: a float, or a uint16_t for bfloat16.
template <class Work>
void with_numbers(const Tensor& tensor, const Work& work) {
  is_half(tensor) ? work(uint16_t()) : work(float());
}

// Calls `work` with 0, 1, ..., count - 1 from torch's threads. at::parallel_for would need an OpenMP runtime of this
// library's own; a loop over a tensor runs in torch's. To prepare one takes as long as a small product, so it is kept.
template <class Work>
void in_parallel(int64_t count, const Work& work) {
  thread_local std::unordered_map<int64_t, at::TensorIterator> kept;
  auto found = kept.find(count);
  if (found == kept.end()) {
    if (kept.size() > 1000) kept.clear();
    Tensor numbers = at::arange(count);
    found = kept.emplace(count, at::TensorIterator::nullary_op(numbers)).first;
  }
  found->second.for_each(
      [&](char** data, const int64_t* strides, int64_t n) {
        for (int64_t i = 0; i < n; ++i) work(*reinterpret_cast<int64_t*>(data[0] + i * strides[0]));
      },
      1);
}

// Calls `work` with each row, in several threads if the rows have many numbers.
template <class Work>
void for_rows(int64_t rows, int64_t numbers, const Work& work) {
  if (rows * numbers >= 1 << 14) return in_parallel(rows, work);
  for (int64_t row = 0; row < rows; ++row) work(row);
}

// Lays out a weight [outputs, inputs] for OwnProduct: [outputs / 16, units, 16, numbers of a unit].
Tensor laid_out(const Tensor& weight) {
  int64_t unit = is_half(weight) ? 2 : 1;
  return weight.reshape({-1, 16, weight.size(1) / unit, unit}).transpose(1, 2).contiguous();
}

std::vector<void*> rows_of(const Tensor& tensor) {
  std::vector<void*> rows;
  int64_t bytes = tensor.stride(0) * tensor.element_size();
  for (int64_t n = 0; n < tensor.size(0); ++n) rows.push_back(static_cast<char*>(tensor.data_ptr()) + n * bytes);
  return rows;
}

// The product of rows with a weight that was laid out, in parts. Its sums are float32, rounded once, and replace
// what `out` holds or are added to it.
class OwnProduct {
 public:
#ifdef TIDAR_AVX512
  OwnProduct(const std::vector<void*>& rows, const Tensor& weight, const std::vector<void*>& out, bool adds)
      : room_(at::empty({static_cast<int64_t>(rows.size()) * weight.size(1)}, at::kInt)),
        product_(
            rows, weight.size(1), static_cast<const int32_t*>(weight.const_data_ptr()), weight.size(0) * 16,
            is_half(weight), out, adds, room_.mutable_data_ptr<int32_t>()) {}

  int64_t parts() const { return product_.parts(); }
  void compute(int64_t part) const { product_.compute(part); }

 private:
  Tensor room_;
  avx512::Product product_;
#else
  template <class... Arguments>
  explicit OwnProduct(const Arguments&...) {}

  int64_t parts() const { return 0; }
  void compute(int64_t) const {}
#endif
};

// Computes products that do not depend on each other, in one pass of the threads.
void compute(std::initializer_list<const OwnProduct*> products) {
  int64_t parts = 0;
  for (auto* product : products) parts += product->parts();
  in_parallel(parts, [&](int64_t part) {
    for (auto* product : products) {
      if (part < product->parts()) return product->compute(part);
      part -= product->parts();
    }
  });
}

// A product with fixed weights, as Product.kernel describes it (products.py, quantized.py).
struct Product {
  enum Kind { kPlain, kPacked, kOwn, kInt8, kInt4 } kind;
  std::vector<Tensor> weights;
  Optional bias;
  std::vector<int64_t> sizes;

  Product(const std::string& name, std::vector<Tensor> tensors, Optional bias, std::vector<int64_t> sizes)
      : weights(tensors), bias(bias), sizes(sizes) {
    static const std::vector<std::string> names{"plain", "packed", "own", "int8", "int4"};  // in the order of Kind
    auto found = std::find(names.begin(), names.end(), name);
    TORCH_CHECK(found != names.end(), "no kernel ", name);
    kind = static_cast<Kind>(found - names.begin());
  }

  Tensor of(const Tensor& rows) const {
    switch (kind) {
      case kPlain:
        return at::linear(rows, weights[0], bias);
      case kPacked: {
        static auto product = find<Tensor(
            const Tensor&, const Tensor&, const Optional&, std::string_view, Scalars, std::optional<std::string_view>)>(
            "mkldnn::_linear_pointwise", "");
        return product.call(rows, weights[0], bias, "none", Scalars(), "");
      }
      case kOwn: {
        Tensor out = empty(rows);
        if (bias) out.copy_(*bias);
        multiply(rows, out, bias.has_value());
        return out;
      }
      case kInt8:
        return with_bias(int8(rows, weights[0], weights[1], weights[2], weights[3]));
      default:
        return with_bias(int4(rows, weights[0], weights[1], sizes[0], sizes[1]));
    }
  }

  Tensor added(const Tensor& residual, const Tensor& rows) const {
    if (kind == kOwn && !bias) {
      Tensor out = residual.clone(at::MemoryFormat::Contiguous);
      multiply(rows, out, true);
      return out;
    }
    if (kind != kPacked) return residual + of(rows);
    static auto product =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&, std::string_view)>(
            "mkldnn::_linear_pointwise", "binary");
    return product.call(rows, residual, weights[0], bias, "add");
  }

  // Of an own product: room for its output, and its parts, which add to `out` or replace it.
  Tensor empty(const Tensor& rows) const {
    return at::empty({rows.size(0), weights[0].size(0) * 16}, rows.options());
  }

  OwnProduct own(const Tensor& rows, Tensor& out, bool adds) const {
    return OwnProduct(rows_of(rows), weights[0], rows_of(out), adds);
  }

 private:
  void multiply(const Tensor& rows, Tensor& out, bool adds) const {
    Tensor whole = rows.contiguous();
    OwnProduct product = own(whole, out, adds);
    compute({&product});
  }

  Tensor with_bias(Tensor product) const { return bias ? product + *bias : product; }

  static Tensor int8(
      const Tensor& rows, const Tensor& blocks, const Tensor& scales, const Tensor& zeros, const Tensor& factors) {
    static auto product = find<Tensor(
        Tensor, double, int64_t, Tensor, Tensor, Tensor, Optional, double, int64_t, std::optional<at::ScalarType>,
        std::string_view, Scalars, std::string_view)>("onednn::qlinear_pointwise", "");
    Tensor wide = rows * factors;
    Tensor largest = wide.abs().amax(-1, true).clamp_(1e-30);
    Tensor steps = wide.mul(largest.reciprocal().mul_(127)).round_();  // Python divides 127 by a tensor in this way
    Tensor bytes = steps.to(at::kChar).view(at::kByte).bitwise_xor_(128);
    Tensor out = product.call(
        bytes, 1.0, 128, blocks, scales, zeros, std::nullopt, 1.0, 0, at::kFloat, "none", Scalars(), "");
    return out.mul_(largest).to(rows.scalar_type());
  }

  static Tensor int4(
      const Tensor& rows, const Tensor& blocks, const Tensor& scales, int64_t outputs, int64_t group) {
    return at::_weight_int4pack_mm_for_cpu(rows.contiguous(), blocks, group, scales).narrow(1, 0, outputs);
  }
};

// An RMSNorm; of half precision the LayerNorm of [x, -x], with the weight twice.
struct Norm {
  Tensor weight;
  double eps;

  Tensor of(const Tensor& x) const {
    if (!at::isReducedFloatingType(x.scalar_type())) return at::rms_norm(x, weight.sizes(), weight, eps);
    Tensor both = at::cat({x, x.neg()}, -1);
    return at::layer_norm(both, weight.sizes(), weight, {}, eps).narrow(-1, 0, x.size(-1));
  }

  Tensor own(const Tensor& x) const {
    Tensor out = at::empty_like(x);
#ifdef TIDAR_AVX512
    int64_t size = x.size(1);
    with_numbers(x, [&](auto number) {
      auto *from = numbers_of<decltype(number)>(x), *to = numbers_of<decltype(number)>(out);
      auto* weights = numbers_of<decltype(number)>(weight);
      for_rows(x.size(0), size, [=, eps = eps](int64_t row) {
        avx512::rms_norm(from + row * size, weights, to + row * size, size, static_cast<float>(eps));
      });
    });
#endif
    return out;
  }
};

// The rows of masks in a forward: adjacent ones, or their numbers.
struct Masks {
  int64_t first, count;
  Optional numbers;

  int64_t size() const { return numbers ? numbers->size(0) : count; }

  template <class Row>
  std::vector<Row> of(const std::vector<Row>& rows) const {
    if (!numbers) return {rows.begin() + first, rows.begin() + first + count};
    std::vector<Row> some;
    for (int64_t n = 0; n < size(); ++n) some.push_back(rows[numbers->const_data_ptr<int64_t>()[n]]);
    return some;
  }
};

// The two weights beside a linear layer, as Pair in draft_weights.py describes them. A library's product of so few rows
// and columns mostly waits for its own call, eight times in a layer; so these are own products where they fit.
struct Pair {
  static constexpr int64_t kMost = 96;  // rows; of more, a library's product is faster
  Tensor a, b;
  Optional a_pairs, b_pairs;  // laid out

  Pair(Tensor a, Tensor b) : a(a), b(b) {
    bool fits = a.size(0) % 16 == 0 && b.size(0) % 16 == 0 && a.size(1) % 2 == 0;
    if (fits && has_own_kernels(a.scalar_type())) a_pairs = laid_out(a), b_pairs = laid_out(b);
  }

  void add(Tensor& out, const Tensor& x, const Masks& masks) const {
    if (is_own(masks) && out.stride(1) == 1 && x.stride(1) == 1) {
      Tensor inner = empty(x, masks);
      OwnProduct first = into(inner, x, masks);
      compute({&first});
      OwnProduct second = out_of(inner, out, masks);
      return compute({&second});
    }
    if (masks.numbers) {
      Tensor inner = at::linear(x.index({*masks.numbers}), a);
      out.index_add_(0, *masks.numbers, at::linear(inner, b));
      return;
    }
    Tensor rows = out.narrow(0, masks.first, masks.count);
    at::addmm_out(rows, rows, at::linear(x.narrow(0, masks.first, masks.count), a), b.t());
  }

  bool is_own(const Masks& masks) const { return a_pairs && masks.size() <= kMost; }

  // What is between the two weights, and the products before and after it.
  Tensor empty(const Tensor& x, const Masks& masks) const {
    return at::empty({masks.size(), a.size(0)}, x.options());
  }

  OwnProduct into(Tensor& inner, const Tensor& x, const Masks& masks) const {
    return OwnProduct(masks.of(rows_of(x)), *a_pairs, rows_of(inner), false);
  }

  OwnProduct out_of(const Tensor& inner, Tensor& out, const Masks& masks) const {
    return OwnProduct(rows_of(inner), *b_pairs, masks.of(rows_of(out)), true);
  }
};

// The sequences of a forward, for all its layers: where each has its rows and its keys, and which tokens of the forward
// may attend to which.
struct Sequences {
  struct Row {
    int64_t slot, position;  // where its key is in the pool
  };
  struct Tile {  // up to 16 queries of a sequence, of one head of keys
    int64_t slot, first_row, first_query, count, prefix, keys;
    std::vector<uint16_t> visible;
  };
  std::vector<Row> rows;
  std::vector<Tile> tiles;

  // `visible` has a bool [T, T] for each sequence; `groups` are the heads of queries per head of keys.
  Sequences(
      const std::vector<int64_t>& slots, const std::vector<int64_t>& lengths, const std::vector<Tensor>& visible,
      int64_t groups) {
    for (size_t n = 0; n < slots.size(); ++n) {
      int64_t tokens = visible[n].size(0), first_row = rows.size();
      Tensor mask = visible[n].contiguous();
      for (int64_t token = 0; token < tokens; ++token) rows.push_back({slots[n], lengths[n] + token});
      for (int64_t query = 0; query < tokens * groups; query += kQueries) {
        Tile tile{slots[n], first_row, query, std::min(kQueries, tokens * groups - query), lengths[n], lengths[n], {}};
        tile.visible.resize(tokens);
        for (int64_t lane = 0; lane < tile.count; ++lane) {
          const bool* sees = mask.const_data_ptr<bool>() + (query + lane) / groups * tokens;
          for (int64_t key = 0; key < tokens; ++key) {
            tile.visible[key] |= sees[key] << lane;
            if (sees[key]) tile.keys = std::max(tile.keys, lengths[n] + key + 1);
          }
        }
        tiles.push_back(tile);
      }
    }
  }

  static constexpr int64_t kQueries = 16;
};

// The calls of a layer before and after its attention, as Calls in lean.py describes them.
struct Layer {
  Norm before_attention;
  Product qkv;
  Optional qk_norm;  // the weights of Qwen3's norms of q and k
  double qk_eps;
  Product output;
  Norm before_mlp;
  Product gate_up, down;
  int64_t heads, kv_heads, head_dim;
  std::optional<Pair> of_qkv, of_output, of_gate_up, of_down;  // draft weights

  void set_pairs(
      std::optional<Pair> qkv, std::optional<Pair> output, std::optional<Pair> gate_up, std::optional<Pair> down) {
    of_qkv = qkv, of_output = output, of_gate_up = gate_up, of_down = down;
  }

  std::tuple<Tensor, Tensor, Tensor> before(
      const Tensor& hidden, int64_t tokens, const Tensor& cos, const Tensor& sin,
      const std::optional<Masks>& masks) const {
    Tensor x = before_attention.of(hidden);
    Tensor all = with_pair(qkv.of(x), x, of_qkv, masks).narrow(0, 0, tokens);
    all = all.view({1, tokens, -1, head_dim}).transpose(1, 2);
    Tensor qk = rotated(all.narrow(1, 0, heads + kv_heads), cos, sin);
    return {qk.narrow(1, 0, heads), qk.narrow(1, heads, kv_heads), all.narrow(1, heads + kv_heads, kv_heads)};
  }

  // The whole layer with own kernels. `keys` and `values` are the pool's, [slots, N, capacity, D].
  template <class Number>
  Tensor whole(
      const Tensor& hidden, const Tensor& cos, const Tensor& sin, const std::optional<Masks>& masks,
      const Sequences& sequences, const Tensor& keys, const Tensor& values, double scale) const {
    Tensor x = before_attention.own(hidden);
    Tensor all = own(qkv, x, of_qkv, masks);
    write<Number>(all, cos, sin, sequences, keys, values);
    Tensor out = attended<Number>(all, sequences, keys, values, scale);
    Tensor after = own(output, out, of_output, masks, hidden);
    x = before_mlp.own(after);
    Tensor inner = gated<Number>(own(gate_up, x, of_gate_up, masks));
    return own(down, inner, of_down, masks, after);
  }

  Tensor after(const Tensor& hidden, const Tensor& out, const std::optional<Masks>& masks) const {
    int64_t fill = hidden.size(0) - out.size(0);
    Tensor heads = fill ? at::constant_pad_nd(out, {0, 0, 0, fill}) : out;
    Tensor attended = with_pair(output.added(hidden, heads), heads, of_output, masks);
    Tensor x = before_mlp.of(attended);
    std::vector<Tensor> both = with_pair(gate_up.of(x), x, of_gate_up, masks).chunk(2, -1);
    Tensor inner = at::silu(both[0]).mul_(both[1]);
    return with_pair(down.added(attended, inner), inner, of_down, masks);
  }

 private:
  static Tensor with_pair(
      Tensor out, const Tensor& x, const std::optional<Pair>& pair, const std::optional<Masks>& masks) {
    if (pair && masks) pair->add(out, x, *masks);
    return out;
  }

  // A linear layer, added to `residual` if there is one. The first weight of a pair is multiplied beside its own.
  static Tensor own(
      const Product& product, const Tensor& x, const std::optional<Pair>& pair, const std::optional<Masks>& masks,
      const Optional& residual = {}) {
    if (!pair || !masks || !pair->is_own(*masks) || product.bias)
      return with_pair(residual ? product.added(*residual, x) : product.of(x), x, pair, masks);
    Tensor out = residual ? residual->clone() : product.empty(x), inner = pair->empty(x, *masks);
    OwnProduct whole = product.own(x, out, residual.has_value()), first = pair->into(inner, x, *masks);
    compute({&whole, &first});
    OwnProduct second = pair->out_of(inner, out, *masks);
    compute({&second});
    return out;
  }

  // Rotates queries and keys, and writes keys and values to the pool.
  template <class Number>
  void write(
      const Tensor& all, const Tensor& cos, const Tensor& sin, const Sequences& sequences, const Tensor& keys,
      const Tensor& values) const {
#ifdef TIDAR_AVX512
    for_rows(all.size(0), all.size(1), [&](int64_t row) {
      auto [slot, position] = sequences.rows[row];
      for (int64_t head = 0; head < heads + 2 * kv_heads; ++head) {
        Number* from = numbers_of<Number>(all) + row * all.stride(0) + head * head_dim;
        int64_t of_keys = head < heads ? 0 : (head - heads) % kv_heads;
        int64_t place = slot * keys.stride(0) + of_keys * keys.stride(1) + position * head_dim;
        if (head >= heads + kv_heads) {
          std::copy_n(from, head_dim, numbers_of<Number>(values) + place);
          continue;
        }
        if (qk_norm) avx512::rms_norm(from, numbers_of<Number>(*qk_norm) + head * head_dim, from, head_dim, qk_eps);
        Number* to = head < heads ? from : numbers_of<Number>(keys) + place;
        int64_t angles = row * head_dim;
        avx512::rotate(from, numbers_of<Number>(cos) + angles, numbers_of<Number>(sin) + angles, to, head_dim);
      }
    });
#endif
  }

  template <class Number>
  Tensor attended(
      const Tensor& all, const Sequences& sequences, const Tensor& keys, const Tensor& values, double scale) const {
    Tensor out = at::empty({all.size(0), heads * head_dim}, all.options());
#ifdef TIDAR_AVX512
    int64_t groups = heads / kv_heads;
    in_parallel(sequences.tiles.size() * kv_heads, [&](int64_t number) {
      const auto& tile = sequences.tiles[number / kv_heads];
      int64_t of_keys = number % kv_heads;
      avx512::Queries<Number> queries{{}, {}, tile.count, tile.prefix, tile.keys, tile.visible.data()};
      for (int64_t lane = 0; lane < tile.count; ++lane) {
        int64_t row = tile.first_row + (tile.first_query + lane) / groups;
        int64_t head = of_keys * groups + (tile.first_query + lane) % groups;
        queries.from[lane] = numbers_of<Number>(all) + row * all.stride(0) + head * head_dim;
        queries.out[lane] = numbers_of<Number>(out) + row * out.stride(0) + head * head_dim;
      }
      int64_t place = tile.slot * keys.stride(0) + of_keys * keys.stride(1);
      avx512::attend(queries, numbers_of<Number>(keys) + place, numbers_of<Number>(values) + place, head_dim, scale);
    });
#endif
    return out;
  }

  template <class Number>
  Tensor gated(const Tensor& both) const {
    int64_t size = both.size(1) / 2;
    Tensor out = at::empty({both.size(0), size}, both.options());
#ifdef TIDAR_AVX512
    for_rows(both.size(0), 4 * size, [&](int64_t row) {
      const Number* gate = numbers_of<Number>(both) + 2 * row * size;
      avx512::gated(gate, gate + size, numbers_of<Number>(out) + row * size, size);
    });
#endif
    return out;
  }

  Tensor rotated(Tensor x, const Tensor& cos, const Tensor& sin) const {
    if (qk_norm) {
      Tensor wide = at::isReducedFloatingType(x.scalar_type()) ? x.to(at::kFloat) : x;
      x = at::rms_norm(wide, {head_dim}, {}, qk_eps).to(x.scalar_type()) * *qk_norm;
    }
    Tensor swapped = x.roll(head_dim / 2, -1);
    Tensor out = at::empty(x.sizes(), x.options());
    return at::mul_out(out, x, cos).add_(swapped.mul_(sin));
  }
};

// All layers of a model with own kernels; `keys` and `values` are the pool's, of each layer.
Tensor through(
    const std::vector<std::shared_ptr<Layer>>& layers, Tensor hidden, const Tensor& cos, const Tensor& sin,
    const std::optional<Masks>& masks, const Sequences& sequences, const std::vector<Tensor>& keys,
    const std::vector<Tensor>& values, double scale) {
  hidden = hidden.contiguous();
  with_numbers(hidden, [&](auto number) {
    for (size_t n = 0; n < layers.size(); ++n)
      hidden = layers[n]->whole<decltype(number)>(hidden, cos, sin, masks, sequences, keys[n], values[n], scale);
  });
  return hidden;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  const py::module_local local;  // other libraries may have classes of these names
  py::class_<Product>(module, "Product", local)
      .def(py::init<std::string, std::vector<Tensor>, Optional, std::vector<int64_t>>())
      .def("of", &Product::of, release())
      .def("added", &Product::added, release());
  module.def("has_own_kernels", &has_own_kernels);
  module.def("laid_out", &laid_out);
  py::class_<Norm>(module, "Norm", local).def(py::init<Tensor, double>());
  py::class_<Masks>(module, "Masks", local).def(py::init<int64_t, int64_t, Optional>());
  py::class_<Pair>(module, "Pair", local).def(py::init<Tensor, Tensor>());
  py::class_<Sequences>(module, "Sequences", local)
      .def(py::init<std::vector<int64_t>, std::vector<int64_t>, std::vector<Tensor>, int64_t>());
  module.def("through", &through, release());
  py::class_<Layer, std::shared_ptr<Layer>>(module, "Layer", local)
      .def(py::init([](Norm a, Product b, Optional c, double d, Product e, Norm f, Product g, Product h, int64_t i,
                       int64_t j, int64_t k) { return Layer{a, b, c, d, e, f, g, h, i, j, k, {}, {}, {}, {}}; }))
      .def("set_pairs", &Layer::set_pairs)
      .def("before", &Layer::before, release())
      .def("after", &Layer::after, release());
}
