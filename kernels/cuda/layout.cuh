// The packed 2:4 layout as the GPU sees it. The picture and the reasons are in sparsert/formats/packed.py.
#pragma once

#include <cstdint>

namespace sparsert {

constexpr int kRowTile = 16;                   // outputs of a block
constexpr int kBlock = 32;                     // inputs of a block
constexpr int kUnit = 64;                      // inputs that one metadata word of a lane serves: two blocks
constexpr int kChunk = 256;                    // inputs that one 16-byte metadata load of a lane serves
constexpr int kUnitsPerChunk = kChunk / kUnit;
constexpr int kMetadataUnitBytes = 32 * 4;     // one word a lane

// Nibble for a 4-bit mask whose bit p is set when position p is kept; 0 marks three or more kept.
// Sixteen nibbles in one 64-bit constant: entry m sits at bits 4m..4m+3.
constexpr uint64_t kNibbleOfMask = 0x000E'0DCE'098E'498Eull;

// Word index of (unit, lane) inside the metadata of one row tile: full chunks are [lane][4 units], the rest [unit][lane].
__host__ __device__ inline int64_t metadata_word(int units, int unit, int lane) {
  const int full = units / kUnitsPerChunk * kUnitsPerChunk;
  if (unit < full) return int64_t(unit / kUnitsPerChunk) * 128 + lane * kUnitsPerChunk + unit % kUnitsPerChunk;
  return int64_t(unit) * 32 + lane;
}

// Element of activations in tiles (api.h); `k` is a multiple of 4, and four values from it lie together.
__host__ __device__ inline int64_t tiled_element(int tiles, int row, int k) {
  return ((int64_t(k / kBlock) * tiles + row / 8) * 32 + k % kBlock / 8 * 8 + row % 8) * 8 + k % 8;
}

}  // namespace sparsert
