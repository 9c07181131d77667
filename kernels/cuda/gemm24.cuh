// y[M, N] = x[M, K] W^T (+ bias, activation) for prompts and large batches, W packed 2:4 (layout.cuh), on wgmma.sp.
//
// The same packed bytes that linear24.cuh decodes from: a warp's registers and metadata words of mma.sp are also those of
// wgmma.sp with A in registers, so outputs are the rows of the product and tokens its columns.
//
//   * The copy engine brings all operands into a ring of stages of 64 inputs: activations swizzled, weights and metadata
//     as they lie. Warps read the weights of the next unit into registers while the tensor cores have the one at hand.
//     Weights have a thread of their own, which waits for no kernel before.
//   * A cluster of two blocks with different outputs shares activations: each fetches half of the tokens for both, which
//     saves a quarter of the reads from L2.
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

// Shared memory: activations of all stages, their weights, metadata, outputs on their way, barriers.
template <int RowTiles, int Tokens, int Stages, bool Split, bool Gated>
struct Shape {
  static constexpr int kRowTiles = RowTiles * kWarps, kOutputs = kRowTile * kRowTiles;
  static constexpr int kTokenBytes = Tokens * kUnitBytes;  // of a stage
  static constexpr int kValueBytes = kRowTiles * kUnitValueBytes;
  // Metadata comes by the chunk, with the first of its units. A chunk is read before its first unit is multiplied, so
  // there is room where the ring has come round to that unit again.
  static constexpr int kMetadataBytes = kRowTiles * kChunkMetadataBytes;
  static constexpr int kMetadataSlots = (Stages + kUnitsPerChunk - 1) / kUnitsPerChunk;
  static constexpr int kValues = Stages * kTokenBytes, kMetadata = kValues + Stages * kValueBytes;
  static constexpr int kRingBytes = kMetadata + kMetadataSlots * kMetadataBytes;
  static constexpr int kStagedBytes = Split ? 0 : 2 * StagedTile<RowTiles, Gated>::kBytes;  // of two warpgroups
  // Two rooms in which warps swap gates and factors.
  static constexpr int kExchangeBytes = !Split && Gated && RowTiles == 1 ? 2 * kWarps * 32 * 16 : 0;
  static constexpr int kSumStride = kOutputs + 4;  // floats of one token
  static constexpr int kSumBytes = Split ? Tokens * kSumStride * 4 : 0;
  static constexpr int kTileBytes = kRingBytes + kStagedBytes + kExchangeBytes;
  static constexpr int kMainBytes = kTileBytes > kSumBytes ? kTileBytes : kSumBytes;
  static constexpr int kSharedBytes = kMainBytes + 2 * Stages * 8 + 1024;  // the ring starts at a multiple of 1,024
  static_assert(kSharedBytes <= 227 * 1024);
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

// The thread that asks for weights and metadata. These do not depend on the kernel before.
template <typename S, int Stages, bool Split, typename NextWork>
__device__ __forceinline__ void copy_weights(const KernelArguments& p, uint32_t ring, uint32_t full, uint32_t empty, int rank,
                                             NextWork next_work) {
  Place<Stages> place;
  int metadata_slot = 0;
  for (Work work; next_work(work);) {
    const int first_tile = tile_at<Split>(p, work.n, rank).group * S::kRowTiles;
    for (int unit = work.begin * kUnitsPerChunk; unit < work.end * kUnitsPerChunk; ++unit, place.next()) {
      const uint32_t barrier = full + place.stage * 8;
      const bool chunk_begins = unit % kUnitsPerChunk == 0;
      ptx::barrier_wait(empty + place.stage * 8, place.parity ^ 1);
      ptx::barrier_expect(barrier, S::kValueBytes + (chunk_begins ? S::kMetadataBytes : 0));
      ptx::copy_box(ring + S::kValues + place.stage * S::kValueBytes, &p.values, 0, unit * 2, first_tile, barrier);
      if (chunk_begins) {
        const uint32_t to = ring + S::kMetadata + metadata_slot * S::kMetadataBytes;
        ptx::copy_box(to, &p.metadata, unit * kMetadataUnitWords, first_tile, barrier);
        if (++metadata_slot == S::kMetadataSlots) metadata_slot = 0;
      }
    }
  }
}

// The thread that asks for activations.
template <typename S, int Tokens, int Stages, bool Split, typename NextWork>
__device__ __forceinline__ void copy_activations(const KernelArguments& p, uint32_t ring, uint32_t full, uint32_t empty,
                                                 int rank, NextWork next_work) {
  const int shared_by = Split ? 1 : p.cluster;
  const int box = Tokens / shared_by;  // tokens that this block fetches
  Place<Stages> place;
  ptx::wait_dependency();
  for (Work work; next_work(work);) {
    const int first = tile_at<Split>(p, work.n, rank).tokens * Tokens;
    for (int unit = work.begin * kUnitsPerChunk; unit < work.end * kUnitsPerChunk; ++unit, place.next()) {
      const uint32_t barrier = full + place.stage * 8, to = ring + place.stage * S::kTokenBytes;
      ptx::barrier_wait(empty + place.stage * 8, place.parity ^ 1);
      ptx::barrier_expect(barrier, S::kTokenBytes);
      if (shared_by == 1)
        ptx::copy_box(to, &p.x, unit * kUnit, first, barrier);
      else
        ptx::copy_box_shared(to + rank * box * kUnitBytes, &p.x, unit * kUnit, first + rank * box, barrier,
                             uint16_t((1 << shared_by) - 1));
    }
  }
}

template <typename S, typename T, int RowTiles, int Tokens, int Stages, bool Split, bool Gated, typename NextWork>
__device__ __forceinline__ void consume(const KernelArguments& p, uint32_t ring, uint32_t full, uint32_t empty,
                                        uint32_t staged, unsigned char* shared, int rank, NextWork next_work,
                                        const Schedule& schedule) {
  const int thread = threadIdx.x - 128, warp = thread / 32, lane = thread % 32;
  // A stage is handed back to every block that fills it: a lane for each.
  const bool hands_back = lane < (Split ? 1 : p.cluster);
  const uint32_t handed_to = ptx::cluster_address(empty, Split || !hands_back ? rank : lane);
  const uint32_t values = ring + S::kValues + warp * RowTiles * kUnitValueBytes + lane * 16;
  const uint32_t metadata = ring + S::kMetadata + warp * RowTiles * kChunkMetadataBytes;

  // Units whose products are waited for together: two where those of one are too short to hide what comes between.
  constexpr int kGroup = RowTiles == 1 && Tokens <= 64 ? 2 : 1;
  // The weights of the next unit are read while products of the one before are still under way, into registers of their
  // own; or after these, when their stage has been handed back. The former is faster where the GPU is filled once and
  // weights come from memory, the latter in long runs of tiles.
  constexpr bool kReadsEarly = kGroup == 1 && (Split || (RowTiles == 1 && Tokens <= 128));
  constexpr int kSlots = kReadsEarly || kGroup == 2 ? kUnitsPerChunk : 2;
  float sum[RowTiles][Tokens / 2];
  uint4 a[kSlots][RowTiles][2];
  uint32_t e[2][RowTiles][kUnitsPerChunk];  // of the chunk at hand and of the next one
  Place<Stages> place;                      // of the unit that is read next
  int metadata_slot = 0;
  int current = 0, oldest = 0;              // stages: of the unit that is multiplied next; that is handed back next

  auto hand_back = [&]() {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (hands_back) ptx::barrier_arrive_cluster(handed_to + oldest * 8);
      if (++oldest == Stages) oldest = 0;
    }
  };
  auto read_values = [&](int slot) {
    ptx::barrier_wait(full + place.stage * 8, place.parity);
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
#pragma unroll
      for (int b = 0; b < 2; ++b)
        a[slot][r][b] = ptx::load_shared_16(values + place.stage * S::kValueBytes + r * kUnitValueBytes + b * 512);
    place.next();
  };
  auto read_group = [&](int slot) {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) read_values(slot + i);
  };
  // In a full chunk a lane's words lie side by side, in what is left over the units do.
  auto read_metadata = [&](int slot, int chunk) {
    const uint32_t from = metadata + metadata_slot * S::kMetadataBytes;
    const bool full_chunk = (chunk + 1) * kUnitsPerChunk <= p.units;
    if (++metadata_slot == S::kMetadataSlots) metadata_slot = 0;
#pragma unroll
    for (int r = 0; r < RowTiles; ++r) {
      if (full_chunk) {
        const uint4 v = ptx::load_shared_16(from + r * kChunkMetadataBytes + lane * 16);
        e[slot][r][0] = v.x, e[slot][r][1] = v.y, e[slot][r][2] = v.z, e[slot][r][3] = v.w;
      } else {
#pragma unroll
        for (int i = 0; i < kUnitsPerChunk; ++i)
          e[slot][r][i] = ptx::load_shared_4(from + r * kChunkMetadataBytes + i * kMetadataUnitBytes + lane * 4);
      }
    }
  };
  TileWriter<T, RowTiles, Tokens, Gated> writer{staged + warp / 4 * (S::kStagedBytes / 2), staged + S::kStagedBytes};
  Work work;
  bool more = next_work(work);
  ptx::wait_dependency();  // outputs may lie where the kernel before still reads
  while (more) {
    const Work now = work;
#pragma unroll
    for (int r = 0; r < RowTiles; ++r)
#pragma unroll
      for (int i = 0; i < Tokens / 2; ++i) sum[r][i] = 0;

    bool under_way = false;  // a group's products besides those of the group at hand
    auto chunk_products = [&](auto parity, int chunk) {
      constexpr int P = decltype(parity)::value;
#pragma unroll
      for (int u = 0; u < kUnitsPerChunk; u += kGroup) {
        wgmma::fence();
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          const uint64_t b = wgmma::descriptor(ring + current * S::kTokenBytes, 0);
#pragma unroll
          for (int r = 0; r < RowTiles; ++r)
            wgmma::multiply<Tokens, 0>(sum[r], a[(u + i) % kSlots][r][0], b, e[P][r][u + i], T{});
#pragma unroll
          for (int r = 0; r < RowTiles; ++r)
            wgmma::multiply<Tokens, 1>(sum[r], a[(u + i) % kSlots][r][1], b + kBlock * 2 / 16, e[P][r][u + i], T{});
          if (++current == Stages) current = 0;
        }
        wgmma::commit();
        auto read_next = [&]() {
          const bool chunk_ends = u + kGroup == kUnitsPerChunk;
          if (chunk_ends && chunk + 1 == now.end) return;
          read_group((u + kGroup) % kSlots);
          if (chunk_ends) read_metadata(P ^ 1, chunk + 1);
        };
        if constexpr (kReadsEarly) read_next();
        wgmma::wait<1>();  // the group before is done: its stages and registers are free
        if (under_way) hand_back();
        under_way = true;
        if constexpr (!kReadsEarly) read_next();
      }
    };
    if (now.begin < now.end) {
      read_group(0);
      read_metadata(0, now.begin);
    }
    for (int chunk = now.begin; chunk < now.end; chunk += 2) {
      chunk_products(Selector<0>{}, chunk);
      if (chunk + 1 < now.end) chunk_products(Selector<1>{}, chunk + 1);
    }
    wgmma::wait<0>();
    if (under_way) hand_back();
    more = next_work(work);
    const Tile tile = tile_at<Split>(p, now.n, rank);
    const int output = tile.group * S::kOutputs, token = tile.tokens * Tokens;
    if constexpr (!Split) {
      if constexpr (RowTiles == 1) {
        if (now.end < schedule.chunks) {
          leave_sums(p, sum, thread);
          continue;
        }
        for (int missing = now.begin, team = schedule.team - 1; missing > 0; --team) {
          const int first = max(schedule.first_of(p, team) - now.n / p.token_tiles * schedule.chunks, 0);
          const int cluster = team * p.token_tiles + schedule.member;
          if (first < missing) collect_sums(p, sum, cluster * p.cluster + rank, thread);
          missing = first;
        }
      }
      writer.write(p, sum, output, token, warp, lane);
    } else {
      asm volatile("bar.sync 1, 256;" ::: "memory");  // both warpgroups left the ring
      float* const sums = reinterpret_cast<float*>(shared);
      const int g = lane / 4, q = lane % 4;
#pragma unroll
      for (int r = 0; r < RowTiles; ++r)
#pragma unroll
        for (int i = 0; i < Tokens / 2; ++i)
          sums[(i / 4 * 8 + 2 * q + i % 2) * S::kSumStride + (warp * RowTiles + r) * kRowTile + g + i % 4 / 2 * 8] = sum[r][i];
      ptx::cluster_sync();
      write_sums<T, S::kOutputs, Tokens, S::kSumStride>(p, ring, output, token, rank, thread);
    }
  }
  if constexpr (!Split) writer.finish(warp, lane);
}

template <typename T, int RowTiles, int Tokens, int Stages, bool Split, bool Gated>
__device__ __forceinline__ void gemm24_block(const KernelArguments& p, unsigned char* given) {
  using S = Shape<RowTiles, Tokens, Stages, Split, Gated>;
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
    ptx::prefetch_map(&p.values);
    ptx::prefetch_map(&p.metadata);
    ptx::prefetch_map(&p.x);
    for (int s = 0; s < Stages; ++s) {
      ptx::barrier_init(full + s * 8, 2);  // weights and activations
      ptx::barrier_init(empty + s * 8, kWarps * (Split ? 1 : p.cluster));
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  if (p.cluster > 1) ptx::cluster_sync();
  ptx::launch_dependents();

  if (threadIdx.x < 128) {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) copy_weights<S, Stages, Split>(p, ring, full, empty, rank, next_work);
    if (threadIdx.x == 32) copy_activations<S, Tokens, Stages, Split>(p, ring, full, empty, rank, next_work);
    __syncwarp();
    if (Split) ptx::cluster_sync();
  } else {
    ptx::take_registers<kConsumerRegisters>();
    consume<S, T, RowTiles, Tokens, Stages, Split, Gated>(p, ring, full, empty, staged, shared, rank, next_work, schedule);
  }
  if (p.cluster > 1) ptx::cluster_sync();  // nobody's shared memory goes away while another block uses it
}

#endif

template <typename T, int RowTiles, int Tokens, int Stages, bool Split, bool Gated>
__global__ void __launch_bounds__(kThreads, 1) gemm24_kernel(const __grid_constant__ KernelArguments p) {
#if SPARSERT_WGMMA
  extern __shared__ unsigned char shared[];
  gemm24_block<T, RowTiles, Tokens, Stages, Split, Gated>(p, shared);
#else
  __trap();  // csrc/select.cpp picks this kernel on a Hopper only
#endif
}

// ---------------------------------------------------------------------------------------------------------------
// Host side.

using Launcher = cudaError_t (*)(const KernelArguments&, int blocks, bool dependent_launch, cudaStream_t);

template <typename T, int RowTiles, int Tokens, int Stages, bool Split, bool Gated>
cudaError_t launch(const KernelArguments& arguments, int blocks, bool dependent_launch, cudaStream_t stream) {
  using S = Shape<RowTiles, Tokens, Stages, Split, Gated>;
  auto kernel = gemm24_kernel<T, RowTiles, Tokens, Stages, Split, Gated>;
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

template <typename T, int RowTiles, int Tokens, int Stages, bool Split>
constexpr Config make_config(const char* name) {
  constexpr Launcher launcher = launch<T, RowTiles, Tokens, Stages, Split, false>;
  Config config = {name, kRowTile * RowTiles * kWarps, Tokens, Split, launcher, launcher};
  if constexpr (!Split) config.gated_launcher = launch<T, RowTiles, Tokens, Stages, Split, true>;
  return config;
}

// Row tiles a warp, tokens, stages of the ring. csrc/select.cpp counts on the order.
template <typename T>
constexpr Config kConfigs[] = {
    make_config<T, 2, 128, 5, false>("256 outputs x 128 tokens"),
    make_config<T, 1, 256, 5, false>("128 outputs x 256 tokens"),
    make_config<T, 1, 192, 6, false>("128 outputs x 192 tokens"),
    make_config<T, 1, 128, 8, false>("128 outputs x 128 tokens"),
    make_config<T, 2, 64, 7, false>("256 outputs x 64 tokens"),
    make_config<T, 1, 32, 16, true>("128 outputs x 32 tokens, inputs split"),
    make_config<T, 1, 64, 12, true>("128 outputs x 64 tokens, inputs split"),
    make_config<T, 1, 128, 8, true>("128 outputs x 128 tokens, inputs split"),
    make_config<T, 1, 256, 5, true>("128 outputs x 256 tokens, inputs split"),
};

// Instantiated in a file for each number format, so that they compile side by side.
extern const Config* const kBFloat16Configs;
extern const Config* const kFloat16Configs;
extern const int kConfigCount;

}  // namespace sparsert::gemm24_detail
