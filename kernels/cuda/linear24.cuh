// y[M, N] = x[M, K] W^T (+ bias) for batch 1-64, W packed 2:4 (layout.cuh), on mma.sp.
//
// Decode is a read of the weights; everything here serves to keep that read going.
//
//   * out_features is the M of the sparse A operand and the batch its N, so batch 1-8 is one column tile and the
//     batch is never padded in memory.
//   * Weights go to a shared-memory ring whose slots each belong to one warp: one 16-byte read per lane is a whole
//     A operand. On Hopper the copy engine fills the ring (two instructions move 4.6 KB and need no registers);
//     before Hopper every lane copies the 16 bytes that it will read itself.
//   * The weights do not depend on the previous kernel. Under programmatic dependent launch the ring is requested
//     before the wait for that kernel, so its tail and this kernel's start overlap.
//   * Activations are staged in shared memory, row-major or in tiles as they come (api.h), and read with ldmatrix; one
//     matrix-x4 is one B operand. The more output rows a block covers, the less often x is read from L2. Their ring may
//     be shorter than that of the weights, which have the longer way.
//   * Short layers have too few rows for 132 multiprocessors, so a cluster of blocks splits the inputs and adds up
//     through distributed shared memory, in a fixed order: deterministic, no workspace, no counters.
//   * What else a decode step needs is joined to the end of the layer that has the numbers at hand: a gate's product,
//     the residual addition, a norm's weight and squares; and its division to the end of the next layer (api.h).
//
// Work of one block, R = 16 * RowTiles * WarpsN outputs; each warp owns RowTiles tiles and every WarpsK-th chunk:
//
//              inputs of this cluster rank -->
//              chunk 0   chunk 1   chunk 2   chunk 3        (256 inputs each)
//   rows 0-15  warp 0,0  warp 0,1  warp 0,0  warp 0,1
//   rows 16-31 warp 1,0  warp 1,1  warp 1,0  warp 1,1
//              '---- step 0 ----'  '---- step 1 ----'
//
// Source: PTX ISA (mma.sp, cp.async.bulk, griddepcontrol); Frantar et al., MARLIN, PPoPP 2025 (weights in fragment
// order, one wide load per operand).

#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>

#include "activation.cuh"
#include "api.h"
#include "launch.cuh"
#include "layout.cuh"
#include "outputs.cuh"
#include "ptx.cuh"

namespace sparsert::linear24_detail {

constexpr int kChunkBlocks = kChunk / kBlock;
constexpr int kTileValueBytes = kChunkBlocks * 512;               // values of one row tile in one chunk
constexpr int kTileBytes = kTileValueBytes + kUnitsPerChunk * kMetadataUnitBytes;
// 16 spare bytes a row put the eight rows of an ldmatrix into different banks.
constexpr int kActivationRowBytes = kChunk * 2 + 16;
constexpr int kMaxSplits = 8;  // portable cluster size

struct KernelArguments {
  const char* values;
  const char* metadata;
  const char* x;
  const void* bias;
  void* y;
  int M, N, K;
  int64_t ldx_bytes;
  int row_tiles, units, splits;
  // as in Linear24Arguments
  const float* squares_in;
  const void* residual;
  const void* norm_weight;
  void* weighted;
  float* squares_out;
  int squares_parts;
  float eps;
  Activation activation;
  bool gated, x_tiled, y_tiled;
  bool x_wide;  // rows of x are 16-byte aligned; otherwise 8
  bool x_bulk;  // the copy engine may fetch x: 16-byte aligned, and no input past K to be zeroed
};

template <int BatchTiles, int RowTiles, int WarpsN, int WarpsK, int Stages, int XStages>
struct Shape {
  static constexpr int kWarps = WarpsN * WarpsK;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kRowTile * RowTiles * WarpsN;
  static constexpr int kWarpBytes = RowTiles * kTileBytes;
  static constexpr int kWeightStageBytes = kWarps * kWarpBytes;
  static constexpr int kGroupActivationBytes = BatchTiles * 8 * kActivationRowBytes;
  static constexpr int kActivationStageBytes = WarpsK * kGroupActivationBytes;
  static constexpr int kRingBytes = Stages * kWeightStageBytes + XStages * kActivationStageBytes;
  // Row stride of the partial sums, in floats: 4 mod 16 keeps the four batch columns of a quad in different banks.
  static constexpr int kSumStride = kRows + 4;
  static constexpr int kPlane = BatchTiles * 8 * kSumStride;  // floats of one warp_k
  static constexpr int kSquares = BatchTiles * 8 * (kRows / 4);  // floats: sums of squares of four outputs each
  static constexpr int kSumBytes = (WarpsK * kPlane + kSquares) * 4;
  static constexpr int kBarrierBytes = (Stages * kWarps + XStages * WarpsK) * 8;
  static constexpr int kScaleBytes = BatchTiles * 8 * 4;
  static constexpr int kMainBytes = kRingBytes > kSumBytes ? kRingBytes : kSumBytes;
  static constexpr int kSharedBytes = kMainBytes + kBarrierBytes + kScaleBytes;
};

template <int RowTiles, int BatchTiles>
struct Operands {
  uint4 a[RowTiles];
  uint32_t x[BatchTiles][4];
};

// The end of a sub-block for four outputs of one batch row: add to the residual stream, weight for the next norm. Both
// are rounded; returned is the sum of squares of the stream as it is stored. N is a multiple of 4.
template <typename T>
__device__ __forceinline__ float close_block(const KernelArguments& p, int tiles, int row, int first,
                                             const float4& total, const Quad<T>& residual, const Quad<T>& weight) {
  if (first >= p.N) return 0;
  const int64_t at = int64_t(row) * p.N + first;
  const float v[4] = {total.x, total.y, total.z, total.w};
  Quad<T> stream, weighted;
  float squares = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    convert(stream.v[i], v[i] + float(residual.v[i]));
    const float stored = float(stream.v[i]);
    convert(weighted.v[i], stored * float(weight.v[i]));
    squares += stored * stored;
  }
  *reinterpret_cast<Quad<T>*>(static_cast<T*>(p.y) + at) = stream;
  const int64_t weighted_at = p.y_tiled ? tiled_element(tiles, row, first) : at;
  *reinterpret_cast<Quad<T>*>(static_cast<T*>(p.weighted) + weighted_at) = weighted;
  return squares;
}

// Four values of a row of N, the residual stream or the norm's weight; those past N are not read.
template <typename T>
__device__ __forceinline__ Quad<T> load_quad(const void* row, int first, int N) {
  Quad<T> quad = {};
  if (first < N) quad = *reinterpret_cast<const Quad<T>*>(static_cast<const T*>(row) + first);
  return quad;
}
template <typename T>
__device__ __forceinline__ Quad<T> load_residual(const KernelArguments& p, int row, int first) {
  return load_quad<T>(static_cast<const T*>(p.residual) + int64_t(row) * p.N, first, p.N);
}

// Shared memory that a block may have on the GPU being compiled for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200
constexpr int kSharedLimit = 227 * 1024;
#else
constexpr int kSharedLimit = 99 * 1024;
#endif

template <typename T, int BatchTiles, int RowTiles, int WarpsN, int WarpsK, int Stages, int XStages>
__device__ __forceinline__ void linear24_block(const KernelArguments& p, unsigned char* shared) {
  using S = Shape<BatchTiles, RowTiles, WarpsN, WarpsK, Stages, XStages>;
  const uint32_t ring = ptx::shared_address(shared);
  const uint32_t activations = ring + Stages * S::kWeightStageBytes;

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int warp_n = warp % WarpsN, warp_k = warp / WarpsN;
  const int split = blockIdx.x % p.splits, row_group = blockIdx.x / p.splits;
  const int first_tile = (row_group * WarpsN + warp_n) * RowTiles;

  const int chunks = (p.units + kUnitsPerChunk - 1) / kUnitsPerChunk;
  const int chunk_begin = chunks * split / p.splits, chunk_end = chunks * (split + 1) / p.splits;
  const int steps = (chunk_end - chunk_begin + WarpsK - 1) / WarpsK;

  const int64_t tile_value_bytes = int64_t(p.units) * 2 * 512;
  const int64_t tile_metadata_bytes = int64_t(p.units) * kMetadataUnitBytes;
  const uint32_t my_ring = ring + warp * S::kWarpBytes;
#if SPARSERT_HOPPER
  const uint32_t barriers = ring + S::kMainBytes;
  const uint32_t my_barriers = barriers + warp * Stages * 8;                                    // weights: a set a warp
  const uint32_t x_barriers = barriers + (S::kWarps * Stages + warp_k * XStages) * 8;  // activations: a set a warp_k
  const uint64_t policy = ptx::policy_evict_first();
#endif

  // How many 64-input units of this warp's chunk exist at a step: 4 inside, 1-3 in the last chunk, 0 past the end.
  auto units_at = [&](int step) {
    const int chunk = chunk_begin + step * WarpsK + warp_k;
    return chunk >= chunk_end ? 0 : min(kUnitsPerChunk, p.units - chunk * kUnitsPerChunk);
  };

  // Slot of a tile: values [block][lane][16 bytes], then metadata as stored.
  auto request_weights = [&](int step) {
    const int units = units_at(step);
    if (units == 0) return;
    const int slot = step % Stages;
    const int64_t chunk = chunk_begin + step * WarpsK + warp_k;
#if SPARSERT_HOPPER
    if (lane == 0) {
      const int tiles = min(RowTiles, max(0, p.row_tiles - first_tile));
      const uint32_t barrier = my_barriers + slot * 8;
      ptx::barrier_expect(barrier, tiles * units * (2 * 512 + kMetadataUnitBytes));
#pragma unroll 1
      for (int r = 0; r < tiles; ++r) {
        const uint32_t to = my_ring + slot * S::kWeightStageBytes + r * kTileBytes;
        const int64_t tile = first_tile + r;
        ptx::copy_bulk(to, p.values + tile * tile_value_bytes + chunk * kTileValueBytes, units * 2 * 512, barrier,
                       policy);
        ptx::copy_bulk(to + kTileValueBytes,
                       p.metadata + tile * tile_metadata_bytes + chunk * kUnitsPerChunk * kMetadataUnitBytes,
                       units * kMetadataUnitBytes, barrier, policy);
      }
    }
#else
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      const int64_t tile = first_tile + r;
      if (tile >= p.row_tiles) break;
      const uint32_t to = my_ring + slot * S::kWeightStageBytes + r * kTileBytes;
      const char* values = p.values + tile * tile_value_bytes + chunk * kTileValueBytes + lane * 16;
      for (int b = 0; b < 2 * units; ++b) ptx::copy_async_16(to + b * 512 + lane * 16, values + b * 512);
      const char* metadata = p.metadata + tile * tile_metadata_bytes + chunk * kUnitsPerChunk * kMetadataUnitBytes;
      if (units == kUnitsPerChunk) {
        ptx::copy_async_16(to + kTileValueBytes + lane * 16, metadata + lane * 16);
      } else {
        for (int u = 0; u < units; ++u)
          ptx::copy_async_4(to + kTileValueBytes + (u * 32 + lane) * 4, metadata + (u * 32 + lane) * 4);
      }
    }
#endif
  };

  const int64_t row_step = S::kWarps * p.ldx_bytes;
  // One warp copies one row of 512 bytes. Rows of x past M are left as they are: a column of the batch touches only its
  // own column of the result. Inputs past K must be zero, because they meet padded weights.
  auto request_activations = [&](int step) {
#if SPARSERT_HOPPER
    if (p.x_bulk) {
      const int units = units_at(step), slot = step % XStages;
      if (warp_n != 0 || units == 0) return;
      if (BatchTiles <= 2 && p.x_tiled) {  // contiguous, the whole chunk at once
        if (lane == 0) {
          constexpr int kUnitBytes = BatchTiles * 8 * kUnit * 2;
          const int64_t chunk = chunk_begin + step * WarpsK + warp_k;
          ptx::barrier_expect(x_barriers + slot * 8, units * kUnitBytes);
          ptx::copy_bulk(activations + slot * S::kActivationStageBytes + warp_k * S::kGroupActivationBytes,
                         p.x + chunk * kUnitsPerChunk * kUnitBytes, units * kUnitBytes, x_barriers + slot * 8);
        }
        return;
      }
      if (lane == 0) ptx::barrier_expect(x_barriers + slot * 8, p.M * units * kUnit * 2);
      __syncwarp();
      const uint32_t to = activations + slot * S::kActivationStageBytes + warp_k * S::kGroupActivationBytes;
      const char* from = p.x + int64_t(chunk_begin + step * WarpsK + warp_k) * kChunk * 2;
      for (int row = lane; row < p.M; row += 32)
        ptx::copy_bulk(to + row * kActivationRowBytes, from + row * p.ldx_bytes, units * kUnit * 2,
                       x_barriers + slot * 8);
      return;
    }
#endif
#pragma unroll
    for (int group = 0; group < WarpsK; ++group) {
      const int chunk = chunk_begin + step * WarpsK + group;
      if (chunk >= chunk_end) break;
      const uint32_t to = activations + step % XStages * S::kActivationStageBytes + group * S::kGroupActivationBytes;
      const int begin = chunk * kChunk * 2, end = p.K * 2;
      // pointers step from row to row: a 64-bit product per copy would cost more instructions than the mma of a step
      if (p.x_wide) {
        const int at = begin + lane * 16, bytes = min(16, max(0, end - at));
        const char* from = p.x + (bytes > 0 ? at : 0) + warp * p.ldx_bytes;
        uint32_t target = to + warp * kActivationRowBytes + lane * 16;
#pragma unroll 4
        for (int row = warp; row < p.M; row += S::kWarps) {
          ptx::copy_async_16(target, from, bytes);
          from += row_step;
          target += S::kWarps * kActivationRowBytes;
        }
      } else {
        for (int part = 0; part < 2; ++part) {
          const int column = (part * 32 + lane) * 8, at = begin + column, bytes = min(8, max(0, end - at));
          const char* from = p.x + (bytes > 0 ? at : 0) + warp * p.ldx_bytes;
          uint32_t target = to + warp * kActivationRowBytes + column;
#pragma unroll 1
          for (int row = warp; row < p.M; row += S::kWarps) {
            ptx::copy_async_8(target, from, bytes);
            from += row_step;
            target += S::kWarps * kActivationRowBytes;
          }
        }
      }
    }
  };

  // What this thread will add and multiply by first, so that the end need not wait for it. The norm's weight is nobody's
  // result and may be far away: before the wait for the kernel in front.
  constexpr int kQuads = S::kRows / 4;  // four outputs of one batch row at a time
  const int early = split * S::kThreads + thread, early_output = row_group * S::kRows + early % kQuads * 4;
  const bool closes_early = p.residual != nullptr && early < kQuads * p.M;
  const Quad<T> early_weight = closes_early ? load_quad<T>(p.norm_weight, early_output, p.N) : Quad<T>{};

#if SPARSERT_HOPPER
  if (lane == 0) {
    for (int s = 0; s < Stages; ++s) ptx::barrier_init(my_barriers + s * 8, 1);
    if (warp_n == 0)
      for (int s = 0; s < XStages; ++s) ptx::barrier_init(x_barriers + s * 8, 1);
    ptx::barrier_init_fence();
    for (int s = 0; s < Stages - 1 && s < steps; ++s) request_weights(s);
  }
  __syncwarp();
  ptx::launch_dependents();
  ptx::wait_dependency();
#endif
  static_assert(SPARSERT_HOPPER || Stages == XStages, "before Hopper one commit group is one stage of both");
  for (int s = 0; s < XStages - 1; ++s) {
    if (s < steps) {
#if !SPARSERT_HOPPER
      request_weights(s);
#endif
      request_activations(s);
    }
    ptx::copy_async_commit();
  }

  const Quad<T> early_residual = closes_early ? load_residual<T>(p, early / kQuads, early_output) : Quad<T>{};

  // 1 / rms of each batch row, while its values are under way: the norm's division, left to this layer
  float* const scales = reinterpret_cast<float*>(shared + S::kMainBytes + S::kBarrierBytes);
  if (p.squares_in != nullptr) {
    constexpr int kAtOnce = 4;  // loads under way: a layer of few inputs would wait for each in turn
    for (int column = warp; column < p.M; column += S::kWarps) {
      const float* const parts = p.squares_in + column * p.squares_parts;
      float squares = 0;
      for (int i = lane; i < p.squares_parts; i += 32 * kAtOnce) {
        float part[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) part[j] = i + 32 * j < p.squares_parts ? parts[i + 32 * j] : 0;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) squares += part[j];
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffff, squares, offset);
      if (lane == 0) scales[column] = rsqrtf(squares / p.K + p.eps);
    }
  }

  float sum[RowTiles][BatchTiles][4] = {};
  // Lane l of an ldmatrix.x4 gives the address of row l % 8 of matrix l / 8: batch row, 8 inputs further per matrix.
  // In tiles the 32 addresses of a matrix-x4 are one after another.
  const uint32_t my_activations = activations + warp_k * S::kGroupActivationBytes +
                                  (BatchTiles <= 2 && p.x_tiled ? lane * 16 : (lane % 8) * kActivationRowBytes + lane / 8 * 16);
  // Above 16 rows there are no tiles, and offsets that are known at compile time are worth 7 % (4096x4096, batch 64).
  const bool tiled = BatchTiles <= 2 && p.x_tiled;
  const int tile_stride = tiled ? 512 : 8 * kActivationRowBytes;
  const int block_stride = tiled ? BatchTiles * 512 : kBlock * 2;

  for (int step = 0; step < steps; ++step) {
    const int slot = step % Stages, x_slot = step % XStages;
    ptx::copy_async_wait<XStages - 2>();
    __syncthreads();  // activations of this step are here for everybody, and everybody left the slots of the last step
    if (step + Stages - 1 < steps) request_weights(step + Stages - 1);
    if (step + XStages - 1 < steps) request_activations(step + XStages - 1);
    ptx::copy_async_commit();

    const int units = units_at(step);
    if (units == 0) continue;
#if SPARSERT_HOPPER
    ptx::barrier_wait(my_barriers + slot * 8, step / Stages & 1);
    if (p.x_bulk) ptx::barrier_wait(x_barriers + x_slot * 8, step / XStages & 1);
#endif
    const uint32_t weights = my_ring + slot * S::kWeightStageBytes;
    const uint32_t batch = my_activations + x_slot * S::kActivationStageBytes;

    // Operands of one block: A of every row tile, B of every batch tile.
    auto load = [&](Operands<RowTiles, BatchTiles>& to, int b) {
#pragma unroll
      for (int r = 0; r < RowTiles; ++r) to.a[r] = ptx::load_shared_16(weights + r * kTileBytes + b * 512 + lane * 16);
#pragma unroll
      for (int n = 0; n < BatchTiles; ++n)
        ptx::load_matrix_x4(to.x[n], batch + n * tile_stride + b * block_stride);
    };
    auto multiply = [&](const Operands<RowTiles, BatchTiles>& from, const uint32_t (&words)[RowTiles], auto selector) {
#pragma unroll
      for (int n = 0; n < BatchTiles; ++n)
#pragma unroll
        for (int r = 0; r < RowTiles; ++r)
          ptx::mma_sparse<decltype(selector)::value>(sum[r][n], from.a[r], from.x[n], words[r], T{});
    };

    if (units == kUnitsPerChunk) {
      uint4 packed[RowTiles];
#pragma unroll
      for (int r = 0; r < RowTiles; ++r)
        packed[r] = ptx::load_shared_16(weights + r * kTileBytes + kTileValueBytes + lane * 16);
      // one block ahead: with few warps a multiprocessor, nobody else hides the latency of shared memory
      Operands<RowTiles, BatchTiles> even, odd;
      load(even, 0);
#pragma unroll
      for (int u = 0; u < kUnitsPerChunk; ++u) {
        uint32_t words[RowTiles];
#pragma unroll
        for (int r = 0; r < RowTiles; ++r)
          words[r] = u == 0 ? packed[r].x : u == 1 ? packed[r].y : u == 2 ? packed[r].z : packed[r].w;
        load(odd, 2 * u + 1);
        multiply(even, words, Selector<0>{});
        if (u + 1 < kUnitsPerChunk) load(even, 2 * u + 2);
        multiply(odd, words, Selector<1>{});
      }
    } else {
#pragma unroll 1
      for (int u = 0; u < units; ++u) {
        uint32_t words[RowTiles];
#pragma unroll
        for (int r = 0; r < RowTiles; ++r)
          words[r] = ptx::load_shared_4(weights + r * kTileBytes + kTileValueBytes + (u * 32 + lane) * 4);
        Operands<RowTiles, BatchTiles> operands;
        load(operands, 2 * u);
        multiply(operands, words, Selector<0>{});
        load(operands, 2 * u + 1);
        multiply(operands, words, Selector<1>{});
      }
    }
  }

  // Partial sums [warp_k][batch][row] take the place of the ring.
  ptx::copy_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int r = 0; r < RowTiles; ++r)
#pragma unroll
    for (int n = 0; n < BatchTiles; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = (warp_n * RowTiles + r) * kRowTile + g + i / 2 * 8, column = n * 8 + 2 * q + i % 2;
        sums[warp_k * S::kPlane + column * S::kSumStride + row] = sum[r][n][i];
      }
  __syncthreads();

  float* const squares = sums + WarpsK * S::kPlane;
  // Warps and then ranks are added in index order.
  auto local_sum = [&](int at) {
    float4 total = *reinterpret_cast<const float4*>(sums + at);
#pragma unroll
    for (int k = 1; k < WarpsK; ++k) add(total, *reinterpret_cast<const float4*>(sums + k * S::kPlane + at));
    return total;
  };
  // Bias, activation and store of this thread's share of the tile; total_at(at) sums over everybody.
  auto finish = [&](auto total_at, int first, int step) {
    const T* const bias = static_cast<const T*>(p.bias);
    T* const y = static_cast<T*>(p.y);
    if (!p.gated) {
      for (int i = first; i < kQuads * p.M; i += step) {
        const int column = i / kQuads, row = i % kQuads * 4, output = row_group * S::kRows + row;
        float4 total = total_at(column * S::kSumStride + row);
        if (p.squares_in != nullptr) scale(total, scales[column]);
        add_bias(total, bias, output, p.N);
        if (p.residual != nullptr) {
          const Quad<T> residual = i == early ? early_residual : load_residual<T>(p, column, output);
          const Quad<T> weight = i == early ? early_weight : load_quad<T>(p.norm_weight, output, p.N);
          squares[column * kQuads + i % kQuads] = close_block<T>(p, BatchTiles, column, output, total, residual, weight);
          continue;
        }
        activate(p.activation, total);
        if (p.y_tiled)
          store_quad(y + tiled_element(BatchTiles, column, output) - output, output, p.N, total);
        else
          store_quad(y + int64_t(column) * p.N, output, p.N, total);
      }
    } else if constexpr (S::kRows % (2 * kRowTile) == 0) {  // the host picks no other tile
      constexpr int kPairQuads = kQuads / 2;
      for (int i = first; i < kPairQuads * p.M; i += step) {
        const int column = i / kPairQuads, quad = i % kPairQuads;
        const int row = quad / 4 * 2 * kRowTile + quad % 4 * 4, output = row_group * S::kRows + row;
        float4 gate = total_at(column * S::kSumStride + row), total = total_at(column * S::kSumStride + row + kRowTile);
        if (p.squares_in != nullptr) {
          scale(gate, scales[column]);
          scale(total, scales[column]);
        }
        add_bias(gate, bias, output, p.N);
        add_bias(total, bias, output + kRowTile, p.N);
        multiply_gate(p.activation, total, gate);
        const int at = row_group * S::kRows / 2 + quad * 4;
        if (p.y_tiled)
          store_quad(y + tiled_element(BatchTiles, column, at) - at, at, p.N / 2, total);
        else
          store_quad(y + int64_t(column) * (p.N / 2), at, p.N / 2, total);
      }
    }
  };
  // Squares of this block's outputs by batch row, in a fixed order.
  auto sum_squares = [&]() {
    if (p.residual == nullptr) return;
    __syncthreads();
    for (int column = warp; column < p.M; column += S::kWarps) {
      float total = 0;
      for (int i = lane; i < kQuads; i += 32) total += squares[column * kQuads + i];
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffff, total, offset);
      if (lane == 0) p.squares_out[column * gridDim.x + blockIdx.x] = total;
    }
  };
#if SPARSERT_HOPPER
  if (p.splits > 1) {
    if (p.residual != nullptr)
      for (int i = thread; i < kQuads * p.M; i += S::kThreads) squares[i] = 0;  // other ranks' shares
    if (WarpsK > 1) {
      for (int i = thread; i < kQuads * p.M; i += S::kThreads) {
        const int at = i / kQuads * S::kSumStride + i % kQuads * 4;
        *reinterpret_cast<float4*>(sums + at) = local_sum(at);
      }
    }
    ptx::cluster_sync();
    auto total_at = [&](int at) { return cluster_sum<kMaxSplits>(ring + at * 4, p.splits); };
    finish(total_at, split * S::kThreads + thread, p.splits * S::kThreads);  // every rank its share
    sum_squares();
    ptx::cluster_sync();  // nobody's shared memory goes away while another rank reads it
    return;
  }
#endif
  finish(local_sum, thread, S::kThreads);
  sum_squares();
}

template <typename T, int BatchTiles, int RowTiles, int WarpsN, int WarpsK, int Stages, int XStages>
__global__ void __launch_bounds__(32 * WarpsN* WarpsK)
    linear24_kernel(const __grid_constant__ KernelArguments p) {
  if constexpr (Shape<BatchTiles, RowTiles, WarpsN, WarpsK, Stages, XStages>::kSharedBytes <= kSharedLimit &&
                (SPARSERT_HOPPER || Stages == XStages)) {
    extern __shared__ __align__(128) unsigned char shared[];
    linear24_block<T, BatchTiles, RowTiles, WarpsN, WarpsK, Stages, XStages>(p, shared);
  } else {
    __trap();  // csrc/select.cpp picks no tile that does not fit; compiling it would only cost time and size
  }
}

// ---------------------------------------------------------------------------------------------------------------
// Host side: a table of instantiations. A config names a tile; the batch picks BatchTiles.

using Launcher = cudaError_t (*)(const KernelArguments&, int splits, bool dependent_launch, cudaStream_t);

template <typename T, int BatchTiles, int RowTiles, int WarpsN, int WarpsK, int Stages, int XStages>
cudaError_t launch(const KernelArguments& arguments, int splits, bool dependent_launch, cudaStream_t stream) {
  using S = Shape<BatchTiles, RowTiles, WarpsN, WarpsK, Stages, XStages>;
  auto kernel = linear24_kernel<T, BatchTiles, RowTiles, WarpsN, WarpsK, Stages, XStages>;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes);
  if (error != cudaSuccess) return error;
  const int row_groups = (arguments.row_tiles + RowTiles * WarpsN - 1) / (RowTiles * WarpsN);
  return launch_kernel(kernel, arguments, {dim3(row_groups * splits), S::kThreads, S::kSharedBytes, splits},
                       dependent_launch, stream);
}

struct Config {
  const char* name;
  int outputs;  // of a block
  Launcher launchers[4];  // by batch tiles 1, 2, 4, 8; null where a tile was never the best
};

// RowTiles x WarpsN row tiles a block, WarpsK warps along the inputs, Stages slots of weights and XStages of activations;
// the flags say for which batches.
template <typename T, int RowTiles, int WarpsN, int WarpsK, int Stages, int XStages, bool To8, bool To16, bool To32,
          bool To64>
constexpr Config make_config(const char* name) {
  Config config = {name, kRowTile * RowTiles * WarpsN, {}};
  if constexpr (To8) config.launchers[0] = launch<T, 1, RowTiles, WarpsN, WarpsK, Stages, XStages>;
  if constexpr (To16) config.launchers[1] = launch<T, 2, RowTiles, WarpsN, WarpsK, Stages, XStages>;
  if constexpr (To32) config.launchers[2] = launch<T, 4, RowTiles, WarpsN, WarpsK, Stages, XStages>;
  if constexpr (To64) config.launchers[3] = launch<T, 8, RowTiles, WarpsN, WarpsK, Stages, XStages>;
  return config;
}

// Which tiles, and for which batches, is what a sweep of 27 tiles over the layers of nine models left
// (benchmarks/tune_linear24.py): with these, no layer is more than 13 % from the best of all.
// csrc/linear24_table.inc counts on the order.
template <typename T>
constexpr Config kConfigs[] = {
    make_config<T, 1, 2, 1, 2, 2, true, true, true, true>("32 outputs, 2 warps, 2 stages"),
    make_config<T, 1, 1, 8, 2, 2, true, true, false, false>("16 outputs, 8 warps along the inputs, 2 stages"),
    make_config<T, 1, 2, 4, 3, 3, true, false, false, false>("32 outputs, 2x4 warps, 3 stages"),
    make_config<T, 2, 2, 4, 2, 2, true, true, false, false>("64 outputs, 2x4 warps, 2 stages"),
    make_config<T, 4, 2, 2, 2, 2, true, true, false, false>("128 outputs, 2x2 warps, 2 stages"),
    make_config<T, 4, 4, 1, 2, 2, false, true, false, true>("256 outputs, 4 warps, 2 stages"),
    make_config<T, 2, 1, 4, 2, 2, false, false, true, false>("32 outputs, 1x4 warps, 2 stages"),
    make_config<T, 2, 2, 2, 3, 3, false, false, true, false>("64 outputs, 2x2 warps, 3 stages"),
    make_config<T, 2, 8, 1, 2, 2, false, false, true, true>("256 outputs, 8 warps, 2 stages"),
    make_config<T, 1, 8, 1, 3, 3, false, false, true, false>("128 outputs, 8 warps, 3 stages"),
    make_config<T, 1, 4, 1, 3, 3, false, false, false, true>("64 outputs, 4 warps, 3 stages"),
    make_config<T, 2, 4, 1, 3, 3, false, false, false, true>("128 outputs, 4 warps, 3 stages"),
    make_config<T, 1, 2, 4, 4, 2, true, true, false, false>("32 outputs, 2x4 warps, 4 stages"),
    make_config<T, 1, 4, 2, 2, 2, true, true, false, false>("64 outputs, 4x2 warps, 2 stages"),
};

// Instantiated in a file for each number format, so that they compile side by side.
extern const Config* const kBFloat16Configs;
extern const Config* const kFloat16Configs;
extern const int kConfigCount;

}  // namespace sparsert::linear24_detail
