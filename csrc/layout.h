// The packed 2:4 layout for host code; the picture is in sparsert/formats/packed.py.
#pragma once

#include <cstdint>

namespace sparsert {

constexpr int64_t kHostRowTile = 16, kHostUnit = 64, kHostUnitsPerChunk = 4;
constexpr int64_t kHostUnitValues = 512;  // values of a row tile in one unit: two blocks

inline int64_t host_units(int64_t columns) { return (columns + kHostUnit - 1) / kHostUnit; }

// Word index of (unit, lane) inside the metadata of one row tile: full chunks are [lane][4 units], the rest
// [unit][lane].
inline int64_t host_metadata_word(int64_t units, int64_t unit, int64_t lane) {
  const int64_t full = units / kHostUnitsPerChunk * kHostUnitsPerChunk;
  if (unit < full) return unit / kHostUnitsPerChunk * 128 + lane * kHostUnitsPerChunk + unit % kHostUnitsPerChunk;
  return unit * 32 + lane;
}

}  // namespace sparsert
