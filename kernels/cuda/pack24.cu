// Pack a 2:4 weight into the device layout, from dense or from kept values and a bitmask, and back to dense, on the GPU.
//
// One thread owns one metadata word: lane 4g+q of a unit covers rows g and g+8 and 16 inputs, that is 8 groups of
// four, and their 8 value pairs. Row g's pair j and row g+8's pair j lie side by side in lane 4g+j (the picture is in
// sparsert/formats/packed.py), so a thread writes four pieces of two pairs, and a warp fills two blocks completely.
//
// Source: the layout is this project's own; nibbles as in PTX ISA, mma.sp.

#include <cuda_runtime.h>

#include "api.h"
#include "layout.cuh"

namespace sparsert {
namespace {

constexpr int kThreads = 256;

template <typename Bits>
struct Pairs {  // row g: first, second; row g+8: first, second
  Bits low[2], high[2];
};

// Bits without the sign: -0.0 is zero.
__device__ __forceinline__ bool is_zero(uint16_t v) { return (v & 0x7FFFu) == 0; }
__device__ __forceinline__ bool is_zero(uint32_t v) { return (v & 0x7FFFFFFFu) == 0; }

// Where the metadata word of a thread stands, and what it is for: in two rows, four groups of four inputs each.
struct Place {
  int64_t tile, word, block_pairs;  // number of the row tile; index of the word; index of the block's first Pairs
  int g, half, column;              // row within the tile's upper half; half of the block's inputs; the first of them

  __device__ __forceinline__ Place(int64_t index, int units) {
    const int lane = index % 32, unit = index / 32 % units, q = lane % 4;
    const int block = unit * 2 + q / 2;
    tile = index / 32 / units;
    word = tile * units * 32 + metadata_word(units, unit, lane);
    block_pairs = (tile * units * 2 + block) * 64;  // two a lane
    g = lane / 4;
    half = q % 2;
    column = block * kBlock + half * 16;
  }
  __device__ __forceinline__ int64_t row(int part) const { return tile * kRowTile + g + part * 8; }
  __device__ __forceinline__ int64_t pair(int group) const { return block_pairs + (g * 4 + group) * 2 + half; }
};

template <typename Bits>
__global__ void __launch_bounds__(kThreads) pack24_kernel(Pack24Arguments p, int units, int64_t words) {
  const int64_t word_index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (word_index >= words) return;
  const Place at(word_index, units);
  const Bits* dense = static_cast<const Bits*>(p.dense);

  uint32_t word = 0;
  Pairs<Bits> pairs[4];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t row = at.row(part);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Bits kept[2] = {0, 0};
      uint32_t nibble = 0xE;
      const int first = at.column + 4 * j;
      if (row < p.N && first < p.K) {  // K is a multiple of 4: a group is inside or outside
        Bits value[4];
        uint32_t mask = 0;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          value[i] = dense[row * p.ld + first + i];
          const bool keep = p.mask ? p.mask[row * p.K + first + i] != 0 : !is_zero(value[i]);
          if (!keep) value[i] = 0;
          mask |= uint32_t(keep) << i;
        }
        nibble = kNibbleOfMask >> (4 * mask) & 0xF;
        if (nibble == 0) {
          atomicAdd(reinterpret_cast<unsigned long long*>(p.stats), 1ull);
          atomicMin(p.stats + 1, static_cast<long long>(row * (p.K / 4) + first / 4));
          nibble = 0xE;
        }
        // selects instead of a run-time index keep the four values in registers
        const uint32_t i0 = nibble & 3, i1 = nibble >> 2;
        kept[0] = i0 == 0 ? value[0] : i0 == 1 ? value[1] : value[2];
        kept[1] = i1 == 1 ? value[1] : i1 == 2 ? value[2] : value[3];
      }
      word |= nibble << (16 * part + 4 * j);
      (part == 0 ? pairs[j].low : pairs[j].high)[0] = kept[0];
      (part == 0 ? pairs[j].low : pairs[j].high)[1] = kept[1];
    }
  }
  Pairs<Bits>* values = static_cast<Pairs<Bits>*>(p.values);
#pragma unroll
  for (int j = 0; j < 4; ++j) values[at.pair(j)] = pairs[j];
  p.metadata[at.word] = word;
}

// Every group of a valid bitmask has two bits, so its values are a pair at a place that follows from its column alone.
template <typename Bits>
__global__ void __launch_bounds__(kThreads) pack24_bitmask_kernel(Pack24BitmaskArguments p, int units, int64_t words) {
  const int64_t word_index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (word_index >= words) return;
  const Place at(word_index, units);
  const int row_bytes = (p.K + 7) / 8;
  struct alignas(2 * sizeof(Bits)) Pair {
    Bits v[2];
  };
  const Pair* compressed = static_cast<const Pair*>(p.compressed);

  uint32_t word = 0;
  Pairs<Bits> pairs[4];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int64_t row = at.row(part);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      Pair kept = {{0, 0}};
      uint32_t nibble = 0xE;
      const int first = at.column + 4 * j;
      if (row < p.N && first < p.K) {
        const uint32_t mask = p.bitmask[row * row_bytes + first / 8] >> (first % 8) & 0xF;
        if (__popc(mask) == 2)
          nibble = kNibbleOfMask >> (4 * mask) & 0xF;
        else
          atomicAdd(p.bad, 1);
        kept = compressed[row * (p.K / 4) + first / 4];
      } else if (row < p.N && first == p.K && p.K % 8 == 4) {  // the half of the last byte that stands for nothing
        if (p.bitmask[row * row_bytes + first / 8] >> 4) atomicAdd(p.bad, 1);
      }
      word |= nibble << (16 * part + 4 * j);
      (part == 0 ? pairs[j].low : pairs[j].high)[0] = kept.v[0];
      (part == 0 ? pairs[j].low : pairs[j].high)[1] = kept.v[1];
    }
  }
  Pairs<Bits>* values = static_cast<Pairs<Bits>*>(p.values);
#pragma unroll
  for (int j = 0; j < 4; ++j) values[at.pair(j)] = pairs[j];
  p.metadata[at.word] = word;
}

template <typename Bits>
__global__ void __launch_bounds__(kThreads) unpack24_kernel(Unpack24Arguments p, int units, int64_t words) {
  const int64_t word_index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (word_index >= words) return;
  const Place at(word_index, units);
  const Pairs<Bits>* values = static_cast<const Pairs<Bits>*>(p.values);
  const uint32_t word = p.metadata[at.word];
  Bits* dense = static_cast<Bits*>(p.dense);

#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const Pairs<Bits> pair = values[at.pair(j)];
    const int first = at.column + 4 * j;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const int64_t row = at.row(part);
      if (row >= p.N || first >= p.K) continue;
      const uint32_t nibble = word >> (16 * part + 4 * j) & 0xF;
      const Bits* kept = part == 0 ? pair.low : pair.high;
      struct alignas(4 * sizeof(Bits)) Group {
        Bits v[4];
      } group;
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        group.v[i] = i == (nibble & 3) ? kept[0] : i == nibble >> 2 ? kept[1] : Bits(0);
      // K is a multiple of 4, so a group of a contiguous result is aligned
      *reinterpret_cast<Group*>(dense + row * p.K + first) = group;
    }
  }
}

template <typename Kernel, typename Arguments>
int launch(Kernel kernel, const Arguments& a, void* stream) {
  if (a.N < 1 || a.K < 4 || a.K % 4 != 0) return cudaErrorInvalidValue;
  const int units = (a.K + kUnit - 1) / kUnit;
  const int64_t words = int64_t((a.N + kRowTile - 1) / kRowTile) * units * 32;
  kernel<<<static_cast<unsigned>((words + kThreads - 1) / kThreads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      a, units, words);
  return cudaGetLastError();
}

}  // namespace

int pack24(const Pack24Arguments& a, void* stream) {
  return a.dtype == DType::kFloat32 ? launch(pack24_kernel<uint32_t>, a, stream)
                                    : launch(pack24_kernel<uint16_t>, a, stream);
}

int pack24_bitmask(const Pack24BitmaskArguments& a, void* stream) {
  return a.dtype == DType::kFloat32 ? launch(pack24_bitmask_kernel<uint32_t>, a, stream)
                                    : launch(pack24_bitmask_kernel<uint16_t>, a, stream);
}

int unpack24(const Unpack24Arguments& a, void* stream) {
  return a.dtype == DType::kFloat32 ? launch(unpack24_kernel<uint32_t>, a, stream)
                                    : launch(unpack24_kernel<uint16_t>, a, stream);
}

}  // namespace sparsert
