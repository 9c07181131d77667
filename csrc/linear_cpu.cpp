#include "linear_cpu.h"

#include <algorithm>
#include <cstring>

#include "layout.h"
#include "parallel.h"

// Every kept value multiplies the one input that its two metadata bits name, so the weight is read once, packed, and
// never expanded. Sums of one unit (32 products a row) are added up apart from the running total: rounding errors then
// grow with the number of units rather than of inputs.

namespace sparsert {
namespace {

constexpr int64_t kWeightsAThread = 1 << 17;

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
           int64_t columns, int64_t x_stride, int64_t begin, int64_t end) {
  const int64_t units = host_units(columns);
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

template <typename T>
void run(const void* values, const uint32_t* metadata, const float* x, float* y, int64_t batch, int64_t rows,
         int64_t columns, int threads) {
  // padded inputs meet padded weights, which are zero, so x is padded with zeros as well
  const int64_t stride = host_units(columns) * kHostUnit;
  std::vector<float> padded;
  if (stride != columns) {
    padded.assign(batch * stride, 0.f);
    for (int64_t m = 0; m < batch; ++m) std::memcpy(&padded[m * stride], x + m * columns, columns * sizeof(float));
    x = padded.data();
  }
  // a thread takes some 20 us to start, in which one core multiplies about this many weights
  const int64_t worthwhile = std::max<int64_t>(1, rows * columns * batch / kWeightsAThread);
  const int workers = static_cast<int>(std::min<int64_t>(threads, worthwhile));
  parallel_for((rows + kHostRowTile - 1) / kHostRowTile, workers, [&](int, int64_t begin, int64_t end) {
    for (int64_t m = 0; m < batch;) {
      const auto step = [&](auto function, int64_t count) {
        function(static_cast<const typename T::Bits*>(values), metadata, x + m * stride, y + m * rows, rows, columns,
                 stride, begin, end);
        m += count;
      };
      if (batch - m >= 4) {
        step(tiles<T, 4>, 4);
      } else if (batch - m >= 2) {
        step(tiles<T, 2>, 2);
      } else {
        step(tiles<T, 1>, 1);
      }
    }
  });
}

}  // namespace

void linear24_cpu(const void* values, const uint32_t* metadata, const float* x, float* y, int64_t batch, int64_t rows,
                  int64_t columns, int dtype, int threads) {
  if (dtype == 0) run<BFloat16>(values, metadata, x, y, batch, rows, columns, threads);
  if (dtype == 1) run<Float16>(values, metadata, x, y, batch, rows, columns, threads);
  if (dtype == 2) run<Float32>(values, metadata, x, y, batch, rows, columns, threads);
}

}  // namespace sparsert
