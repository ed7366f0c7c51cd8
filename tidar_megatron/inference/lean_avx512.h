// Kernels for processors with AVX-512: of float32, and of bfloat16 where they multiply it (AVX512-BF16). Sums are float32
// and rounded once. Each row is computed by itself, in an order that depends on its own inputs only, so it has the same
// bits whatever other rows there are. A unit has 32 bits: one number of float32, or two of bfloat16 (uint16_t here).
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace avx512 {

constexpr int64_t kLanes = 16;  // numbers of float32 in a register

template <class Number>
constexpr int kPerUnit = 4 / sizeof(Number);

AVX512 inline __m512 load(const float* from) { return _mm512_loadu_ps(from); }

AVX512 inline void store(float* to, __m512 values) { _mm512_storeu_ps(to, values); }

AVX512 inline __m512 load(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

AVX512 inline void store(uint16_t* to, __m512 values) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(values));
}

// Adds the products of units to a sum: in each lane that of one number, or those of two.
template <class Number>
AVX512 inline __m512 dot(__m512 sum, __m512i one, __m512i other) {
  if constexpr (kPerUnit<Number> == 2) return _mm512_dpbf16_ps(sum, (__m512bh)one, (__m512bh)other);
  return _mm512_fmadd_ps(_mm512_castsi512_ps(one), _mm512_castsi512_ps(other), sum);
}

// ---- products

// A weight is laid out as [outputs / 16, units, 16], and rows as tiles of up to 24 rows, [units, rows], in units. A tile has as many columns beside each other as there are registers for its sums, and fetches what comes next of the
// weight meanwhile: so the product of a few rows takes as long as reading the weight.
constexpr int kMostRows = 24, kRowsOfMany = 12;  // of a tile, if all rows fit into one, and if they do not

constexpr int columns_of(int rows) { return kLanes * (rows <= 4 ? 4 : rows <= 12 ? 2 : 1); }

struct Tile {
  const int32_t* rows;
  int64_t units;     // of the inputs
  void* const* out;  // of each row
  bool adds;         // whether to add to `out`, or replace it
  int64_t ahead;     // how far ahead of the unit in use weights are fetched
};

// Computes kWide times 16 columns from `first` on. All loops but that over units are unrolled: sums stay in registers.
template <class Number, int kRows, int kWide>
AVX512 void multiply(const Tile& tile, const int32_t* weight, int64_t first) {
  __m512 sums[kRows][kWide];
#pragma GCC unroll 24
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) sums[row][i] = _mm512_setzero_ps();
  const int64_t units = tile.units;
  const int32_t* rows = tile.rows;
  weight += first * units;
  for (int64_t unit = 0; unit < units; ++unit) {
    int64_t ahead = unit + tile.ahead;
    if (ahead >= units) ahead += (kWide - 1) * units;  // of the columns after these
    __m512i wide[kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + kLanes * (i * units + ahead)), _MM_HINT_T0);
      wide[i] = _mm512_loadu_si512(weight + kLanes * (i * units + unit));
    }
#pragma GCC unroll 24
    for (int row = 0; row < kRows; ++row) {
      __m512i input = _mm512_set1_epi32(rows[unit * kRows + row]);
#pragma GCC unroll 4
      for (int i = 0; i < kWide; ++i) sums[row][i] = dot<Number>(sums[row][i], input, wide[i]);
    }
  }
#pragma GCC unroll 24
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) {
      Number* place = static_cast<Number*>(tile.out[row]) + first + kLanes * i;
      store(place, tile.adds ? _mm512_add_ps(sums[row][i], load(place)) : sums[row][i]);
    }
  }
}

// Computes the columns from `first` to `end` of a tile of kRows rows.
template <class Number, int kRows>
void multiply_all(const Tile& tile, const int32_t* weight, int64_t first, int64_t end) {
  constexpr int64_t kColumns = columns_of(kRows);
  for (; first + kColumns <= end; first += kColumns) multiply<Number, kRows, kColumns / kLanes>(tile, weight, first);
  for (; first < end; first += kLanes) multiply<Number, kRows, 1>(tile, weight, first);
}

using Multiply = void (*)(const Tile&, const int32_t*, int64_t, int64_t);

template <class Number, size_t... kNumbers>
constexpr std::array<Multiply, sizeof...(kNumbers)> for_each_number_of_rows(std::index_sequence<kNumbers...>) {
  return {multiply_all<Number, kNumbers + 1>...};
}

template <class Number>  // of 1, 2, ... rows
constexpr auto kMultiply = for_each_number_of_rows<Number>(std::make_index_sequence<kMostRows>());

// Lays out `count` rows as a tile: four units of four rows at a time, and what is left one by one.
inline void lay_out(void* const* rows, int64_t count, int64_t units, int32_t* out) {
  const int64_t fours = count / 4 * 4, whole = units / 4 * 4;
  for (int64_t row = 0; row < fours; row += 4) {
    const float* from[4];
    for (int64_t n = 0; n < 4; ++n) from[n] = static_cast<const float*>(rows[row + n]);
    for (int64_t unit = 0; unit < whole; unit += 4) {
      __m128 a = _mm_loadu_ps(from[0] + unit), b = _mm_loadu_ps(from[1] + unit);
      __m128 c = _mm_loadu_ps(from[2] + unit), d = _mm_loadu_ps(from[3] + unit);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      float* to = reinterpret_cast<float*>(out + unit * count + row);
      _mm_storeu_ps(to, a), _mm_storeu_ps(to + count, b);
      _mm_storeu_ps(to + 2 * count, c), _mm_storeu_ps(to + 3 * count, d);
    }
  }
  for (int64_t row = 0; row < count; ++row)
    for (int64_t unit = row < fours ? whole : 0; unit < units; ++unit)
      out[unit * count + row] = static_cast<const int32_t*>(rows[row])[unit];
}

// The product of rows with a weight that was laid out.
class Product {
 public:
  Product(
      const std::vector<void*>& rows, int64_t units, const int32_t* weight, int64_t outputs, bool is_half,
      std::vector<void*> out, bool adds, int32_t* room)
      : weight_(weight), outputs_(outputs), out_(std::move(out)) {
    const auto& multiply = is_half ? kMultiply<uint16_t> : kMultiply<float>;
    const int64_t count = rows.size(), most = count <= kMostRows ? kMostRows : kRowsOfMany;
    columns_ = columns_of(std::min(count, most));
    for (int64_t first = 0; first < count; first += most) {
      int64_t some = std::min(most, count - first);
      lay_out(&rows[first], some, units, room + first * units);
      int64_t ahead = first ? units : 128 * kLanes / columns_;  // the first tile waits for memory, not for its sums
      tiles_.push_back({multiply[some - 1], {room + first * units, units, &out_[first], adds, ahead}});
    }
  }

  Product(Product&&) = default;  // tiles point to what it holds, so it is not copied

  int64_t parts() const { return (outputs_ + columns_ - 1) / columns_; }

  // Computes the columns of a part, 0 to parts() - 1.
  void compute(int64_t part) const {
    for (auto& [multiply, tile] : tiles_)
      multiply(tile, weight_, part * columns_, std::min((part + 1) * columns_, outputs_));
  }

 private:
  const int32_t* weight_;
  int64_t outputs_, columns_;  // columns of a part
  std::vector<void*> out_;
  std::vector<std::pair<Multiply, Tile>> tiles_;
};

// ---- what a layer does between its products

// 2 to the power of x, to the last bits of float32; 0 for x below -126, NaN for NaN.
AVX512 inline __m512 exp2_of(__m512 x) {
  __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_NLE_UQ);
  x = _mm512_min_ps(_mm512_set1_ps(127.f), _mm512_max_ps(_mm512_set1_ps(-126.f), x));  // in this order NaN stays
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = _mm512_sub_ps(x, whole);
  const float series[] = {1.f, 6.9314718e-1f, 2.4022651e-1f, 5.5504109e-2f, 9.6181291e-3f, 1.3333558e-3f, 1.5403530e-4f};
  __m512 sum = _mm512_set1_ps(series[6]);  // Taylor's, of 2^rest, |rest| <= 1/2
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(series[i]));
  return _mm512_maskz_scalef_ps(normal, sum, whole);
}

// x / sqrt(mean of x^2 + eps) * weight
template <class Number>
AVX512 void rms_norm(const Number* x, const Number* weight, Number* out, int64_t size, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kLanes) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
  __m512 factor = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
  for (int64_t i = 0; i < size; i += kLanes)
    store(out + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), factor), load(weight + i)));
}

// x * cos + (x with its halves swapped) * sin; `out` may be x.
template <class Number>
AVX512 void rotate(const Number* x, const Number* cos, const Number* sin, Number* out, int64_t size) {
  for (int64_t i = 0, j = size / 2; j < size; i += kLanes, j += kLanes) {
    __m512 one = load(x + i), other = load(x + j);
    store(out + i, _mm512_fmadd_ps(one, load(cos + i), _mm512_mul_ps(other, load(sin + i))));
    store(out + j, _mm512_fmadd_ps(other, load(cos + j), _mm512_mul_ps(one, load(sin + j))));
  }
}

// silu(gate) * up
template <class Number>
AVX512 void gated(const Number* gate, const Number* up, Number* out, int64_t size) {
  const __m512 one = _mm512_set1_ps(1.f), log2_e = _mm512_set1_ps(-1.44269504f);
  for (int64_t i = 0; i < size; i += kLanes) {
    __m512 x = load(gate + i), below = _mm512_add_ps(one, exp2_of(_mm512_mul_ps(x, log2_e)));
    store(out + i, _mm512_mul_ps(_mm512_div_ps(x, below), load(up + i)));
  }
}

// ---- attention

constexpr int64_t kKeys = 64, kMostDim = 256;  // keys of a block; the largest head dimension

// Up to 16 queries that read the same keys: a query is a lane of a register.
template <class Number>
struct Queries {
  const Number* from[kLanes];
  Number* out[kLanes];
  int64_t count;
  int64_t prefix;           // keys that all of them see
  int64_t keys;             // keys that one of them sees, the prefix included
  const uint16_t* visible;  // for each key after the prefix, the lanes that see it
};

// Computes the scores of 8 keys, [8, lanes].
template <class Number>
AVX512 inline void scores_of(
    const int32_t (*queries)[kLanes], const Number* const* keys, int64_t dim, float (*scores)[kLanes]) {
  __m512 sums[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t unit = 0; unit < dim / kPerUnit<Number>; ++unit) {
    __m512i query = _mm512_load_si512(queries[unit]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
      sums[i] = dot<Number>(sums[i], query, _mm512_set1_epi32(reinterpret_cast<const int32_t*>(keys[i])[unit]));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm512_store_ps(scores[i], sums[i]);
}

// Adds the weighted values of a block to the sums of 4 queries, 16 * kWide numbers of each, from `first` on. A unit of
// weights and values is of one key, or of two.
template <class Number, int kWide>
AVX512 inline void add_values(
    const int32_t (*weights)[kLanes], const int32_t (*values)[kMostDim], int64_t units, int64_t lane, int64_t first,
    float (*sums)[kMostDim]) {
  __m512 held[4][kWide];
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) held[n][i] = _mm512_load_ps(&sums[lane + n][first + kLanes * i]);
  for (int64_t unit = 0; unit < units; ++unit) {
    __m512i value[kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) value[i] = _mm512_load_si512(&values[unit][first + kLanes * i]);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      __m512i weight = _mm512_set1_epi32(weights[unit][lane + n]);
#pragma GCC unroll 4
      for (int i = 0; i < kWide; ++i) held[n][i] = dot<Number>(held[n][i], weight, value[i]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) _mm512_store_ps(&sums[lane + n][first + kLanes * i], held[n][i]);
}

// Attention of up to 16 queries over blocks of keys, with the softmax's largest score and total carried from block to
// block. Keys that a lane does not see add exact zeros to it, wherever they are.
template <class Number>
AVX512 void attend(
    const Queries<Number>& queries, const Number* keys, const Number* values, int64_t dim, float scale) {
  constexpr int kUnit = kPerUnit<Number>;
  alignas(64) int32_t by_lane[kMostDim / kUnit][kLanes];
  alignas(64) float sums[kLanes][kMostDim];
  std::fill_n(by_lane[0], dim / kUnit * kLanes, 0);
  for (int64_t lane = 0; lane < kLanes; ++lane) std::fill_n(sums[lane], dim, 0.f);
  alignas(64) float scores[kKeys][kLanes], factors[kLanes];
  alignas(64) int32_t weights[kKeys / kUnit][kLanes], units_of_values[kKeys / kUnit][kMostDim];
  for (int64_t lane = 0; lane < queries.count; ++lane)
    for (int64_t unit = 0; unit < dim / kUnit; ++unit)
      by_lane[unit][lane] = reinterpret_cast<const int32_t*>(queries.from[lane])[unit];
  const __m512 to_log2 = _mm512_set1_ps(scale * 1.44269504f), hidden = _mm512_set1_ps(-3e38f);
  __m512 largest = _mm512_set1_ps(-1e30f), total = _mm512_setzero_ps();
  for (int64_t first = 0; first < queries.keys; first += kKeys) {
    int64_t count = std::min(kKeys, queries.keys - first);
    const Number* key = keys + first * dim;
    const Number* value = values + first * dim;
    for (int64_t n = 0; n < count; n += 8) {
      const Number* eight[8];
      for (int64_t i = 0; i < 8; ++i) eight[i] = key + std::min(n + i, count - 1) * dim;
      scores_of(by_lane, eight, dim, scores + n);
    }
    __m512 before = largest;
    for (int64_t n = 0; n < count; ++n) {
      __mmask16 sees = first + n < queries.prefix ? 0xffff : queries.visible[first + n - queries.prefix];
      __m512 score = _mm512_mask_mul_ps(hidden, sees, _mm512_load_ps(scores[n]), to_log2);
      largest = _mm512_max_ps(score, largest);  // of NaN the largest before
      _mm512_store_ps(scores[n], score);
    }
    if (first && _mm512_cmp_ps_mask(largest, before, _CMP_NEQ_UQ)) {
      __m512 factor = exp2_of(_mm512_sub_ps(before, largest));
      total = _mm512_mul_ps(total, factor);
      _mm512_store_ps(factors, factor);
      for (int64_t lane = 0; lane < queries.count; ++lane)
        for (int64_t i = 0; i < dim; i += kLanes)
          _mm512_store_ps(&sums[lane][i], _mm512_mul_ps(_mm512_load_ps(&sums[lane][i]), _mm512_set1_ps(factors[lane])));
    }
    for (int64_t n = 0; n < count; n += kUnit) {
      __m512 one = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores[n]), largest));
      const Number* from = value + n * dim;
      total = _mm512_add_ps(total, one);
      if constexpr (kUnit == 1) {
        _mm512_store_ps(reinterpret_cast<float*>(weights[n]), one);
        for (int64_t i = 0; i < dim; i += kLanes)
          _mm512_store_si512(&units_of_values[n][i], _mm512_loadu_si512(from + i));
      } else {
        bool alone = n + 1 == count;
        __m512 other = _mm512_setzero_ps();
        if (!alone) other = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores[n + 1]), largest));
        total = _mm512_add_ps(total, other);
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
        __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(other)), 16);
        _mm512_store_si512(weights[n / 2], _mm512_or_si512(low, high));
        for (int64_t i = 0; i < dim; i += kLanes) {
          __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
          if (!alone) both = _mm512_or_si512(both, _mm512_castps_si512(load(from + dim + i)));
          _mm512_store_si512(&units_of_values[n / 2][i], both);
        }
      }
    }
    const int64_t units = (count + kUnit - 1) / kUnit;
    for (int64_t lane = 0; lane < queries.count; lane += 4) {
      int64_t i = 0;
      for (; i + 64 <= dim; i += 64) add_values<Number, 4>(weights, units_of_values, units, lane, i, sums);
      for (; i < dim; i += 32) add_values<Number, 2>(weights, units_of_values, units, lane, i, sums);
    }
  }
  _mm512_store_ps(factors, _mm512_div_ps(_mm512_set1_ps(1.f), total));
  for (int64_t lane = 0; lane < queries.count; ++lane)
    for (int64_t i = 0; i < dim; i += kLanes)
      store(queries.out[lane] + i, _mm512_mul_ps(_mm512_load_ps(&sums[lane][i]), _mm512_set1_ps(factors[lane])));
}

}  // namespace avx512
