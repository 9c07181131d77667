#include "linear_cpu.h"

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSERT_AVX2 1
#include <immintrin.h>
#endif

// Every kept value multiplies the one input that its two metadata bits name, so the weight is read once, packed, and
// never expanded. On x86-64 with AVX2 eight products are one instruction (below); elsewhere they are made one by one,
// and sums of one unit (32 products a row) are added up apart from the running total: rounding errors then grow with the
// number of units rather than of inputs.

namespace sparsert {
namespace {

// A thread takes some 20 us to start, in which one core multiplies about this many weights.
constexpr int64_t kWeightsAThread = 1 << 17;
constexpr int64_t kWeightsAThreadAvx2 = 1 << 21;

struct BFloat16 {
  using Bits = uint16_t;
  static float value(Bits b) {
    const uint32_t wide = uint32_t(b) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  }
};

struct Float16 {
  using Bits = uint16_t;
  static float value(Bits b) {
    // Place exponent and mantissa for fp32, then let a product with 2^112 move the exponent: subnormals come out right.
    const uint32_t magnitude = uint32_t(b & 0x7FFF) << 13, sign = uint32_t(b & 0x8000) << 16;
    float f;
    std::memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((b & 0x7C00) == 0x7C00) bits |= 0x7F800000u;  // infinity and NaN
    bits |= sign;
    std::memcpy(&f, &bits, 4);
    return f;
  }
};

struct Float32 {
  using Bits = float;
  static float value(float v) { return v; }
};

template <typename T, int Batch>
void tiles(const typename T::Bits* values, const uint32_t* metadata, const float* x, float* y, int64_t rows,
           int64_t columns, int64_t begin, int64_t end) {
  const int64_t units = host_units(columns), x_stride = units * kHostUnit;
  for (int64_t tile = begin; tile < end; ++tile) {
    float total[kHostRowTile][Batch] = {};
    for (int64_t unit = 0; unit < units; ++unit) {
      const typename T::Bits* unit_values = values + (tile * units + unit) * kHostUnitValues;
      const uint32_t* tile_metadata = metadata + tile * units * 32;
      for (int64_t g = 0; g < 8; ++g) {
        float low[Batch] = {}, high[Batch] = {};  // rows g and g + 8
        uint32_t words[4];
        for (int64_t q = 0; q < 4; ++q) words[q] = tile_metadata[host_metadata_word(units, unit, g * 4 + q)];
        for (int64_t block = 0; block < 2; ++block) {
          for (int64_t q = 0; q < 4; ++q) {
            const typename T::Bits* v = unit_values + block * 256 + (g * 4 + q) * 8;
            for (int64_t half = 0; half < 2; ++half) {
              const uint32_t word = words[block * 2 + half] >> (4 * q);
              const float* group = x + unit * kHostUnit + block * 32 + half * 16 + q * 4;
              const float a0 = T::value(v[half * 4]), a1 = T::value(v[half * 4 + 1]);
              const float b0 = T::value(v[half * 4 + 2]), b1 = T::value(v[half * 4 + 3]);
              for (int64_t m = 0; m < Batch; ++m) {
                const float* row = group + m * x_stride;
                low[m] += a0 * row[word & 3] + a1 * row[word >> 2 & 3];
                high[m] += b0 * row[word >> 16 & 3] + b1 * row[word >> 18 & 3];
              }
            }
          }
        }
        for (int64_t m = 0; m < Batch; ++m) {
          total[g][m] += low[m];
          total[g + 8][m] += high[m];
        }
      }
    }
    for (int64_t row = 0; row < kHostRowTile && tile * kHostRowTile + row < rows; ++row)
      for (int64_t m = 0; m < Batch; ++m) y[m * rows + tile * kHostRowTile + row] = total[row][m];
  }
}

#ifdef SPARSERT_AVX2

// Eight values that lie side by side are those of a lane of the packed layout: two of row g and two of row g + 8, once
// for each half of a block. A half has four inputs of this lane, which fill 128 bits of a register, and picking one of
// four inside 128 bits by two bits of another register is what vpermilps does. So with the inputs brought into this
// order once for the whole layer,
//
//     inputs     | half 0: i0 i1 i2 i3 | half 1: i0 i1 i2 i3 |
//     values     |  g  g  g+8 g+8      |  g  g  g+8 g+8      |   times the inputs that the metadata picks
//
// the metadata only has to be shifted into place, and a register of sums holds two rows.
#define SPARSERT_TARGET __attribute__((target("avx2,fma,f16c")))
#define SPARSERT_INLINE SPARSERT_TARGET inline __attribute__((always_inline))

SPARSERT_INLINE __m256 load_eight(const uint16_t* from, BFloat16) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))), 16));
}
SPARSERT_INLINE __m256 load_eight(const uint16_t* from, Float16) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
SPARSERT_INLINE __m256 load_eight(const float* from, Float32) { return _mm256_loadu_ps(from); }

// Inputs of a row of x in the order above: [unit][block][quad][half][4]; behind the last input there are zeros.
void arrange(const float* x, float* to, int64_t columns) {
  for (int64_t unit = 0; unit < host_units(columns); ++unit)
    for (int64_t block = 0; block < 2; ++block)
      for (int64_t q = 0; q < 4; ++q)
        for (int64_t half = 0; half < 2; ++half, to += 4) {
          const int64_t first = unit * kHostUnit + block * 32 + half * 16 + q * 4;
          for (int64_t i = 0; i < 4; ++i) to[i] = first + i < columns ? x[first + i] : 0.f;
        }
}

template <typename T, int Batch>
SPARSERT_TARGET void tiles_avx2(const typename T::Bits* values, const uint32_t* metadata, const float* x, float* y,
                                int64_t rows, int64_t columns, int64_t begin, int64_t end) {
  const int64_t units = host_units(columns), x_stride = units * kHostUnit;
  __m256i shifts[4];
  for (int q = 0; q < 4; ++q)
    shifts[q] = _mm256_add_epi32(_mm256_set1_epi32(4 * q), _mm256_setr_epi32(0, 2, 16, 18, 0, 2, 16, 18));
  for (int64_t tile = begin; tile < end; ++tile) {
    const typename T::Bits* unit_values = values + tile * units * kHostUnitValues;
    const uint32_t* tile_metadata = metadata + tile * units * 32;
    alignas(32) float total[8][Batch][8] = {};  // of rows g and g + 8
    for (int64_t unit = 0; unit < units; ++unit, unit_values += kHostUnitValues) {
      const float* inputs = x + unit * kHostUnit;
      for (int64_t g = 0; g < 8; ++g) {
        const uint32_t* words = tile_metadata + host_metadata_word(units, unit, g * 4);
        const int64_t step = host_metadata_word(units, unit, 1) - host_metadata_word(units, unit, 0);
        __m256 sum[Batch];
        for (int m = 0; m < Batch; ++m) sum[m] = _mm256_load_ps(total[g][m]);
        for (int block = 0; block < 2; ++block) {
          const __m256i picks = _mm256_setr_m128i(_mm_set1_epi32(int(words[2 * block * step])),
                                                  _mm_set1_epi32(int(words[(2 * block + 1) * step])));
          for (int q = 0; q < 4; ++q) {
            const __m256 v = load_eight(unit_values + block * 256 + (g * 4 + q) * 8, T{});
            const __m256i pick = _mm256_srlv_epi32(picks, shifts[q]);  // only the lowest two bits count
            for (int m = 0; m < Batch; ++m) {
              const __m256 group = _mm256_loadu_ps(inputs + m * x_stride + block * 32 + q * 8);
              sum[m] = _mm256_fmadd_ps(v, _mm256_permutevar_ps(group, pick), sum[m]);
            }
          }
        }
        for (int m = 0; m < Batch; ++m) _mm256_store_ps(total[g][m], sum[m]);
      }
    }
    for (int64_t g = 0; g < 8; ++g)
      for (int64_t high = 0; high < 2; ++high) {
        const int64_t row = tile * kHostRowTile + g + 8 * high;
        for (int m = 0; m < Batch && row < rows; ++m) {
          const float* s = total[g][m] + 2 * high;
          y[m * rows + row] = (s[0] + s[1]) + (s[4] + s[5]);
        }
      }
  }
}

bool has_avx2() {
  static const bool has =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return has;
}

#endif

// Inputs of a row of x as they are; behind the last one there are zeros, which meet padded weights.
void pad(const float* x, float* to, int64_t columns) {
  std::fill(std::copy(x, x + columns, to), to + host_units(columns) * kHostUnit, 0.f);
}

template <typename T>
using Tiles = void (*)(const typename T::Bits*, const uint32_t*, const float*, float*, int64_t, int64_t, int64_t,
                       int64_t);

// How tiles of rows are multiplied on this processor.
template <typename T>
struct Loop {
  Tiles<T> one, two, four;  // rows of x at a time
  void (*prepare)(const float*, float*, int64_t);
  int64_t weights_a_thread;
};

template <typename T>
Loop<T> choose_loop(bool portable) {
#ifdef SPARSERT_AVX2
  if (has_avx2() && !portable)
    return {tiles_avx2<T, 1>, tiles_avx2<T, 2>, tiles_avx2<T, 4>, arrange, kWeightsAThreadAvx2};
#endif
  return {tiles<T, 1>, tiles<T, 2>, tiles<T, 4>, pad, kWeightsAThread};
}

template <typename T>
void run(const void* values, const uint32_t* metadata, const float* x, float* y, int64_t batch, int64_t rows,
         int64_t columns, int threads, bool portable) {
  const Loop<T> loop = choose_loop<T>(portable);
  const int64_t stride = host_units(columns) * kHostUnit;
  std::vector<float> inputs(batch * stride);
  for (int64_t m = 0; m < batch; ++m) loop.prepare(x + m * columns, &inputs[m * stride], columns);
  const int64_t worthwhile = std::max<int64_t>(1, rows * columns * batch / loop.weights_a_thread);
  const int workers = static_cast<int>(std::min<int64_t>(threads, worthwhile));
  const auto* typed = static_cast<const typename T::Bits*>(values);
  parallel_for((rows + kHostRowTile - 1) / kHostRowTile, workers, [&](int, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < batch;) {
      const int64_t left = batch - m, count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      const Tiles<T> multiply = count == 4 ? loop.four : count == 2 ? loop.two : loop.one;
      multiply(typed, metadata, &inputs[m * stride], y + m * rows, rows, columns, begin, end);
      m += count;
    }
  });
}

}  // namespace

void linear24_cpu(const void* values, const uint32_t* metadata, const float* x, float* y, int64_t batch, int64_t rows,
                  int64_t columns, int dtype, int threads, bool portable) {
  const auto multiply = dtype == 0 ? run<BFloat16> : dtype == 1 ? run<Float16> : run<Float32>;
  multiply(values, metadata, x, y, batch, rows, columns, threads, portable);
}

}  // namespace sparsert
