// The layers of lean.py from C++: the same calls on the same tensors, so the same bits, without Python between them. Only
// products of bfloat16 on processors with AVX512-BF16 are its own. native.py compiles this file. Shapes are lean.py's.

#include <ATen/TensorIterator.h>
#include <torch/extension.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

template <class Signature>
auto find(const char* name, const char* overload) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

using Scalars = c10::List<std::optional<at::Scalar>>;

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define BF16_PRODUCTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

bool has_bf16_products() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

// Multiplies kRows rows of bfloat16, `pairs` times two inputs, with 16 * kWide columns of a weight; the sums are float32.
// `weight` has two inputs of a column beside each other: [pairs, 16 * kWide, 2].
template <int kRows, int kWide>
BF16_PRODUCTS inline void multiply(
    const uint16_t* const* rows, int64_t pairs, const uint16_t* weight, __m512 (&sums)[kRows][kWide]) {
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) sums[row][i] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; ++pair) {  // unrolled within, so that the sums stay in registers
    __m512i wide[kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) wide[i] = _mm512_loadu_si512(weight + 32 * (pair * kWide + i));
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
      __m512bh both = (__m512bh)_mm512_set1_epi32(reinterpret_cast<const int32_t*>(rows[row])[pair]);
#pragma GCC unroll 4
      for (int i = 0; i < kWide; ++i) sums[row][i] = _mm512_dpbf16_ps(sums[row][i], both, (__m512bh)wide[i]);
    }
  }
}

// Computes 16 * kWide columns of the product of kRows rows; adds them to what `out` holds, or replaces it.
template <int kRows, int kWide>
BF16_PRODUCTS void columns_of(
    const uint16_t* const* rows, int64_t pairs, const uint16_t* weight, uint16_t* const* out, int64_t first, bool adds) {
  __m512 sums[kRows][kWide];
  multiply<kRows, kWide>(rows, pairs, weight, sums);
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) {
      auto* place = reinterpret_cast<__m256i*>(out[row] + first + 16 * i);
      if (adds) {
        __m512i held = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(place)), 16);
        sums[row][i] = _mm512_add_ps(sums[row][i], _mm512_castsi512_ps(held));
      }
      _mm256_storeu_si256(place, (__m256i)_mm512_cvtneps_pbh(sums[row][i]));
    }
  }
}

template <int kWide>
void columns_of(
    const std::vector<const uint16_t*>& rows, int64_t pairs, const uint16_t* weight, const std::vector<uint16_t*>& out,
    int64_t first, bool adds) {
  size_t row = 0;
  for (; row + 4 <= rows.size(); row += 4)
    columns_of<4, kWide>(&rows[row], pairs, weight, &out[row], first, adds);
  for (; row < rows.size(); ++row)
    columns_of<1, kWide>(&rows[row], pairs, weight, &out[row], first, adds);
}

// Calls `work` with 0, 1, ..., count - 1 from torch's threads. at::parallel_for would need an OpenMP runtime of this
// library's own; a loop over a tensor runs in torch's.
template <class Work>
void in_parallel(int64_t count, const Work& work) {
  static const Tensor numbers = at::arange(1 << 16);
  Tensor some = numbers.narrow(0, 0, count);
  at::TensorIterator all = at::TensorIterator::nullary_op(some);
  all.for_each(
      [&](char** data, const int64_t* strides, int64_t n) {
        for (int64_t i = 0; i < n; ++i) work(*reinterpret_cast<int64_t*>(data[0] + i * strides[0]));
      },
      1);
}

// The product of bfloat16 rows with a weight that two_by_two has laid out. Its sums are float32, rounded once.
void product_of(
    const std::vector<const uint16_t*>& rows, const Tensor& weight, const std::vector<uint16_t*>& out, bool adds) {
  auto* data = static_cast<const uint16_t*>(weight.const_data_ptr());
  int64_t pairs = weight.size(1), chunk = weight.size(2);
  in_parallel(weight.size(0), [&](int64_t number) {
    const uint16_t* part = data + number * pairs * chunk * 2;
    if (chunk == 64) columns_of<4>(rows, pairs, part, out, number * chunk, adds);
    if (chunk == 32) columns_of<2>(rows, pairs, part, out, number * chunk, adds);
    if (chunk == 16) columns_of<1>(rows, pairs, part, out, number * chunk, adds);
  });
}
#else
bool has_bf16_products() { return false; }
void product_of(const std::vector<const uint16_t*>&, const Tensor&, const std::vector<uint16_t*>&, bool) {}
#endif

// Lays out a weight [outputs, inputs] for product_of: inputs two by two, [outputs / chunk, inputs / 2, chunk, 2].
Tensor two_by_two(const Tensor& weight, int64_t chunk) {
  return weight.view({-1, chunk, weight.size(1) / 2, 2}).transpose(1, 2).contiguous();
}

// The same for the weight of a linear layer.
Tensor laid_out(const Tensor& weight) {
  int64_t outputs = weight.size(0);
  return two_by_two(weight.contiguous(), outputs % 64 == 0 ? 64 : outputs % 32 == 0 ? 32 : 16);
}

// Adds the product of `rows` with a weight that was laid out to `out` [rows, outputs], or replaces it.
void multiply_rows(const Tensor& rows, const Tensor& weight, Tensor& out, bool adds) {
  std::vector<const uint16_t*> from;
  std::vector<uint16_t*> to;
  for (int64_t n = 0; n < rows.size(0); ++n) {
    from.push_back(static_cast<const uint16_t*>(rows.const_data_ptr()) + n * rows.stride(0));
    to.push_back(static_cast<uint16_t*>(out.data_ptr()) + n * out.stride(0));
  }
  product_of(from, weight, to, adds);
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
        Tensor out = at::empty({rows.size(0), weights[0].size(0) * weights[0].size(2)}, rows.options());
        if (bias) out.copy_(*bias);
        multiply_rows(rows.contiguous(), weights[0], out, bias.has_value());
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
      multiply_rows(rows.contiguous(), weights[0], out, true);
      return out;
    }
    if (kind != kPacked) return residual + of(rows);
    static auto product =
        find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Optional&, std::string_view)>(
            "mkldnn::_linear_pointwise", "binary");
    return product.call(rows, residual, weights[0], bias, "add");
  }

 private:
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
};

// The rows of masks in a forward: adjacent ones, or their numbers.
struct Masks {
  int64_t first, count;
  Optional numbers;
};

// The two weights beside a linear layer, as Pair in draft_weights.py describes them. A library's product of so few rows
// and columns mostly waits for its own call, eight times in a layer; so there is one for bfloat16 here.
struct Pair {
  static constexpr int64_t kMost = 96;  // rows; of more, a library's product is faster
  Tensor a, b;
  Optional a_pairs, b_pairs;  // their inputs two by two, [chunks of outputs, inputs / 2, outputs in a chunk, 2]

  Pair(Tensor a, Tensor b) : a(a), b(b) {
    bool fits = a.size(0) % 16 == 0 && b.size(0) % 16 == 0 && a.size(1) % 2 == 0 && a.scalar_type() == at::kBFloat16;
    if (fits && has_bf16_products()) a_pairs = in_chunks(a), b_pairs = in_chunks(b);
  }

  void add(Tensor& out, const Tensor& x, const Masks& masks) const {
    int64_t count = masks.numbers ? masks.numbers->size(0) : masks.count;
    if (a_pairs && count <= kMost && out.stride(1) == 1 && x.stride(1) == 1) return add_few(out, x, masks, count);
    if (masks.numbers) {
      Tensor inner = at::linear(x.index({*masks.numbers}), a);
      out.index_add_(0, *masks.numbers, at::linear(inner, b));
      return;
    }
    Tensor rows = out.narrow(0, masks.first, masks.count);
    at::addmm_out(rows, rows, at::linear(x.narrow(0, masks.first, masks.count), a), b.t());
  }

 private:
  static Tensor in_chunks(const Tensor& weight) {
    return two_by_two(weight, weight.size(0) % 64 || weight.size(0) < 256 ? 16 : 64);
  }

  void add_few(Tensor& out, const Tensor& x, const Masks& masks, int64_t count) const {
    Tensor inner = at::empty({count, a.size(0)}, x.options());
    std::vector<const uint16_t*> from, through;
    std::vector<uint16_t*> within, to;
    for (int64_t n = 0; n < count; ++n) {
      int64_t row = masks.numbers ? masks.numbers->const_data_ptr<int64_t>()[n] : masks.first + n;
      from.push_back(static_cast<const uint16_t*>(x.const_data_ptr()) + row * x.stride(0));
      to.push_back(static_cast<uint16_t*>(out.data_ptr()) + row * out.stride(0));
      within.push_back(static_cast<uint16_t*>(inner.data_ptr()) + n * a.size(0));
      through.push_back(within.back());
    }
    product_of(from, *a_pairs, within, false);
    product_of(through, *b_pairs, to, true);
  }
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

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using release = py::call_guard<py::gil_scoped_release>;
  const py::module_local local;  // other libraries may have classes of these names
  py::class_<Product>(module, "Product", local)
      .def(py::init<std::string, std::vector<Tensor>, Optional, std::vector<int64_t>>())
      .def("of", &Product::of, release())
      .def("added", &Product::added, release());
  module.def("has_bf16_products", &has_bf16_products);
  module.def("laid_out", &laid_out);
  py::class_<Norm>(module, "Norm", local).def(py::init<Tensor, double>());
  py::class_<Masks>(module, "Masks", local).def(py::init<int64_t, int64_t, Optional>());
  py::class_<Pair>(module, "Pair", local).def(py::init<Tensor, Tensor>());
  py::class_<Layer>(module, "Layer", local)
      .def(py::init([](Norm a, Product b, Optional c, double d, Product e, Norm f, Product g, Product h, int64_t i,
                       int64_t j, int64_t k) { return Layer{a, b, c, d, e, f, g, h, i, j, k, {}, {}, {}, {}}; }))
      .def("set_pairs", &Layer::set_pairs)
      .def("before", &Layer::before, release())
      .def("after", &Layer::after, release());
}
