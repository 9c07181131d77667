// y[M, N] = x[M, K] W^T (+ bias, activation) for prompts and large batches, W packed 2:4 (layout.cuh), on wgmma.sp.
//
// The same packed bytes that linear24.cuh decodes from: a warp's registers and metadata words of mma.sp are also those of
// wgmma.sp with A in registers, so outputs are the rows of the product and tokens its columns.
//
//   * Weights go from global memory straight into registers, several units (64 inputs) ahead: no shared memory, no
//     conversion. What the tensor cores read from shared memory are the activations, and at the sparse rate that reading
//     alone takes all that shared memory gives (128 bytes a clock); so everything else has to keep out of it.
//   * One warp asks the copy engine for activations, swizzled, in a ring. A cluster of two blocks with different outputs
//     shares them: each fetches half of the tokens for both, which saves a quarter of the reads from L2.
//   * Two warpgroups multiply. A warp holds neighbouring row tiles, so a gate and its factor, which stand in turn, meet in
//     one thread, and the product needs no further pass.
//   * Blocks stay for all their tiles, in an order that keeps a few weights and a few tokens in L2; while a tile is
//     written the activations of the next one arrive. Or their work is dealt out evenly by inputs (Schedule).
//   * Layers with few tiles split their inputs over a cluster instead and add up through distributed shared memory, in a
//     fixed order, as linear24.cuh does.
//
// Source: PTX ISA (wgmma.mma_async.sp, cp.async.bulk.tensor, setmaxnreg); NVIDIA CUTLASS, warp-specialized persistent
// kernels of Hopper; CUTLASS has no mainloop with sparse A in registers.

#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "activation.cuh"
#include "api.h"
#include "launch.cuh"
#include "layout.cuh"
#include "outputs.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace sparsert::gemm24_detail {

constexpr int kThreads = 384;  // one warpgroup for copies, two for products
constexpr int kWarps = 8;      // that multiply
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
constexpr int kUnitBytes = kUnit * 2;             // of a token's activations
constexpr int kUnitValueBytes = 2 * 512;          // of a row tile
constexpr int kMaxSplits = 8;                     // portable cluster size
constexpr int kMaxSharers = 2;                    // clusters of four do not fill a Hopper GPU
constexpr int kStagedTokens = 32;                 // that a warpgroup writes at a time
// Tiles of tokens that blocks work on before they turn to other tokens.
constexpr int kRaster = 8;

struct KernelArguments {
  CUtensorMap x;      // [M, K] in boxes of 64 inputs, swizzled
  CUtensorMap y_map;  // [M, N] or [M, N / 2] in boxes of kStagedTokens tokens, swizzled; not where inputs are split
  const char* values;
  const char* metadata;
  const void* bias;
  void* y;
  int M, N;
  int row_tiles, units;
  int group_sets, token_tiles;  // sets of output groups that a cluster works on at a time: one a block, or one in all
  int cluster;                  // blocks that share activations, or over which the inputs are split
  int teams;                    // of token_tiles clusters, for even work; 0: whole tiles
  float* partial_sums;          // room for one tile a block, and
  unsigned long long* marks;    // for one mark a block; only for even work
  Activation activation;
  bool gated;
};

template <int RowTiles, int Tokens, int Stages, int Depth, bool Split>
struct Shape {
  static constexpr int kOutputs = kRowTile * RowTiles * kWarps;
  static constexpr int kStageBytes = Tokens * kUnitBytes;
  static constexpr int kRingBytes = Stages * kStageBytes;
  static constexpr int kStagedBytes = Split ? 0 : 2 * 2 * kStagedTokens * RowTiles * 128;  // two buffers a warpgroup
  // Two rooms in which warps swap gates and factors.
  static constexpr int kExchangeBytes = Split || RowTiles == 2 ? 0 : 2 * kWarps * 32 * 16;
  static constexpr int kSumStride = kOutputs + 4;  // floats of one token
  static constexpr int kSumBytes = Split ? Tokens * kSumStride * 4 : 0;
  static constexpr int kTileBytes = kRingBytes + kStagedBytes + kExchangeBytes;
  static constexpr int kMainBytes = kTileBytes > kSumBytes ? kTileBytes : kSumBytes;
  static constexpr int kSharedBytes = kMainBytes + 2 * Stages * 8 + 1024;  // the ring starts at a multiple of 1,024
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(Depth == 4 || Depth == 8 || Depth == 16);
};

#if SPARSERT_WGMMA

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}
__device__ __forceinline__ uint32_t pack(float low, float high, __half) {
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Where a block is in its ring.
template <int Stages>
struct Place {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    if (++stage == Stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

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

// What a warpgroup multiplies: RowTiles tiles of 16 outputs a warp, `Depth` units in flight.
template <typename T, int RowTiles, int Tokens, int Stages, int Depth>
struct Products {
  float sum[RowTiles][Tokens / 2];
  uint4 a[Depth][RowTiles][2];
  uint32_t e[2][RowTiles][Depth / 2];  // metadata of the batch at hand and of the next one
  const char* values;    // of the first tile and this lane
  const char* metadata;  // of the first tile
  int next_tile;         // units from a tile to the next; 0 where there is none
  int unit_end;

  __device__ __forceinline__ void load_values(int slot, int unit) {
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
#pragma unroll
      for (int b = 0; b < 2; ++b)
        a[slot][r][b] =
            ptx::load_or_zero_16(values + (unit + r * next_tile) * kUnitValueBytes + b * 512, unit < unit_end);
  }
  // Of a batch that begins with `unit`. In a full chunk a lane's words lie side by side, in what is left over the units do.
  __device__ __forceinline__ void load_metadata(int slot, int unit, int units, int lane) {
    constexpr int kTogether = Depth / 2 < kUnitsPerChunk ? Depth / 2 : kUnitsPerChunk;
#pragma unroll
    for (int part = 0; part < Depth / 2; part += kTogether) {
      const int first = unit + part, chunk = first / kUnitsPerChunk * kUnitsPerChunk;
      const bool full = chunk + kUnitsPerChunk <= units;
      const int at = full ? lane * 16 + first % kUnitsPerChunk * 4 : (first - chunk) * kMetadataUnitBytes + lane * 4;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) {
        const char* const from = metadata + (chunk + r * next_tile) * kMetadataUnitBytes + at;
        uint32_t* const to = e[slot][r] + part;
        if (!full) {
#pragma unroll
          for (int i = 0; i < kTogether; ++i)
            to[i] = ptx::load_or_zero_4(from + i * kMetadataUnitBytes, first + i < unit_end);
        } else if constexpr (kTogether == kUnitsPerChunk) {
          const uint4 v = ptx::load_or_zero_16(from, first < unit_end);
          to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
        } else {
          const uint2 v = ptx::load_or_zero_8(from, first < unit_end);
          to[0] = v.x, to[1] = v.y;
        }
      }
    }
  }
  // Point at a tile and ask for its first units.
  __device__ __forceinline__ void begin(const KernelArguments& p, int first_tile, int chunk_begin, int end, int lane) {
    const int64_t first = int64_t(min(first_tile, p.row_tiles - 1)) * p.units;
    unit_end = end;
    // outputs past the end are computed from others' weights and not stored
    next_tile = first_tile + RowTiles <= p.row_tiles ? p.units : 0;
    values = p.values + first * kUnitValueBytes + lane * 16;
    metadata = p.metadata + first * kMetadataUnitBytes;
    load_metadata(0, chunk_begin * kUnitsPerChunk, p.units, lane);
#pragma unroll
    for (int u = 0; u < Depth / 2; ++u) load_values(u, chunk_begin * kUnitsPerChunk + u);
  }
};

template <int RowTiles, int Tokens, int Stages, int Depth, bool Split, typename NextWork>
__device__ __forceinline__ void produce(const KernelArguments& p, uint32_t ring, uint32_t full, uint32_t empty, int rank,
                                        NextWork next_work) {
  using S = Shape<RowTiles, Tokens, Stages, Depth, Split>;
  const int shared_by = Split ? 1 : p.cluster;
  const int box = Tokens / shared_by;  // tokens that this block fetches
  Place<Stages> place;
  ptx::wait_dependency();
  for (Work work; next_work(work);) {
    const int first = tile_at<Split>(p, work.n, rank).tokens * Tokens;
    for (int unit = work.begin * kUnitsPerChunk; unit < work.end * kUnitsPerChunk; ++unit) {
      const uint32_t barrier = full + place.stage * 8, to = ring + place.stage * S::kStageBytes;
      ptx::barrier_wait(empty + place.stage * 8, place.parity ^ 1);
      ptx::barrier_expect(barrier, S::kStageBytes);
      if (shared_by == 1)
        ptx::copy_box(to, &p.x, unit * kUnit, first, barrier);
      else
        ptx::copy_box_shared(to + rank * box * kUnitBytes, &p.x, unit * kUnit, first + rank * box, barrier,
                             uint16_t((1 << shared_by) - 1));
      place.next();
    }
  }
}

// A mark says that a block's partial sums are complete. It names the block, so that no number that happened to lie there
// is taken for one; who has read them wipes it out.
__device__ __forceinline__ unsigned long long mark_of(int block) { return 0x5BA2'6E3D'91C7'0000ull + block; }

// Sums of a warpgroup's threads, in the order in which the same threads of another block will read them.
template <int Sums>
__device__ __forceinline__ void leave_sums(const KernelArguments& p, const float (&sum)[1][Sums], int thread) {
  float4* const to = reinterpret_cast<float4*>(p.partial_sums) + int64_t(blockIdx.x) * (Sums / 4) * 256 + thread;
#pragma unroll
  for (int i = 0; i < Sums / 4; ++i)
    __stcg(to + i * 256, make_float4(sum[0][4 * i], sum[0][4 * i + 1], sum[0][4 * i + 2], sum[0][4 * i + 3]));
  __threadfence();
  asm volatile("bar.sync 1, 256;" ::: "memory");
  if (thread == 0) ptx::store_release(p.marks + blockIdx.x, mark_of(blockIdx.x));
}

// Adds what a block of lower number left.
template <int Sums>
__device__ __forceinline__ void collect_sums(const KernelArguments& p, float (&sum)[1][Sums], int block, int thread) {
  if (thread % 32 == 0)
    while (ptx::load_acquire(p.marks + block) != mark_of(block)) __nanosleep(32);
  __syncwarp();
  const float4* const from = reinterpret_cast<const float4*>(p.partial_sums) + int64_t(block) * (Sums / 4) * 256 + thread;
#pragma unroll
  for (int i = 0; i < Sums / 4; ++i) {
    const float4 v = __ldcg(from + i * 256);
    sum[0][4 * i] += v.x;
    sum[0][4 * i + 1] += v.y;
    sum[0][4 * i + 2] += v.z;
    sum[0][4 * i + 3] += v.w;
  }
  asm volatile("bar.sync 1, 256;" ::: "memory");  // everybody has seen the mark
  if (thread == 0) p.marks[block] = 0;
}

// Bias of the rows g and g + 8 of each tile of a warp; zero where there is none.
template <typename T, int RowTiles>
__device__ __forceinline__ void load_bias(float (&added)[RowTiles][2], const KernelArguments& p, int first_output, int lane) {
#pragma unroll
  for (int r = 0; r < RowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int output = first_output + r * kRowTile + h * 8 + lane / 4;
      added[r][h] = p.bias != nullptr && output < p.N ? float(static_cast<const T*>(p.bias)[output]) : 0.0f;
    }
}

// Rounds one warpgroup's outputs of a tile and gives them to the copy engine, kStagedTokens tokens at a time through two
// buffers, so that the next tile's products begin while they are being written. Gated: SiLU of the gate times its factor.
// Other activations would be inlined for every number, and code that does not fit the instruction cache costs more than a
// kernel of its own.
template <typename T, int RowTiles, int Tokens, bool Gated>
struct TileWriter {
  static constexpr int kRowBytes = Gated && RowTiles == 1 ? 64 : 128;  // of a token in a panel, swizzled by as much
  static constexpr int kPanels = RowTiles == 2 && !Gated ? 2 : 1;
  static constexpr int kPanelBytes = kStagedTokens * kRowBytes;
  static constexpr int kPanelOutputs = kRowBytes / 2;

  uint32_t staged;    // this warpgroup's two buffers
  uint32_t exchange;  // both warpgroups' two rooms for swapping gates and factors
  int slabs = 0;      // written so far

  // Where lane l's row of matrix l / 8 goes: 8 outputs of one token. `piece` counts 16 bytes along the outputs.
  static __device__ __forceinline__ uint32_t place(uint32_t buffer, int token, int piece) {
    const int swizzled = kRowBytes == 128 ? piece % 8 ^ token % 8 : piece ^ token / 2 % 4;
    return buffer + piece / 8 * kPanelBytes + token * kRowBytes + swizzled * 16;
  }

  __device__ __forceinline__ void write(const KernelArguments& p, const float (&sum)[RowTiles][Tokens / 2],
                                        int first_output, int first_token, int warp, int lane) {
    const int group = warp / 4, inside = warp % 4;
    const bool leader = inside == 0 && lane == 0, is_factor = warp % 2 != 0;
    float added[RowTiles][2];
    load_bias<T>(added, p, first_output + warp * RowTiles * kRowTile, lane);
#pragma unroll
    for (int t = 0; t < Tokens; t += kStagedTokens) {
      if (first_token + t >= p.M) break;
      const uint32_t buffer = staged + slabs % 2 * kPanels * kPanelBytes;
      ++slabs;
      if (leader) ptx::bulk_wait_read<1>();  // the buffer's last contents are on their way
      asm volatile("bar.sync %0, 128;" ::"r"(6 + group) : "memory");
#pragma unroll
      for (int j = 0; j < kStagedTokens / 8; ++j) {
        const int at = (t / 8 + j) * 4;
        if constexpr (Gated && RowTiles == 1) {
          if (j % 2 != 0) continue;
          // Even warps have gates, odd ones factors. Of 16 tokens each warp computes 8, and gets from the other what it
          // lacks, lane by lane; two rooms, since one is read while the other is written.
          const uint32_t room = exchange + j / 2 % 2 * kWarps * 512 + lane * 16;
          float own[4], given[4], other[4], out[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float first = sum[0][at + i] + added[0][i / 2], second = sum[0][at + 4 + i] + added[0][i / 2];
            own[i] = is_factor ? second : first;
            given[i] = is_factor ? first : second;
          }
          ptx::store_shared_16(room + warp * 512, given);
          asm volatile("bar.sync %0, 64;" ::"r"(2 + warp / 2) : "memory");
          ptx::load_shared_floats(other, room + (warp ^ 1) * 512);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            out[i] = activation(Activation::kSilu, is_factor ? other[i] : own[i]) * (is_factor ? own[i] : other[i]);
          const int token = (j + (is_factor ? 1 : 0)) * 8 + lane % 8;
          ptx::store_matrix_x2_transposed(place(buffer, token, inside / 2 * 2 + lane / 8 % 2), pack(out[0], out[1], T{}),
                                          pack(out[2], out[3], T{}));
        } else {
          uint32_t v[RowTiles * 2];
#pragma unroll
          for (int r = 0; r < (Gated ? 1 : RowTiles); ++r)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              float out[2];
#pragma unroll
              for (int c = 0; c < 2; ++c) {
                out[c] = sum[r][at + 2 * h + c] + added[r][h];
                if constexpr (Gated)
                  out[c] = activation(Activation::kSilu, out[c]) * (sum[RowTiles - 1][at + 2 * h + c] + added[RowTiles - 1][h]);
              }
              v[r * 2 + h] = pack(out[0], out[1], T{});
            }
          const int token = j * 8 + lane % 8;
          if constexpr (kPanels == 2)
            ptx::store_matrix_x4_transposed(place(buffer, token, inside * 4 + lane / 8), v[0], v[1], v[2], v[3]);
          else
            ptx::store_matrix_x2_transposed(place(buffer, token, inside * 2 + lane / 8 % 2), v[0], v[1]);
        }
      }
      ptx::fence_async();
      asm volatile("bar.sync %0, 128;" ::"r"(6 + group) : "memory");
      if (leader) {
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel)
          ptx::store_box(&p.y_map, (first_output / (Gated ? 2 : 1)) + (group * kPanels + panel) * kPanelOutputs, first_token + t,
                         buffer + panel * kPanelBytes);
        ptx::bulk_commit();
      }
    }
  }

  __device__ __forceinline__ void finish(int warp, int lane) {
    if (warp % 4 == 0 && lane == 0) ptx::bulk_wait_read<0>();
  }
};

// Adds up what the blocks of a cluster have of one tile, and writes this block's share of it.
template <typename T, int Outputs, int Tokens, int SumStride>
__device__ __forceinline__ void write_sums(const KernelArguments& p, uint32_t sums, int first_output, int first_token,
                                           int rank, int thread) {
  const T* const bias = static_cast<const T*>(p.bias);
  T* const y = static_cast<T*>(p.y);
  const int tokens = min(Tokens, p.M - first_token), step = p.cluster * kWarps * 32;
  auto total_at = [&](int token, int row) {
    const uint32_t address = sums + (token * SumStride + row) * 4;
    float4 part[kMaxSplits];
#pragma unroll
    for (int s = 0; s < kMaxSplits; ++s)
      if (s < p.cluster) part[s] = ptx::load_cluster(address, s);
    float4 total = part[0];
#pragma unroll
    for (int s = 1; s < kMaxSplits; ++s)
      if (s < p.cluster) add(total, part[s]);
    return total;
  };
  if (p.gated) {
    constexpr int kQuads = Outputs / 8;
    for (int i = rank * kWarps * 32 + thread; i < kQuads * tokens; i += step) {
      const int token = i / kQuads, quad = i % kQuads, row = quad / 4 * 2 * kRowTile + quad % 4 * 4;
      float4 gate = total_at(token, row), total = total_at(token, row + kRowTile);
      add_bias(gate, bias, first_output + row, p.N);
      add_bias(total, bias, first_output + row + kRowTile, p.N);
      total.x *= activation(p.activation, gate.x);
      total.y *= activation(p.activation, gate.y);
      total.z *= activation(p.activation, gate.z);
      total.w *= activation(p.activation, gate.w);
      store_quad(y + int64_t(first_token + token) * (p.N / 2), first_output / 2 + quad * 4, p.N / 2, total);
    }
    return;
  }
  constexpr int kQuads = Outputs / 4;
  for (int i = rank * kWarps * 32 + thread; i < kQuads * tokens; i += step) {
    const int token = i / kQuads, row = i % kQuads * 4;
    float4 total = total_at(token, row);
    add_bias(total, bias, first_output + row, p.N);
    if (p.activation != Activation::kNone) {
      total.x = activation(p.activation, total.x);
      total.y = activation(p.activation, total.y);
      total.z = activation(p.activation, total.z);
      total.w = activation(p.activation, total.w);
    }
    store_quad(y + int64_t(first_token + token) * p.N, first_output + row, p.N, total);
  }
}

template <typename T, int RowTiles, int Tokens, int Stages, int Depth, bool Split, bool Gated, typename NextWork>
__device__ __forceinline__ void consume(const KernelArguments& p, uint32_t ring, uint32_t full, uint32_t empty,
                                        uint32_t staged, unsigned char* shared, int rank, NextWork next_work,
                                        const Schedule& schedule) {
  using S = Shape<RowTiles, Tokens, Stages, Depth, Split>;
  const int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
  const int shared_by = Split ? 1 : p.cluster;
  // Units of weights are asked for in batches, one ahead: the hardware tells loads apart by six counters, so a wait for a
  // load is one for all that were asked for since, and a request for each unit would be waited for at once.
  constexpr int kBatch = Depth / 2;
  Products<T, RowTiles, Tokens, Stages, Depth> products;
  Place<Stages> place;
  auto begin = [&](const Work& work) {
    const int first_tile = (tile_at<Split>(p, work.n, rank).group * kWarps + warp) * RowTiles;
    products.begin(p, first_tile, work.begin, min(work.end * kUnitsPerChunk, p.units), lane);
  };
  TileWriter<T, RowTiles, Tokens, Gated> writer{staged + warp / 4 * (S::kStagedBytes / 2), staged + S::kStagedBytes};
  Work work;
  bool more = next_work(work);
  if (more) begin(work);
  ptx::wait_dependency();  // outputs may lie where the kernel before still reads
  while (more) {
    const Work now = work;
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
#pragma unroll
      for (int i = 0; i < Tokens / 2; ++i) products.sum[r][i] = 0;

    int last = -1;  // stage whose products are under way
    auto release = [&]() {
      if (last < 0) return;
      if (shared_by == 1) {
        if (lane == 0) ptx::barrier_arrive(empty + last * 8);
      } else if (lane < shared_by) {
        ptx::barrier_arrive_cluster(empty + last * 8, lane);
      }
    };
    auto chunk_products = [&](auto parity, int chunk) {
      constexpr int P = decltype(parity)::value;
#pragma unroll
      for (int u = 0; u < kUnitsPerChunk; ++u) {
        constexpr int kBase = P * kUnitsPerChunk;
        const int slot = (kBase + u) % Depth;
        ptx::barrier_wait(full + place.stage * 8, place.parity);
        const uint64_t b = wgmma::descriptor(ring + place.stage * S::kStageBytes, 0);
        wgmma::fence();
#pragma unroll
        for (int r = 0; r < RowTiles; ++r)
          wgmma::multiply<Tokens, 0>(products.sum[r], products.a[slot][r][0], b, products.e[slot / kBatch][r][slot % kBatch], T{});
#pragma unroll
        for (int r = 0; r < RowTiles; ++r)
          wgmma::multiply<Tokens, 1>(products.sum[r], products.a[slot][r][1], b + kBlock * 2 / 16, products.e[slot / kBatch][r][slot % kBatch],
                                     T{});
        wgmma::commit();
        wgmma::wait<1>();  // the unit before is done: its activations and registers are free
        release();
        last = place.stage;
        place.next();
        if (slot % kBatch == 0) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i)
            products.load_values((slot + kBatch + i) % Depth, chunk * kUnitsPerChunk + u + kBatch + i);
          products.load_metadata(slot / kBatch ^ 1, chunk * kUnitsPerChunk + u + kBatch, p.units, lane);
        }
      }
    };
    constexpr int kChunks = Depth / kUnitsPerChunk;  // until slots repeat
    for (int chunk = now.begin; chunk < now.end; chunk += kChunks) {
      chunk_products(Selector<0>{}, chunk);
      if constexpr (kChunks > 1)
        if (chunk + 1 < now.end) chunk_products(Selector<1>{}, chunk + 1);
      if constexpr (kChunks > 2) {
        if (chunk + 2 < now.end) chunk_products(Selector<2>{}, chunk + 2);
        if (chunk + 3 < now.end) chunk_products(Selector<3>{}, chunk + 3);
      }
    }
    wgmma::wait<0>();
    release();
    more = next_work(work);
    const Tile tile = tile_at<Split>(p, now.n, rank);
    const int output = tile.group * S::kOutputs, token = tile.tokens * Tokens;
    if constexpr (!Split) {
      if (more) begin(work);
      if constexpr (RowTiles == 1) {
        if (now.end < schedule.chunks) {
          leave_sums(p, products.sum, thread);
          continue;
        }
        for (int missing = now.begin, team = schedule.team - 1; missing > 0; --team) {
          const int first = max(schedule.first_of(p, team) - now.n / p.token_tiles * schedule.chunks, 0);
          const int cluster = team * p.token_tiles + schedule.member;
          if (first < missing) collect_sums(p, products.sum, cluster * p.cluster + rank, thread);
          missing = first;
        }
      }
      writer.write(p, products.sum, output, token, warp, lane);
    } else {
      asm volatile("bar.sync 1, 256;" ::: "memory");  // both warpgroups left the ring
      float* const sums = reinterpret_cast<float*>(shared);
      const int g = lane / 4, q = lane % 4;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r)
#pragma unroll
        for (int i = 0; i < Tokens / 2; ++i)
          sums[(i / 4 * 8 + 2 * q + i % 2) * S::kSumStride + (warp * RowTiles + r) * kRowTile + g + i % 4 / 2 * 8] =
              products.sum[r][i];
      ptx::cluster_sync();
      write_sums<T, S::kOutputs, Tokens, S::kSumStride>(p, ring, output, token, rank, thread);
    }
  }
  if constexpr (!Split) writer.finish(warp, lane);
}

template <typename T, int RowTiles, int Tokens, int Stages, int Depth, bool Split, bool Gated>
__device__ __forceinline__ void gemm24_block(const KernelArguments& p, unsigned char* given) {
  using S = Shape<RowTiles, Tokens, Stages, Depth, Split>;
  unsigned char* const shared = given + (1024 - ptx::shared_address(given) % 1024) % 1024;
  const uint32_t ring = ptx::shared_address(shared), staged = ring + S::kRingBytes;
  const uint32_t full = ring + S::kMainBytes, empty = full + Stages * 8;
  const int rank = p.cluster == 1 ? 0 : blockIdx.x % p.cluster;
  const int cluster = blockIdx.x / p.cluster;
  Schedule schedule(p, cluster, gridDim.x / p.cluster);
  // Where a cluster splits the inputs, a block has its share of one tile.
  auto next_work = [&p, rank, cluster, schedule, done = false](Work& work) mutable {
    if constexpr (!Split) return schedule.next(p, work);
    work = {cluster, schedule.chunks * rank / p.cluster, schedule.chunks * (rank + 1) / p.cluster};
    const bool first = !done;
    done = true;
    return first;
  };

  if (threadIdx.x == 0) {
    for (int s = 0; s < Stages; ++s) {
      ptx::barrier_init(full + s * 8, 1);
      ptx::barrier_init(empty + s * 8, kWarps * (Split ? 1 : p.cluster));
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (p.cluster > 1) ptx::cluster_sync();
  ptx::launch_dependents();

  if (threadIdx.x < 128) {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0)
      produce<RowTiles, Tokens, Stages, Depth, Split>(p, ring, full, empty, rank, next_work);
    __syncwarp();
    if (Split) ptx::cluster_sync();
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<T, RowTiles, Tokens, Stages, Depth, Split, Gated>(p, ring, full, empty, staged, shared, rank, next_work,
                                                              schedule);
  }
  if (p.cluster > 1) ptx::cluster_sync();  // nobody's shared memory goes away while another block uses it
}

#endif

template <typename T, int RowTiles, int Tokens, int Stages, int Depth, bool Split, bool Gated>
__global__ void __launch_bounds__(kThreads, 1) gemm24_kernel(const __grid_constant__ KernelArguments p) {
#if SPARSERT_WGMMA
  extern __shared__ unsigned char shared[];
  gemm24_block<T, RowTiles, Tokens, Stages, Depth, Split, Gated>(p, shared);
#else
  __trap();  // csrc/select.cpp picks this kernel on a Hopper only
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Host side.

using Launcher = cudaError_t (*)(const KernelArguments&, int blocks, bool dependent_launch, cudaStream_t);

template <typename T, int RowTiles, int Tokens, int Stages, int Depth, bool Split, bool Gated>
cudaError_t launch(const KernelArguments& arguments, int blocks, bool dependent_launch, cudaStream_t stream) {
  using S = Shape<RowTiles, Tokens, Stages, Depth, Split>;
  auto kernel = gemm24_kernel<T, RowTiles, Tokens, Stages, Depth, Split, Gated>;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, arguments, {dim3(blocks), kThreads, S::kSharedBytes, arguments.cluster}, dependent_launch,
                       stream);
}

struct Config {
  const char* name;
  int outputs, tokens;  // of a block
  bool split;           // a cluster splits the inputs, instead of sharing activations
  // The second for SiLU and a gate. Where inputs are split they are the same, and take any activation.
  Launcher launcher, gated_launcher;
};

template <typename T, int RowTiles, int Tokens, int Stages, int Depth, bool Split>
constexpr Config make_config(const char* name) {
  constexpr Launcher launcher = launch<T, RowTiles, Tokens, Stages, Depth, Split, false>;
  Config config = {name, kRowTile * RowTiles * kWarps, Tokens, Split, launcher, launcher};
  if constexpr (!Split) config.gated_launcher = launch<T, RowTiles, Tokens, Stages, Depth, Split, true>;
  return config;
}

// Row tiles a warp, tokens, stages of the ring, units of weights in flight. csrc/select.cpp counts on the order.
template <typename T>
constexpr Config kConfigs[] = {
    make_config<T, 2, 128, 10, 4, false>("256 outputs x 128 tokens"),
    make_config<T, 1, 256, 6, 8, false>("128 outputs x 256 tokens"),
    make_config<T, 1, 192, 8, 8, false>("128 outputs x 192 tokens"),
    make_config<T, 1, 128, 12, 8, false>("128 outputs x 128 tokens"),
    make_config<T, 2, 64, 16, 8, false>("256 outputs x 64 tokens"),
    make_config<T, 1, 32, 16, 16, true>("128 outputs x 32 tokens, inputs split"),
    make_config<T, 1, 64, 16, 16, true>("128 outputs x 64 tokens, inputs split"),
    make_config<T, 1, 128, 12, 16, true>("128 outputs x 128 tokens, inputs split"),
    make_config<T, 1, 256, 6, 8, true>("128 outputs x 256 tokens, inputs split"),
};

// Instantiated in a file for each number format, so that they compile side by side.
extern const Config* const kBFloat16Configs;
extern const Config* const kFloat16Configs;
extern const int kConfigCount;

}  // namespace sparsert::gemm24_detail
