// y[M, N] = x[M, K] W^T (+ bias, SiLU gate) for prompts and large batches, W packed 2:4 (layout.cuh), on mma.sp: what
// gemm24.cuh is on a Hopper GPU, with nothing that an sm_80 does not have.
//
//   * Outputs are the rows of the product and tokens its columns. A block has a tile of both, each warp 64 outputs of it:
//     so a gate and its factor, whose row tiles stand in turn, meet in one thread.
//   * Shared memory moves 128 bytes a clock, and 64 outputs x 64 tokens a warp are what it can just feed at the sparse
//     rate of an A100; from L2 256 x 128 a block are. Weights take fewer bytes than activations, so tiles are tall.
//   * Weights, metadata and activations are copied asynchronously, 16 bytes a thread, into a ring whose stages are 32
//     inputs deep. Weights lie there as they are stored, 16 bytes a lane a whole A operand; activations are swizzled for
//     ldmatrix, of which one matrix-x4 is a whole B operand. Weights through registers alone would save no bandwidth
//     (they pass through the same memory as L1 lines) and cost 64 registers to have in flight.
//   * Operands are read half a stage ahead of the products: at one or two warps a scheduler nobody else hides that.
//   * Few tiles: the inputs are split over blocks, whose sums a second kernel adds up in a fixed order.
//
//   ring      stage 0       stage 1       stage 2       stage 3        (a block of 32 inputs each)
//   step t    t, products   t+1, arrived  t+2, coming   t+3, asked for where t-1 was
//
// What it gives up: blocks do not stay for several tiles, so where one block fills a multiprocessor nothing overlaps the
// writing of its outputs (about 4 % at 4096 inputs); and inputs are split by whole chunks of 256.
//
// Source: PTX ISA (mma.sp, cp.async, ldmatrix); NVIDIA CUTLASS, multistage mainloop of sm_80.

#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "activation.cuh"
#include "api.h"
#include "launch.cuh"
#include "layout.cuh"
#include "outputs.cuh"
#include "ptx.cuh"

namespace sparsert::gemm24_mma_detail {

constexpr int kStages = 4;
constexpr int kChunkBlocks = kChunk / kBlock;
constexpr int kTileBlockBytes = 512;                               // values of a row tile in a block
constexpr int kTileChunkMetadataBytes = kUnitsPerChunk * kMetadataUnitBytes;
constexpr int kXRowBytes = kBlock * 2;                             // of a token in a stage
constexpr int kPieces = kXRowBytes / 16;
constexpr int kRaster = 8;  // tiles of tokens that blocks work on before they turn to other tokens

struct KernelArguments {
  const char* values;
  const char* metadata;
  const char* x;
  const void* bias;
  void* y;
  float* parts;  // [splits, M, 16 * row_tiles] where the inputs are split
  int M, N, K;
  int64_t ldx_bytes;
  int row_tiles, units;
  int groups, token_tiles, splits;
  bool gated;
};

template <int RowTiles, int TokenTiles, int WarpsN, int WarpsM>
struct Shape {
  static constexpr int kWarps = WarpsN * WarpsM;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = RowTiles * WarpsN;
  static constexpr int kOutputs = kRowTile * kRowTiles;
  static constexpr int kTokens = 8 * TokenTiles * WarpsM;
  static constexpr int kValueBytes = kRowTiles * kTileBlockBytes;
  static constexpr int kStageBytes = kValueBytes + kTokens * kXRowBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kMetadataBytes = kRowTiles * kTileChunkMetadataBytes;  // of a chunk; there is room for two
  // 16 spare bytes a token put the outputs that a warp stores at a time into different banks.
  static constexpr int kStagedRowBytes = kOutputs * 2 + 16;
  static constexpr int kStagedBytes = kTokens * kStagedRowBytes;
  static constexpr int kSharedBytes = std::max(kRingBytes + 2 * kMetadataBytes, kStagedBytes);
  static constexpr int kValueCopies = kRowTiles / kWarps;                     // of a thread in a stage
  static constexpr int kXTokens = kThreads / kPieces;                         // that all threads copy at a time
  static constexpr int kXCopies = kTokens / kXTokens;
  static_assert(kRowTiles % kWarps == 0 && kTokens % kXTokens == 0 && kXTokens % 8 == 0);
  static_assert(RowTiles % 2 == 0 && TokenTiles % 2 == 0);
  static_assert(kChunkBlocks % kStages == 0, "a chunk begins in stage 0");
  static_assert(kSharedBytes <= 96 * 1024, "sm_86 and sm_89 have 99 KB");
};

// Outputs and tokens of the n-th block: kRaster tiles of tokens with all outputs, then the next, so that blocks with the
// same weights run at a time and their tokens stay in L2.
struct Tile {
  int group, tokens;
};
__device__ __forceinline__ Tile tile_at(const KernelArguments& p, int n) {
  const int wide = p.groups * kRaster, part = n / wide, inside = n % wide;
  const int width = min(kRaster, p.token_tiles - part * kRaster);
  return {inside / width, part * kRaster + inside % width};
}

// What a thread copies into the ring.
template <int RowTiles, int TokenTiles, int WarpsN, int WarpsM>
struct Copies {
  using S = Shape<RowTiles, TokenTiles, WarpsN, WarpsM>;

  uint32_t ring;
  int first_block, steps;
  int tiles[S::kValueCopies];
  const char* values[S::kValueCopies];  // of the next stage, as x
  const char* x[S::kXCopies];
  uint32_t tokens = 0;  // bit j: the j-th token exists
  uint32_t x_place;
  int column;  // first input of this thread's piece of a stage

  __device__ __forceinline__ Copies(const KernelArguments& p, const Tile& tile, uint32_t ring, int first_chunk, int steps)
      : ring(ring), first_block(first_chunk * kChunkBlocks), steps(steps) {
    const int thread = threadIdx.x, token = thread / kPieces, piece = thread % kPieces;
#pragma unroll
    for (int j = 0; j < S::kValueCopies; ++j) {
      // outputs past the end are computed from others' weights and not stored
      tiles[j] = min(tile.group * S::kRowTiles + thread / 32 + j * S::kWarps, p.row_tiles - 1);
      values[j] = p.values + (int64_t(tiles[j]) * p.units * 2 + first_block) * kTileBlockBytes + thread % 32 * 16;
    }
    // the eight rows of an ldmatrix, 64 bytes each, are in different banks: two rows fill all, so every second is shifted
    x_place = S::kValueBytes + token * kXRowBytes + (piece ^ token / 2 % kPieces) * 16;
    column = first_block * kBlock + piece * 8;
#pragma unroll
    for (int j = 0; j < S::kXCopies; ++j) {
      const int row = tile.tokens * S::kTokens + token + j * S::kXTokens;
      tokens |= uint32_t(row < p.M) << j;
      x[j] = p.x + min(row, p.M - 1) * p.ldx_bytes + column * 2;
    }
  }

  // Asks for a stage, in turn, and with the first one of a chunk for its metadata. Tokens past M and inputs past K become
  // zeros: those inputs meet weights of zero, and a NaN times zero is a NaN.
  __device__ __forceinline__ void request(const KernelArguments& p, int step) {
    if (step < steps) {
      const uint32_t stage = ring + step % kStages * S::kStageBytes, to = stage + threadIdx.x * 16;
#pragma unroll
      for (int j = 0; j < S::kValueCopies; ++j)
        ptx::copy_async_line_16(to + j * S::kWarps * kTileBlockBytes, values[j], 16);
      const uint32_t exist = column + step * kBlock < p.K ? tokens : 0;
#pragma unroll
      for (int j = 0; j < S::kXCopies; ++j)
        ptx::copy_async_line_16(stage + x_place + j * S::kXTokens * kXRowBytes, x[j], exist >> j & 1 ? 16 : 0);
      if (step % kChunkBlocks == 0) request_metadata(p, step / kChunkBlocks);
#pragma unroll
      for (int j = 0; j < S::kValueCopies; ++j) values[j] += kTileBlockBytes;
#pragma unroll
      for (int j = 0; j < S::kXCopies; ++j) x[j] += kXRowBytes;
    }
    ptx::copy_async_commit();
  }

  // Always [row tile][lane][unit], also what is stored by units after the last full chunk.
  __device__ __forceinline__ void request_metadata(const KernelArguments& p, int chunk) {
    const int unit = first_block / 2 + chunk * kUnitsPerChunk, lane = threadIdx.x % 32;
    const uint32_t to = ring + S::kRingBytes + chunk % 2 * S::kMetadataBytes + threadIdx.x * 16;
#pragma unroll
    for (int j = 0; j < S::kValueCopies; ++j) {
      const char* const from = p.metadata + (int64_t(tiles[j]) * p.units + unit) * kMetadataUnitBytes;
      const uint32_t tile = to + j * S::kWarps * kTileChunkMetadataBytes;
      if (unit + kUnitsPerChunk <= p.units) {
        ptx::copy_async_16(tile, from + lane * 16);
      } else {
#pragma unroll 1
        for (int u = 0; unit + u < p.units; ++u) ptx::copy_async_4(tile + u * 4, from + u * kMetadataUnitBytes + lane * 4);
      }
    }
  }
};

// Rounded outputs of a tile, which lie in shared memory [token][output], on their way to y.
template <typename T, typename S, int Outputs>
__device__ __forceinline__ void write_staged(const KernelArguments& p, const unsigned char* staged, int first_output,
                                             int first_token) {
  constexpr int kQuads = Outputs / 8;  // 16 bytes each
  const int width = p.gated ? p.N / 2 : p.N;
  for (int i = threadIdx.x; i < kQuads * S::kTokens; i += S::kThreads) {
    const int token = i / kQuads, at = i % kQuads * 8, output = first_output + at;
    if (first_token + token >= p.M) break;
    const unsigned char* const from = staged + token * S::kStagedRowBytes + at * 2;
    T* const to = static_cast<T*>(p.y) + int64_t(first_token + token) * width + output;
    if (width % 8 == 0) {
      if (output < width) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int k = 0; k < 8; ++k)
        if (output + k < width) to[k] = reinterpret_cast<const T*>(from)[k];
    }
  }
}

template <typename T, int RowTiles, int TokenTiles, int WarpsN, int WarpsM>
__device__ __forceinline__ void gemm24_mma_block(const KernelArguments& p, unsigned char* shared) {
  using S = Shape<RowTiles, TokenTiles, WarpsN, WarpsM>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int warp_n = warp % WarpsN, warp_m = warp / WarpsN;
  const uint32_t ring = ptx::shared_address(shared);
  const Tile tile = tile_at(p, blockIdx.x);
  const int split = blockIdx.y;

  const int all_chunks = (p.units + kUnitsPerChunk - 1) / kUnitsPerChunk;
  const int first_chunk = all_chunks * split / p.splits, chunks = all_chunks * (split + 1) / p.splits - first_chunk;
  const int units = min(chunks * kUnitsPerChunk, p.units - first_chunk * kUnitsPerChunk);

  Copies<RowTiles, TokenTiles, WarpsN, WarpsM> copies(p, tile, ring, first_chunk, units * 2);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copies.request(p, s);

  constexpr int kHalf = TokenTiles / 2;
  float sum[RowTiles][TokenTiles][4] = {};
  uint4 a[2][RowTiles];        // of the block at hand and of the next one
  uint32_t b[2][kHalf][4];     // of the first and of the second half of the tokens
  const uint32_t my_values = ring + warp_n * RowTiles * kTileBlockBytes + lane * 16;
  const uint32_t my_metadata = ring + S::kRingBytes + warp_n * RowTiles * kTileChunkMetadataBytes + lane * 16;
  // Lane l of an ldmatrix.x4 gives the address of row l % 8 of matrix l / 8: token, 8 inputs further per matrix.
  const uint32_t my_x = ring + S::kValueBytes + warp_m * TokenTiles * 8 * kXRowBytes + lane % 8 * kXRowBytes +
                        (lane / 8 ^ lane % 8 / 2) * 16;
  auto load_a = [&](uint4 (&to)[RowTiles], int stage) {
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
      to[r] = ptx::load_shared_16(my_values + stage * S::kStageBytes + r * kTileBlockBytes);
  };
  auto load_b = [&](uint32_t (&to)[kHalf][4], int stage, int half) {
#pragma unroll
    for (int n = 0; n < kHalf; ++n)
      ptx::load_matrix_x4(to[n], my_x + stage * S::kStageBytes + (half * kHalf + n) * 8 * kXRowBytes);
  };

  ptx::copy_async_wait<kStages - 2>();
  __syncthreads();
  load_a(a[0], 0);
  load_b(b[0], 0, 0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint4 metadata[RowTiles];
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
      metadata[r] = ptx::load_shared_16(my_metadata + chunk % 2 * S::kMetadataBytes + r * kTileChunkMetadataBytes);
#pragma unroll
    for (int u = 0; u < kUnitsPerChunk; ++u) {
      if (chunk * kUnitsPerChunk + u >= units) break;
      uint32_t words[RowTiles];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r)
        words[r] = u == 0 ? metadata[r].x : u == 1 ? metadata[r].y : u == 2 ? metadata[r].z : metadata[r].w;
      auto products = [&](auto selector) {
        constexpr int kSelector = decltype(selector)::value;
        const int step = 2 * u + kSelector;  // inside the chunk
        ptx::copy_async_wait<kStages - 3>();
        __syncthreads();  // the next stage is here for everybody, and everybody left the one before
        auto multiply = [&](int half) {
#pragma unroll
          for (int n = 0; n < kHalf; ++n)
#pragma unroll
            for (int r = 0; r < RowTiles; ++r)
              ptx::mma_sparse<kSelector>(sum[r][half * kHalf + n], a[kSelector][r], b[half][n], words[r], T{});
        };
        load_b(b[1], step % kStages, 1);
        multiply(0);
        copies.request(p, chunk * kChunkBlocks + step + kStages - 1);  // not first: nobody multiplies at a barrier
        load_a(a[kSelector ^ 1], (step + 1) % kStages);
        load_b(b[0], (step + 1) % kStages, 0);
        multiply(1);
      };
      products(Selector<0>{});
      products(Selector<1>{});
    }
  }

  const int first_output = tile.group * S::kOutputs, first_token = tile.tokens * S::kTokens;
  if (p.splits > 1) {
    const int width = p.row_tiles * kRowTile;
#pragma unroll
    for (int n = 0; n < TokenTiles; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = first_token + (warp_m * TokenTiles + n) * 8 + 2 * q + i;
        if (token >= p.M) continue;
        float* const to = p.parts + (int64_t(split) * p.M + token) * width;
#pragma unroll
        for (int r = 0; r < RowTiles; ++r) {
          const int output = first_output + (warp_n * RowTiles + r) * kRowTile + g;  // a quad's eight fill 32 bytes
          if (output < width) to[output] = sum[r][n][i], to[output + 8] = sum[r][n][i + 2];
        }
      }
    return;
  }

  float added[RowTiles][2];
#pragma unroll
  for (int r = 0; r < RowTiles; ++r)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int output = first_output + (warp_n * RowTiles + r) * kRowTile + h * 8 + g;
      added[r][h] = p.bias != nullptr && output < p.N ? float(static_cast<const T*>(p.bias)[output]) : 0.0f;
    }
  ptx::copy_async_wait<0>();
  __syncthreads();  // outputs take the place of the ring
  auto stage = [&](int tile_of_warp, int n, int i, float v) {
    const int token = (warp_m * TokenTiles + n) * 8 + 2 * q + i % 2, output = tile_of_warp * kRowTile + g + i / 2 * 8;
    convert(reinterpret_cast<T*>(shared + token * S::kStagedRowBytes)[output], v);
  };
  if (p.gated) {
#pragma unroll
    for (int r = 0; r < RowTiles; r += 2)
#pragma unroll
      for (int n = 0; n < TokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          stage((warp_n * RowTiles + r) / 2, n, i,
                activation(Activation::kSilu, sum[r][n][i] + added[r][i / 2]) * (sum[r + 1][n][i] + added[r + 1][i / 2]));
    __syncthreads();
    write_staged<T, S, S::kOutputs / 2>(p, shared, first_output / 2, first_token);
  } else {
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
#pragma unroll
      for (int n = 0; n < TokenTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) stage(warp_n * RowTiles + r, n, i, sum[r][n][i] + added[r][i / 2]);
    __syncthreads();
    write_staged<T, S, S::kOutputs>(p, shared, first_output, first_token);
  }
}

template <typename T, int RowTiles, int TokenTiles, int WarpsN, int WarpsM, int Blocks>
__global__ void __launch_bounds__(32 * WarpsN * WarpsM, Blocks)
    gemm24_mma_kernel(const __grid_constant__ KernelArguments p) {
  extern __shared__ __align__(128) unsigned char shared[];
  gemm24_mma_block<T, RowTiles, TokenTiles, WarpsN, WarpsM>(p, shared);
}

constexpr int kAddThreads = 256;

// Adds up what the blocks of each tile have, in the order of their inputs: four outputs of one token a thread.
template <typename T>
__global__ void __launch_bounds__(kAddThreads) add_parts_kernel(const __grid_constant__ KernelArguments p) {
  const int width = p.gated ? p.N / 2 : p.N, quads = (width + 3) / 4, padded = p.row_tiles * kRowTile;
  const int64_t i = int64_t(blockIdx.x) * kAddThreads + threadIdx.x;
  const int64_t token = i / quads;
  if (token >= p.M) return;
  const int at = int(i % quads) * 4;
  const T* const bias = static_cast<const T*>(p.bias);
  auto total_at = [&](int output) {
    float4 total = *reinterpret_cast<const float4*>(p.parts + token * padded + output);
    for (int s = 1; s < p.splits; ++s)
      add(total, *reinterpret_cast<const float4*>(p.parts + (s * int64_t(p.M) + token) * padded + output));
    add_bias(total, bias, output, p.N);
    return total;
  };
  float4 total;
  if (p.gated) {
    const int gate = at / kRowTile * 2 * kRowTile + at % kRowTile;
    total = total_at(gate + kRowTile);
    multiply_gate(Activation::kSilu, total, total_at(gate));
  } else {
    total = total_at(at);
  }
  store_quad(static_cast<T*>(p.y) + token * width, at, width, total);
}

// ---------------------------------------------------------------------------------------------------------------
// Host side.

using Launcher = cudaError_t (*)(const KernelArguments&, cudaStream_t);

template <typename T, int RowTiles, int TokenTiles, int WarpsN, int WarpsM, int Blocks>
cudaError_t launch(const KernelArguments& p, cudaStream_t stream) {
  using S = Shape<RowTiles, TokenTiles, WarpsN, WarpsM>;
  auto kernel = gemm24_mma_kernel<T, RowTiles, TokenTiles, WarpsN, WarpsM, Blocks>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  const dim3 blocks(p.groups * p.token_tiles, p.splits);
  error = launch_kernel(kernel, p, {blocks, S::kThreads, S::kSharedBytes}, false, stream);
  if (error != cudaSuccess || p.splits == 1) return error;
  const int64_t quads = int64_t(((p.gated ? p.N / 2 : p.N) + 3) / 4) * p.M;
  return launch_kernel(add_parts_kernel<T>, p, {dim3((quads + kAddThreads - 1) / kAddThreads), kAddThreads}, false, stream);
}

struct Config {
  const char* name;
  int outputs, tokens;  // of a block
  Launcher launcher;
};

template <typename T, int RowTiles, int TokenTiles, int WarpsN, int WarpsM, int Blocks>
constexpr Config make_config(const char* name) {
  using S = Shape<RowTiles, TokenTiles, WarpsN, WarpsM>;
  return {name, S::kOutputs, S::kTokens, launch<T, RowTiles, TokenTiles, WarpsN, WarpsM, Blocks>};
}

// Row tiles and tiles of 8 tokens a warp, warps along outputs and along tokens, blocks that a multiprocessor is to hold.
// csrc/select.cpp counts on the order.
template <typename T>
constexpr Config kConfigs[] = {
    make_config<T, 4, 8, 4, 2, 1>("256 outputs x 128 tokens"),
    make_config<T, 4, 8, 2, 2, 2>("128 outputs x 128 tokens"),
    make_config<T, 4, 4, 2, 2, 3>("128 outputs x 64 tokens"),
};

}  // namespace sparsert::gemm24_mma_detail
