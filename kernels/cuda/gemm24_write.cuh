// How gemm24.cuh hands on and writes what it has summed up: sums of one block for another, tiles by the copy engine, sums
// of a cluster.

#pragma once

#include "activation.cuh"
#include "gemm24_schedule.cuh"
#include "outputs.cuh"
#include "ptx.cuh"

namespace sparsert::gemm24_detail {

// Outputs of one warpgroup on their way through shared memory: kStagedTokens tokens in panels of rows, twice.
template <int RowTiles, bool Gated>
struct StagedTile {
  static constexpr int kRowBytes = Gated && RowTiles == 1 ? 64 : 128;  // of a token in a panel, swizzled by as much
  static constexpr int kPanels = RowTiles == 2 && !Gated ? 2 : 1;
  static constexpr int kPanelBytes = kStagedTokens * kRowBytes;
  static constexpr int kBytes = 2 * kPanels * kPanelBytes;
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
  using Staged = StagedTile<RowTiles, Gated>;
  static constexpr int kRowBytes = Staged::kRowBytes, kPanels = Staged::kPanels, kPanelBytes = Staged::kPanelBytes;
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
    return cluster_sum<kMaxSplits>(sums + (token * SumStride + row) * 4, p.cluster);
  };
  if (p.gated) {
    constexpr int kQuads = Outputs / 8;
    for (int i = rank * kWarps * 32 + thread; i < kQuads * tokens; i += step) {
      const int token = i / kQuads, quad = i % kQuads, row = quad / 4 * 2 * kRowTile + quad % 4 * 4;
      float4 gate = total_at(token, row), total = total_at(token, row + kRowTile);
      add_bias(gate, bias, first_output + row, p.N);
      add_bias(total, bias, first_output + row + kRowTile, p.N);
      multiply_gate(p.activation, total, gate);
      store_quad(y + int64_t(first_token + token) * (p.N / 2), first_output / 2 + quad * 4, p.N / 2, total);
    }
    return;
  }
  constexpr int kQuads = Outputs / 4;
  for (int i = rank * kWarps * 32 + thread; i < kQuads * tokens; i += step) {
    const int token = i / kQuads, row = i % kQuads * 4;
    float4 total = total_at(token, row);
    add_bias(total, bias, first_output + row, p.N);
    activate(p.activation, total);
    store_quad(y + int64_t(first_token + token) * p.N, first_output + row, p.N, total);
  }
}

#endif

}  // namespace sparsert::gemm24_detail
