// What gemm24.cuh is told, and which tiles and inputs each of its blocks works on.

#pragma once

#include <cuda.h>

#include <cstdint>

#include "api.h"
#include "layout.cuh"
#include "wgmma.cuh"

namespace sparsert::gemm24_detail {

constexpr int kThreads = 384;  // one warpgroup for copies, two for products
constexpr int kWarps = 8;      // that multiply
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kUnitBytes = kUnit * 2;             // of a token's activations
constexpr int kUnitValueBytes = 2 * 512;          // of a row tile
constexpr int kMetadataUnitWords = kMetadataUnitBytes / 4;
constexpr int kChunkMetadataBytes = kUnitsPerChunk * kMetadataUnitBytes;  // of a row tile
constexpr int kMaxSplits = 8;                     // portable cluster size
constexpr int kMaxSharers = 2;                    // clusters of four do not fill a Hopper GPU
constexpr int kStagedTokens = 32;                 // that a warpgroup writes at a time
// Tiles of tokens that blocks work on before they turn to other tokens.
constexpr int kRaster = 8;

struct KernelArguments {
  CUtensorMap x;         // [M, K] in boxes of 64 inputs, swizzled
  CUtensorMap values;    // [row tiles, blocks of 32 inputs, 256] in boxes of a unit and the row tiles of a block
  CUtensorMap metadata;  // [row tiles, words] in boxes of a chunk and the row tiles of a block
  CUtensorMap y_map;     // [M, N] or [M, N / 2] in boxes of kStagedTokens tokens, swizzled; not where inputs are split
  const void* bias;
  void* y;
  int M, N;
  int units;
  int group_sets, token_tiles;  // sets of output groups that a cluster works on at a time: one a block, or one in all
  int cluster;                  // blocks that share activations, or over which the inputs are split
  int teams;                    // of token_tiles clusters, for even work; 0: whole tiles
  float* partial_sums;          // room for one tile a block, and
  unsigned long long* marks;    // for one mark a block; only for even work
  Activation activation;
  bool gated;
};

#if SPARSERT_WGMMA

struct Tile {
  int group, tokens;  // numbers of the output group and of the tile of tokens
};

// Chunks begin .. end-1 of the n-th tile of a cluster.
struct Work {
  int n, begin, end;
};

// What a cluster does. As a rule whole tiles, in turn with the others. Where that would leave many idle in the last round,
// the chunks of all outputs are laid end to end and dealt out evenly (stream-K), to teams of clusters that have the same
// outputs and chunks and each another tile of tokens, so that weights are still read once:
//
//   outputs  0               1               2
//   chunks   |---------------|---------------|---------------|
//   teams    |---- 0 ----|---- 1 ----|---- 2 ----|---- 3 ----|
//
// Who has the last chunk adds up and writes. He needs what teams of lower number left, and everybody begins with the
// chunks that somebody else waits for, so nobody waits long, and nobody for a block that has not started.
struct Schedule {
  int chunks, tiles, step;
  int n;                                    // the next whole tile
  int team, member;                         // of even work
  int even_begin = 0, even_end = 0;         // chunks that are still to do

  __device__ __forceinline__ Schedule(const KernelArguments& p, int cluster, int clusters) {
    chunks = (p.units + kUnitsPerChunk - 1) / kUnitsPerChunk;
    tiles = p.group_sets * p.token_tiles;
    step = clusters;
    n = cluster;
    team = cluster / p.token_tiles;
    member = cluster % p.token_tiles;
    if (p.teams > 0) {
      n = tiles;
      if (team < p.teams) {
        even_begin = first_of(p, team);
        even_end = first_of(p, team + 1);
      }
    }
  }
  __device__ __forceinline__ int first_of(const KernelArguments& p, int team) const {
    return int(int64_t(p.group_sets) * chunks * team / p.teams);
  }
  __device__ __forceinline__ bool next(const KernelArguments& p, Work& work) {
    if (even_end > even_begin) {
      const int set = (even_end - 1) / chunks;
      work.n = set * p.token_tiles + member;
      work.begin = max(even_begin - set * chunks, 0);
      work.end = even_end - set * chunks;
      even_end = set * chunks + work.begin;
      return true;
    }
    work = {n, 0, chunks};
    n += step;
    return work.n < tiles;
  }
};

// The n-th tile of block `rank` of a cluster: kRaster tiles of tokens with all outputs, then the next.
template <bool Split>
__device__ __forceinline__ Tile tile_at(const KernelArguments& p, int n, int rank) {
  const int wide = p.group_sets * kRaster, part = n / wide, inside = n % wide;
  const int width = min(kRaster, p.token_tiles - part * kRaster), set = inside / width;
  return {Split ? set : set * p.cluster + rank, part * kRaster + inside % width};
}

#endif

}  // namespace sparsert::gemm24_detail
