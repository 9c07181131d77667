#include "pack_cpu.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "layout.h"
#include "parallel.h"

// The layout, with a picture, is in sparsert/formats/packed.py. Row tiles are independent, so threads take ranges of
// them; within a tile the walk is row by row, because reading the dense rows in order is what memory likes.

namespace sparsert {
namespace {

constexpr int64_t kRowTile = kHostRowTile, kUnit = kHostUnit;
constexpr uint32_t kPaddingNibble = 0xE;
constexpr uint8_t kNibbleOfMask[16] = {0xE, 0x8, 0x9, 0x4, 0xE, 0x8, 0x9, 0, 0xE, 0xC, 0xD, 0, 0xE, 0, 0, 0};

template <typename Bits>
constexpr Bits kMagnitude = static_cast<Bits>(~(Bits(1) << (8 * sizeof(Bits) - 1)));

// Where the pair of group `group` (of 16 in a unit) and row `row` (of 16 in a tile) lives, in elements from the unit's
// values: block, lane 4g+q, then register pair.
int64_t pair_offset(int64_t group, int64_t row) {
  const int64_t block = group / 8, half = group / 4 % 2, q = group % 4;
  return block * 256 + (row % 8 * 4 + q) * 8 + half * 4 + row / 8 * 2;
}

// Lane whose metadata word holds a group, and the bit of its nibble.
int64_t word_lane(int64_t group, int64_t row) { return row % 8 * 4 + group / 4; }
int word_bit(int64_t group, int64_t row) { return static_cast<int>(row / 8 * 16 + group % 4 * 4); }

struct Stats {
  int64_t bad = 0, first = std::numeric_limits<int64_t>::max();
};

template <typename Bits>
Stats pack_tiles(const Bits* dense, const uint8_t* mask, Bits* values, uint32_t* metadata, int64_t rows,
                 int64_t columns, int64_t row_stride, int64_t begin, int64_t end) {
  const int64_t units = host_units(columns);
  Stats stats;
  std::vector<uint32_t> words(units * 32);
  for (int64_t tile = begin; tile < end; ++tile) {
    Bits* tile_values = values + tile * units * 512;
    std::fill(words.begin(), words.end(), 0u);
    for (int64_t row = 0; row < kRowTile; ++row) {
      const int64_t r = tile * kRowTile + row;
      for (int64_t unit = 0; unit < units; ++unit) {
        for (int64_t group = 0; group < 16; ++group) {
          const int64_t column = unit * kUnit + group * 4;
          Bits kept[2] = {0, 0};
          uint32_t nibble = kPaddingNibble;
          if (r < rows && column < columns) {
            Bits value[4];
            std::memcpy(value, dense + r * row_stride + column, sizeof(value));
            uint32_t keep = 0;
            for (int i = 0; i < 4; ++i) {
              const bool k = mask ? mask[r * columns + column + i] != 0 : (value[i] & kMagnitude<Bits>) != 0;
              keep |= uint32_t(k) << i;
              value[i] = k ? value[i] : Bits(0);
            }
            nibble = kNibbleOfMask[keep];
            if (nibble == 0) {
              ++stats.bad;
              stats.first = std::min(stats.first, r * (columns / 4) + column / 4);
              nibble = kPaddingNibble;
            }
            kept[0] = value[nibble & 3];
            kept[1] = value[nibble >> 2];
          }
          std::memcpy(tile_values + unit * 512 + pair_offset(group, row), kept, sizeof(kept));
          words[unit * 32 + word_lane(group, row)] |= nibble << word_bit(group, row);
        }
      }
    }
    for (int64_t unit = 0; unit < units; ++unit)
      for (int64_t lane = 0; lane < 32; ++lane)
        metadata[tile * units * 32 + host_metadata_word(units, unit, lane)] = words[unit * 32 + lane];
  }
  return stats;
}

// Four values side by side, the first in the lowest bits: little-endian machines only, as x86-64 and Arm are.
__extension__ typedef unsigned __int128 Bits128;
template <typename Bits>
using Group = std::conditional_t<sizeof(Bits) == 2, uint64_t, Bits128>;

// The first `groups` groups of a row in one unit.
template <typename Bits>
inline void unpack_groups(const Bits* unit_values, const uint32_t (&words)[4], Bits* dense, int64_t row, int64_t groups) {
  for (int64_t group = 0; group < groups; ++group) {
    const uint32_t nibble = words[group / 4] >> word_bit(group, row) & 0xF;
    Bits kept[2];
    std::memcpy(kept, unit_values + pair_offset(group, row), sizeof(kept));
    // shifted into place in a register: parts stored one by one and read back as a whole would be waited for
    const auto out = static_cast<Group<Bits>>(kept[0]) << (nibble & 3) * 8 * sizeof(Bits) |
                     static_cast<Group<Bits>>(kept[1]) << (nibble >> 2) * 8 * sizeof(Bits);
    std::memcpy(dense + group * 4, &out, sizeof(out));
  }
}

template <typename Bits>
void unpack_tiles(const Bits* values, const uint32_t* metadata, Bits* dense, int64_t rows, int64_t columns,
                  int64_t begin, int64_t end) {
  const int64_t units = host_units(columns), whole = columns / kUnit;
  for (int64_t tile = begin; tile < end; ++tile) {
    const Bits* tile_values = values + tile * units * 512;
    const uint32_t* tile_metadata = metadata + tile * units * 32;
    for (int64_t row = 0; row < kRowTile && tile * kRowTile + row < rows; ++row) {
      Bits* to = dense + (tile * kRowTile + row) * columns;
      for (int64_t unit = 0; unit < units; ++unit, to += kUnit) {
        uint32_t words[4];
        for (int64_t q = 0; q < 4; ++q) words[q] = tile_metadata[host_metadata_word(units, unit, row % 8 * 4 + q)];
        if (unit < whole)
          unpack_groups(tile_values + unit * 512, words, to, row, 16);  // a constant, so that the loop is unrolled
        else
          unpack_groups(tile_values + unit * 512, words, to, row, (columns - whole * kUnit) / 4);
      }
    }
  }
}

template <typename Bits>
void pack(const void* dense, const uint8_t* mask, void* values, uint32_t* metadata, int64_t* stats, int64_t rows,
          int64_t columns, int64_t row_stride, int threads) {
  const int64_t tiles = (rows + kRowTile - 1) / kRowTile;
  std::vector<Stats> found(std::max(threads, 1));
  parallel_for(tiles, threads, [&](int worker, int64_t begin, int64_t end) {
    found[worker] = pack_tiles(static_cast<const Bits*>(dense), mask, static_cast<Bits*>(values), metadata, rows,
                               columns, row_stride, begin, end);
  });
  for (const Stats& s : found) {
    stats[0] += s.bad;
    stats[1] = std::min(stats[1], s.first);
  }
}

template <typename Bits>
void unpack(const void* values, const uint32_t* metadata, void* dense, int64_t rows, int64_t columns, int threads) {
  parallel_for((rows + kRowTile - 1) / kRowTile, threads, [&](int, int64_t begin, int64_t end) {
    unpack_tiles(static_cast<const Bits*>(values), metadata, static_cast<Bits*>(dense), rows, columns, begin, end);
  });
}

}  // namespace

void pack24_cpu(const void* dense, const uint8_t* mask, void* values, uint32_t* metadata, int64_t* stats, int64_t rows,
                int64_t columns, int64_t row_stride, int element_size, int threads) {
  (element_size == 4 ? pack<uint32_t> : pack<uint16_t>)(dense, mask, values, metadata, stats, rows, columns, row_stride,
                                                        threads);
}

void unpack24_cpu(const void* values, const uint32_t* metadata, void* dense, int64_t rows, int64_t columns,
                  int element_size, int threads) {
  (element_size == 4 ? unpack<uint32_t> : unpack<uint16_t>)(values, metadata, dense, rows, columns, threads);
}

}  // namespace sparsert
