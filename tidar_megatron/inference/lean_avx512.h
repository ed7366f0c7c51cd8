// Kernels for bfloat16 of processors with AVX512-BF16. Sums are float32 and rounded once. Each row is computed by itself,
// in an order that depends on its own inputs only, so it has the same bits whatever other rows there are.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#define BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

namespace avx512 {

constexpr int64_t kLanes = 16;  // numbers of float32 in a register

BF16 inline __m512 load(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16));
}

BF16 inline void store(uint16_t* to, __m512 values) {
  _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(values));
}

// ---- products

// A weight is laid out as [outputs / 16, inputs / 2, 16, 2], and rows as tiles of up to 24 rows, [inputs / 2, rows, 2]. A
// tile has as many columns beside each other as there are registers for its sums, and fetches what comes next of the
// weight meanwhile: so the product of a few rows takes as long as reading the weight.
constexpr int kMostRows = 24, kRowsOfMany = 12;  // of a tile, if all rows fit into one, and if they do not

constexpr int columns_of(int rows) { return kLanes * (rows <= 4 ? 4 : rows <= 12 ? 2 : 1); }

struct Tile {
  const int32_t* rows;
  int64_t pairs;         // of inputs
  uint16_t* const* out;  // of each row
  bool adds;             // whether to add to `out`, or replace it
  int64_t ahead;         // how far ahead of the pair in use weights are fetched
};

// Computes kWide times 16 columns from `first` on. All loops but that over pairs are unrolled: sums stay in registers.
template <int kRows, int kWide>
BF16 void multiply(const Tile& tile, const uint16_t* weight, int64_t first) {
  __m512 sums[kRows][kWide];
#pragma GCC unroll 24
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) sums[row][i] = _mm512_setzero_ps();
  const int64_t pairs = tile.pairs;
  const int32_t* rows = tile.rows;
  weight += first * 2 * pairs;
  for (int64_t pair = 0; pair < pairs; ++pair) {
    int64_t ahead = pair + tile.ahead;
    if (ahead >= pairs) ahead += (kWide - 1) * pairs;  // of the columns after these
    __m512bh wide[kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + 32 * (i * pairs + ahead)), _MM_HINT_T0);
      wide[i] = (__m512bh)_mm512_loadu_si512(weight + 32 * (i * pairs + pair));
    }
#pragma GCC unroll 24
    for (int row = 0; row < kRows; ++row) {
      __m512bh both = (__m512bh)_mm512_set1_epi32(rows[pair * kRows + row]);
#pragma GCC unroll 4
      for (int i = 0; i < kWide; ++i) sums[row][i] = _mm512_dpbf16_ps(sums[row][i], both, wide[i]);
    }
  }
#pragma GCC unroll 24
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) {
      uint16_t* place = tile.out[row] + first + kLanes * i;
      store(place, tile.adds ? _mm512_add_ps(sums[row][i], load(place)) : sums[row][i]);
    }
  }
}

// Computes the columns from `first` to `end` of a tile of kRows rows.
template <int kRows>
void multiply_all(const Tile& tile, const uint16_t* weight, int64_t first, int64_t end) {
  constexpr int64_t kColumns = columns_of(kRows);
  for (; first + kColumns <= end; first += kColumns) multiply<kRows, kColumns / kLanes>(tile, weight, first);
  for (; first < end; first += kLanes) multiply<kRows, 1>(tile, weight, first);
}

using Multiply = void (*)(const Tile&, const uint16_t*, int64_t, int64_t);

template <size_t... kNumbers>
constexpr std::array<Multiply, sizeof...(kNumbers)> for_each_number_of_rows(std::index_sequence<kNumbers...>) {
  return {multiply_all<kNumbers + 1>...};
}

constexpr auto kMultiply = for_each_number_of_rows(std::make_index_sequence<kMostRows>());  // of 1, 2, ... rows

// Lays out `count` rows of 2 * pairs inputs as a tile.
inline void lay_out(const uint16_t* const* rows, int64_t count, int64_t pairs, int32_t* out) {
  for (int64_t row = 0; row < count; ++row) {
    auto* from = reinterpret_cast<const int32_t*>(rows[row]);
    for (int64_t pair = 0; pair < pairs; ++pair) out[pair * count + row] = from[pair];
  }
}

// The product of rows with a weight that was laid out.
class Product {
 public:
  Product(
      const std::vector<const uint16_t*>& rows, int64_t pairs, const uint16_t* weight, int64_t outputs,
      std::vector<uint16_t*> out, bool adds, int32_t* room)
      : weight_(weight), outputs_(outputs), out_(std::move(out)) {
    const int64_t count = rows.size(), most = count <= kMostRows ? kMostRows : kRowsOfMany;
    columns_ = columns_of(std::min(count, most));
    for (int64_t first = 0; first < count; first += most) {
      counts_.push_back(std::min(most, count - first));
      lay_out(&rows[first], counts_.back(), pairs, room + first * pairs);
      int64_t ahead = first ? pairs : 128 * kLanes / columns_;  // the first tile waits for memory, not for its sums
      tiles_.push_back({room + first * pairs, pairs, &out_[first], adds, ahead});
    }
  }

  Product(Product&&) = default;  // tiles point to what it holds, so it is not copied

  int64_t parts() const { return (outputs_ + columns_ - 1) / columns_; }

  // Computes the columns of a part, 0 to parts() - 1.
  void compute(int64_t part) const {
    for (size_t n = 0; n < tiles_.size(); ++n)
      kMultiply[counts_[n] - 1](tiles_[n], weight_, part * columns_, std::min((part + 1) * columns_, outputs_));
  }

 private:
  const uint16_t* weight_;
  int64_t outputs_, columns_;  // columns of a part
  std::vector<uint16_t*> out_;
  std::vector<int64_t> counts_;
  std::vector<Tile> tiles_;
};

// ---- what a layer does between its products

// 2 to the power of x, to the last bits of float32; 0 for x below -126.
BF16 inline __m512 exp2_of(__m512 x) {
  __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_GT_OQ);
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-126.f)), _mm512_set1_ps(127.f));
  __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), rest = _mm512_sub_ps(x, whole);
  const float series[] = {1.f, 6.9314718e-1f, 2.4022651e-1f, 5.5504109e-2f, 9.6181291e-3f, 1.3333558e-3f, 1.5403530e-4f};
  __m512 sum = _mm512_set1_ps(series[6]);  // Taylor's, of 2^rest, |rest| <= 1/2
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(series[i]));
  return _mm512_maskz_scalef_ps(normal, sum, whole);
}

// x / sqrt(mean of x^2 + eps) * weight
BF16 inline void rms_norm(const uint16_t* x, const uint16_t* weight, uint16_t* out, int64_t size, float eps) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += kLanes) squares = _mm512_fmadd_ps(load(x + i), load(x + i), squares);
  __m512 factor = _mm512_set1_ps(1.f / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
  for (int64_t i = 0; i < size; i += kLanes)
    store(out + i, _mm512_mul_ps(_mm512_mul_ps(load(x + i), factor), load(weight + i)));
}

// x * cos + (x with its halves swapped) * sin; `out` may be x.
BF16 inline void rotate(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* out, int64_t size) {
  for (int64_t i = 0, j = size / 2; j < size; i += kLanes, j += kLanes) {
    __m512 one = load(x + i), other = load(x + j);
    store(out + i, _mm512_fmadd_ps(one, load(cos + i), _mm512_mul_ps(other, load(sin + i))));
    store(out + j, _mm512_fmadd_ps(other, load(cos + j), _mm512_mul_ps(one, load(sin + j))));
  }
}

// silu(gate) * up
BF16 inline void gated(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t size) {
  const __m512 one = _mm512_set1_ps(1.f), log2_e = _mm512_set1_ps(-1.44269504f);
  for (int64_t i = 0; i < size; i += kLanes) {
    __m512 x = load(gate + i), below = _mm512_add_ps(one, exp2_of(_mm512_mul_ps(x, log2_e)));
    store(out + i, _mm512_mul_ps(_mm512_div_ps(x, below), load(up + i)));
  }
}

// ---- attention

constexpr int64_t kKeys = 64, kMostDim = 256;  // keys of a block; the largest head dimension

// Up to 16 queries that read the same keys: a query is a lane of a register.
struct Queries {
  const uint16_t* from[kLanes];
  uint16_t* out[kLanes];
  int64_t count;
  int64_t prefix;           // keys that all of them see
  int64_t keys;             // keys that one of them sees, the prefix included
  const uint16_t* visible;  // for each key after the prefix, the lanes that see it
};

// Computes the scores of kKeys' 8 keys, [8, lanes].
BF16 inline void scores_of(
    const uint32_t (*queries)[kLanes], const uint16_t* const* keys, int64_t dim, float (*scores)[kLanes]) {
  __m512 sums[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) sums[i] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < dim / 2; ++pair) {
    __m512bh query = (__m512bh)_mm512_load_si512(queries[pair]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m512bh key = (__m512bh)_mm512_set1_epi32(reinterpret_cast<const int32_t*>(keys[i])[pair]);
      sums[i] = _mm512_dpbf16_ps(sums[i], query, key);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) _mm512_store_ps(scores[i], sums[i]);
}

// Adds the weighted values of a block to the sums of 4 queries, 16 * kWide numbers of each, from `first` on. Weights and
// values have two keys beside each other.
template <int kWide>
BF16 inline void add_values(
    const uint32_t (*weights)[kLanes], const uint32_t (*values)[kMostDim], int64_t pairs, int64_t lane, int64_t first,
    float (*sums)[kMostDim]) {
  __m512 held[4][kWide];
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) held[n][i] = _mm512_load_ps(&sums[lane + n][first + kLanes * i]);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh value[kWide];
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) value[i] = (__m512bh)_mm512_load_si512(&values[pair][first + kLanes * i]);
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) {
      __m512bh weight = (__m512bh)_mm512_set1_epi32(weights[pair][lane + n]);
#pragma GCC unroll 4
      for (int i = 0; i < kWide; ++i) held[n][i] = _mm512_dpbf16_ps(held[n][i], weight, value[i]);
    }
  }
#pragma GCC unroll 4
  for (int n = 0; n < 4; ++n)
#pragma GCC unroll 4
    for (int i = 0; i < kWide; ++i) _mm512_store_ps(&sums[lane + n][first + kLanes * i], held[n][i]);
}

// Attention of up to 16 queries over blocks of keys, with the softmax's largest score and total carried from block to
// block. Keys that a lane does not see add exact zeros to it, wherever they are.
BF16 inline void attend(const Queries& queries, const uint16_t* keys, const uint16_t* values, int64_t dim, float scale) {
  alignas(64) uint32_t by_lane[kMostDim / 2][kLanes];
  alignas(64) float sums[kLanes][kMostDim];
  std::fill_n(by_lane[0], dim / 2 * kLanes, 0);
  for (int64_t lane = 0; lane < kLanes; ++lane) std::fill_n(sums[lane], dim, 0.f);
  alignas(64) float scores[kKeys][kLanes], factors[kLanes];
  alignas(64) uint32_t weights[kKeys / 2][kLanes], pairs_of_values[kKeys / 2][kMostDim];
  for (int64_t lane = 0; lane < queries.count; ++lane)
    for (int64_t pair = 0; pair < dim / 2; ++pair)
      by_lane[pair][lane] = reinterpret_cast<const uint32_t*>(queries.from[lane])[pair];
  const __m512 to_log2 = _mm512_set1_ps(scale * 1.44269504f), hidden = _mm512_set1_ps(-3e38f);
  __m512 largest = _mm512_set1_ps(-1e30f), total = _mm512_setzero_ps();
  for (int64_t first = 0; first < queries.keys; first += kKeys) {
    int64_t count = std::min(kKeys, queries.keys - first), pairs = (count + 1) / 2;
    const uint16_t* key = keys + first * dim;
    const uint16_t* value = values + first * dim;
    for (int64_t n = 0; n < count; n += 8) {
      const uint16_t* eight[8];
      for (int64_t i = 0; i < 8; ++i) eight[i] = key + std::min(n + i, count - 1) * dim;
      scores_of(by_lane, eight, dim, scores + n);
    }
    __m512 before = largest;
    for (int64_t n = 0; n < count; ++n) {
      __mmask16 sees = first + n < queries.prefix ? 0xffff : queries.visible[first + n - queries.prefix];
      __m512 score = _mm512_mask_mul_ps(hidden, sees, _mm512_load_ps(scores[n]), to_log2);
      largest = _mm512_max_ps(largest, score);
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
    for (int64_t pair = 0; pair < pairs; ++pair) {
      bool alone = 2 * pair + 1 == count;
      __m512 one = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores[2 * pair]), largest));
      __m512 other = _mm512_setzero_ps();
      if (!alone) other = exp2_of(_mm512_sub_ps(_mm512_load_ps(scores[2 * pair + 1]), largest));
      total = _mm512_add_ps(_mm512_add_ps(total, one), other);
      __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
      __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(other)), 16);
      _mm512_store_si512(weights[pair], _mm512_or_si512(low, high));
      const uint16_t* from = value + 2 * pair * dim;
      for (int64_t i = 0; i < dim; i += kLanes) {
        __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + i)));
        if (!alone) both = _mm512_or_si512(both, _mm512_castps_si512(load(from + dim + i)));
        _mm512_store_si512(&pairs_of_values[pair][i], both);
      }
    }
    for (int64_t lane = 0; lane < queries.count; lane += 4) {
      int64_t i = 0;
      for (; i + 64 <= dim; i += 64) add_values<4>(weights, pairs_of_values, pairs, lane, i, sums);
      for (; i < dim; i += 32) add_values<2>(weights, pairs_of_values, pairs, lane, i, sums);
    }
  }
  _mm512_store_ps(factors, _mm512_div_ps(_mm512_set1_ps(1.f), total));
  for (int64_t lane = 0; lane < queries.count; ++lane)
    for (int64_t i = 0; i < dim; i += kLanes)
      store(queries.out[lane] + i, _mm512_mul_ps(_mm512_load_ps(&sums[lane][i]), _mm512_set1_ps(factors[lane])));
}

}  // namespace avx512
