// y[M, N] = x[M, K] W^T (+ bias, activation) for prompts and large batches, W packed 2:4 (layout.cuh), on wgmma.sp.
//
// The same packed bytes that linear24.cuh decodes from: a warp's registers and metadata words of mma.sp are also those of
// wgmma.sp with A in registers, so outputs are the rows of the product and tokens its columns.
//
//   * Weights go from global memory straight into registers, a batch of units (64 inputs each) ahead: no shared memory, no
//     conversion. What the tensor cores read from shared memory are the activations, and at the sparse rate that reading
//     alone takes all that shared memory gives (128 bytes a clock); so everything else has to keep out of it.
//   * One warp asks the copy engine for activations, swizzled, in a ring. A cluster of two blocks with different outputs
//     shares them: each fetches half of the tokens for both, which saves a quarter of the reads from L2.
//   * Two warpgroups multiply. Where a warp has two row tiles, a gate and its factor, which stand in turn, meet in one
//     thread; where it has one, two warps swap halves. Their product needs no further pass (gemm24_write.cuh).
//   * Blocks stay for all their tiles, in an order that keeps a few weights and a few tokens in L2; while a tile is
//     written the next one begins. Or the work is dealt out evenly by inputs (gemm24_schedule.cuh).
//   * Layers with few tiles split their inputs over a cluster instead and add up through distributed shared memory, in a
//     fixed order, as linear24.cuh does.
//
// Source: PTX ISA (wgmma.mma_async.sp, cp.async.bulk.tensor, setmaxnreg); NVIDIA CUTLASS, warp-specialized persistent
// kernels of Hopper; CUTLASS has no mainloop with sparse A in registers.

#pragma once

#include <cuda_runtime.h>

#include "api.h"
#include "gemm24_schedule.cuh"
#include "gemm24_write.cuh"
#include "launch.cuh"
#include "layout.cuh"
#include "outputs.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace sparsert::gemm24_detail {

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
        const auto& words = products.e[slot / kBatch];
        wgmma::fence();
#pragma unroll
        for (int r = 0; r < RowTiles; ++r)
          wgmma::multiply<Tokens, 0>(products.sum[r], products.a[slot][r][0], b, words[r][slot % kBatch], T{});
#pragma unroll
        for (int r = 0; r < RowTiles; ++r)
          wgmma::multiply<Tokens, 1>(products.sum[r], products.a[slot][r][1], b + kBlock * 2 / 16, words[r][slot % kBatch], T{});
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
