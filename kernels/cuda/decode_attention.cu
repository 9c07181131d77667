// Attention of one new token per text over the KV cache, in one launch: head norms, rotation, append, split over the
// context, merge.
//
// The cache is read once and nothing else is large, so what counts is bytes in flight and how early they are asked for.
//
//   * A warp takes 16 positions at a time. All of their keys and values go straight to registers, 16 and 8 bytes a
//     lane; the order of a tensor core's k-index is free, so no shared memory, transposition or padding lies between.
//   * Up to eight query heads that share a key/value head are the rows of one mma, so a group costs what one head does.
//   * Positions are dealt out over the warps of a cluster of blocks; blocks merge through distributed shared memory, in
//     a fixed order: deterministic, no workspace, no counters.
//   * Lengths and the cache of earlier tokens do not depend on the kernel before this one (the projection). With
//     `settled` they are read before the wait for it, so for short contexts all reads are under way by then.
//   * The new key and value are written to the cache by one block and read by it from shared memory.
//
// One warp, 16 positions p..p+15, lane = 4 g + q:
//   scores   A = queries: row g, B = keys: column g is position p + g (+ 8); per 32 dimensions the lane holds 8 of its row,
//            q*8..q*8+7, which serve two mma as k = 2q, 2q+1, 2q+8, 2q+9 of each
//   output   A = probabilities, which are where the scores' accumulators left them; B = values: column g of mma j is
//            dimension 4 g + j, k = positions 2q, 2q+1, 2q+8, 2q+9
//
// Source: Dao et al., FlashAttention (online softmax), and Flash-Decoding (split over the context); PTX ISA (mma).

#include <cuda_runtime.h>

#include <algorithm>

#include "api.h"
#include "launch.cuh"
#include "layout.cuh"
#include "ptx.cuh"
#include "vector.cuh"

namespace sparsert {
namespace {

constexpr int kPositions = 16;  // of a warp's step
constexpr int kGroup = 8;       // query heads of a block
constexpr int kMaxSplits = 16;  // 8 is the portable limit, every Hopper takes 16
constexpr float kLog2E = 1.4426950408889634f;

struct KernelArguments {
  DecodeAttentionArguments a;
  int splits, group, head_groups;  // query heads a key/value head, and blocks that share them
  int tiles;                       // of the output
};

__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ void from_float(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void from_float(__half& to, float v) { to = __float2half_rn(v); }
__device__ __forceinline__ float exp2_fast(float v) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(v));
  return y;
}

// One head by one warp: norm, rotate, round. `tables` holds cosines and signed sines of the new position.
template <typename T, int HeadDim>
__device__ __forceinline__ void prepare_head(const DecodeAttentionArguments& a, const T* from, const void* norm, T* to,
                                             float* scratch, const float* tables, bool rotates, int lane) {
  float x[HeadDim / 32];
  float squares = 0;
#pragma unroll
  for (int i = 0; i < HeadDim / 32; ++i) {
    x[i] = to_float(from[lane + 32 * i]);
    squares += x[i] * x[i];
  }
  if (norm != nullptr) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) squares += __shfl_xor_sync(0xffffffff, squares, offset);
    const float inverse = rsqrtf(squares / HeadDim + a.norm_eps);
#pragma unroll
    for (int i = 0; i < HeadDim / 32; ++i) {
      const int at = lane + 32 * i;
      x[i] *= inverse * (a.norm_is_float ? static_cast<const float*>(norm)[at] : to_float(static_cast<const T*>(norm)[at]));
    }
  }
  if (!rotates) {
#pragma unroll
    for (int i = 0; i < HeadDim / 32; ++i) from_float(to[lane + 32 * i], x[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < HeadDim / 32; ++i) scratch[lane + 32 * i] = x[i];
  __syncwarp();
  const int half = a.rotary_dim / 2;
#pragma unroll
  for (int i = 0; i < HeadDim / 32; ++i) {
    const int at = lane + 32 * i;
    float v = x[i];
    if (at < a.rotary_dim) v = v * tables[at] + scratch[at < half ? at + half : at - half] * tables[HeadDim + at];
    from_float(to[at], v);
  }
  __syncwarp();
}

template <typename T, int HeadDim, int kWarps>
__global__ void __launch_bounds__(32 * kWarps) decode_attention_kernel(const __grid_constant__ KernelArguments p) {
  constexpr int kThreads = 32 * kWarps, kUnits = HeadDim / 32;
  // with 256 dimensions there are not enough registers to hold keys and values at the same time
  constexpr bool kEarlyValues = HeadDim <= 128;
  // 16 bytes more than a row put the eight heads' fragments into different banks
  __shared__ __align__(16) T query[kGroup][HeadDim + 8];
  __shared__ __align__(16) T fresh[2][HeadDim];  // key and value of the new token
  __shared__ __align__(16) float scratch[kWarps][HeadDim];
  __shared__ __align__(16) float tables[2 * HeadDim];
  __shared__ __align__(16) float outputs[kWarps][kGroup][HeadDim];
  __shared__ __align__(16) float maxima[kWarps][kGroup], sums[kWarps][kGroup];
  __shared__ __align__(16) float merged[2][kGroup];  // maximum and sum of the block

  const DecodeAttentionArguments& a = p.a;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int rank = blockIdx.x % p.splits;
  const int unit_of_grid = blockIdx.x / p.splits;
  const int kv_head = unit_of_grid / p.head_groups % a.num_kv_heads, row = unit_of_grid / (p.head_groups * a.num_kv_heads);
  const int first_head = unit_of_grid % p.head_groups * kGroup;
  const int group = min(kGroup, p.group - first_head);

#if SPARSERT_HOPPER
  ptx::launch_dependents();
  if (!a.settled) ptx::wait_dependency();
#endif
  const int now = static_cast<int>(a.lengths[row]);  // position of the new token
  const int begin = a.sliding_window > 0 ? max(0, now + 1 - a.sliding_window) : 0;
  const int end_block = now / kPositions + 1;
  const int workers = p.splits * kWarps;
  int block = begin / kPositions + rank * kWarps + warp;
  const int64_t cache_row = (int64_t(row) * a.num_kv_heads + kv_head) * a.cache_length * HeadDim;
  T* const keys = static_cast<T*>(a.keys) + cache_row;
  T* const values = static_cast<T*>(a.values) + cache_row;

  uint4 k[2][kUnits];
  uint2 v[4][kUnits];
  auto request_keys = [&](int from) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int position = from * kPositions + tile * 8 + g;
      const bool there = from < end_block && position < now && position >= begin;
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        k[tile][u] = there ? ptx::load_stream_16(keys + int64_t(position) * HeadDim + u * 32 + q * 8) : make_uint4(0, 0, 0, 0);
    }
  };
  auto request_values = [&](int from) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = from * kPositions + i / 2 * 8 + 2 * q + i % 2;
      const bool there = from < end_block && position < now && position >= begin;
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        v[i][u] = there ? ptx::load_stream_8(values + int64_t(position) * HeadDim + u * 32 + g * 4) : make_uint2(0, 0);
    }
  };
  request_keys(block);
  if constexpr (kEarlyValues) request_values(block);
  for (int i = threadIdx.x; i < a.rotary_dim; i += kThreads) {
    tables[i] = to_float(static_cast<const T*>(a.cosine)[int64_t(now) * a.rotary_dim + i]);
    tables[HeadDim + i] = to_float(static_cast<const T*>(a.signed_sine)[int64_t(now) * a.rotary_dim + i]);
  }
  __syncthreads();
#if SPARSERT_HOPPER
  if (a.settled) ptx::wait_dependency();
#endif

  // heads of this block: its queries, and in the block that has the last position the new key and value
  const T* const heads = static_cast<const T*>(a.heads) + row * a.heads_stride;
  const bool owner = (end_block - 1 - begin / kPositions) / kWarps % p.splits == rank;
  for (int head = warp; head < kGroup + 2; head += kWarps) {
    if (head < group) {
      const int number = kv_head * p.group + first_head + head;
      prepare_head<T, HeadDim>(a, heads + number * HeadDim, a.q_norm, query[head], scratch[warp], tables, true, lane);
    } else if (head < kGroup) {
      for (int i = lane; i < HeadDim; i += 32) from_float(query[head][i], 0.f);
    } else if (owner) {
      const bool is_key = head == kGroup;
      T* const to = fresh[head - kGroup];
      prepare_head<T, HeadDim>(a, heads + (a.num_heads + (is_key ? 0 : a.num_kv_heads) + kv_head) * HeadDim,
                               is_key ? a.k_norm : nullptr, to, scratch[warp], tables, is_key, lane);
      __syncwarp();
      T* const cache = (is_key ? keys : values) + int64_t(now) * HeadDim;
      for (int i = lane; i < HeadDim; i += 32) cache[i] = to[i];
    }
  }
  __syncthreads();

  uint4 queries[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) queries[u] = *reinterpret_cast<const uint4*>(&query[g][u * 32 + q * 8]);

  float output[kUnits][4][4] = {};
  float maximum = -INFINITY, sum = 0;
  const float scale = a.softcap > 0 ? a.scale / a.softcap : a.scale * kLog2E;
#pragma unroll 1
  for (; block < end_block; block += workers) {
    const int fresh_at = now - block * kPositions;  // where in this block the new token is, if it is here
    if (fresh_at < kPositions) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        if (fresh_at == tile * 8 + g)
#pragma unroll
          for (int u = 0; u < kUnits; ++u) k[tile][u] = *reinterpret_cast<const uint4*>(&fresh[0][u * 32 + q * 8]);
    }
    float scores[2][4] = {};
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        ptx::mma_rows_8(scores[tile], queries[u].x, queries[u].y, k[tile][u].x, k[tile][u].y, T{});
        ptx::mma_rows_8(scores[tile], queries[u].z, queries[u].w, k[tile][u].z, k[tile][u].w, T{});
      }
    if constexpr (kEarlyValues) {
      request_keys(block + workers);
    } else {
      request_values(block);
    }

    float s[4];  // head g, positions 2q, 2q+1, 2q+8, 2q+9, as exponents of two
    float highest = maximum;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = block * kPositions + i / 2 * 8 + 2 * q + i % 2;
      s[i] = scores[i / 2][i % 2] * scale;
      if (a.softcap > 0) s[i] = a.softcap * kLog2E * tanhf(s[i]);
      if (position > now || position < begin) s[i] = -INFINITY;
      highest = fmaxf(highest, s[i]);
    }
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(0xffffffff, highest, 2));
    const float shrink = exp2_fast(maximum - highest);  // a block has a visible position, so `highest` is finite
    maximum = highest;
    sum *= shrink;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      s[i] = exp2_fast(s[i] - highest);
      sum += s[i];
    }
    if (fresh_at < kPositions) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (fresh_at == i / 2 * 8 + 2 * q + i % 2)
#pragma unroll
          for (int u = 0; u < kUnits; ++u) v[i][u] = *reinterpret_cast<const uint2*>(&fresh[1][u * 32 + g * 4]);
    }
    const uint32_t low = to_pair(s[0], s[1], T{}), high = to_pair(s[2], s[3], T{});
#pragma unroll
    for (int u = 0; u < kUnits; ++u)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        output[u][j][0] *= shrink;
        output[u][j][1] *= shrink;
        const uint32_t pick = j % 2 == 0 ? 0x5410 : 0x7632;
        const uint32_t first = j < 2 ? __byte_perm(v[0][u].x, v[1][u].x, pick) : __byte_perm(v[0][u].y, v[1][u].y, pick);
        const uint32_t second = j < 2 ? __byte_perm(v[2][u].x, v[3][u].x, pick) : __byte_perm(v[2][u].y, v[3][u].y, pick);
        ptx::mma_rows_8(output[u][j], low, high, first, second, T{});
      }
    if constexpr (kEarlyValues) {
      request_values(block + workers);
    } else {
      request_keys(block + workers);
    }
  }

  // warps of a block
  sum += __shfl_xor_sync(0xffffffff, sum, 1);
  sum += __shfl_xor_sync(0xffffffff, sum, 2);
  if (q == 0) {
    maxima[warp][g] = maximum;
    sums[warp][g] = sum;
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    // columns 2q and 2q+1 of mma j are dimensions 8q + j and 8q + 4 + j
    float* const to = &outputs[warp][g][u * 32 + q * 8];
    *reinterpret_cast<float4*>(to) = make_float4(output[u][0][0], output[u][1][0], output[u][2][0], output[u][3][0]);
    *reinterpret_cast<float4*>(to + 4) = make_float4(output[u][0][1], output[u][1][1], output[u][2][1], output[u][3][1]);
  }
  __syncthreads();
  const int quads = group * (HeadDim / 4);
  for (int i = threadIdx.x; i < quads; i += kThreads) {
    const int head = i / (HeadDim / 4), at = i % (HeadDim / 4) * 4;
    float highest = maxima[0][head];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) highest = fmaxf(highest, maxima[w][head]);
    float total = 0;
    float4 merged_quad = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float weight = maxima[w][head] == -INFINITY ? 0.f : exp2_fast(maxima[w][head] - highest);
      const float4 part = *reinterpret_cast<const float4*>(&outputs[w][head][at]);
      total += weight * sums[w][head];
      merged_quad.x += weight * part.x;
      merged_quad.y += weight * part.y;
      merged_quad.z += weight * part.z;
      merged_quad.w += weight * part.w;
    }
    *reinterpret_cast<float4*>(&outputs[0][head][at]) = merged_quad;
    if (at == 0) {
      merged[0][head] = highest;
      merged[1][head] = total;
    }
  }
  // blocks of a cluster; every rank finishes a share
  __syncthreads();
#if SPARSERT_HOPPER
  if (p.splits > 1) ptx::cluster_sync();
#endif
  T* const out = static_cast<T*>(a.out);
  const int first_value = (kv_head * p.group + first_head) * HeadDim, row_values = a.num_heads * HeadDim;
  for (int i = rank * kThreads + threadIdx.x; i < quads; i += p.splits * kThreads) {
    const int head = i / (HeadDim / 4), at = i % (HeadDim / 4) * 4;
    float4 quad = *reinterpret_cast<const float4*>(&outputs[0][head][at]);
    float total = merged[1][head];
#if SPARSERT_HOPPER
    if (p.splits > 1) {
      const uint32_t maximum_at = ptx::shared_address(&merged[0][head]), sum_at = ptx::shared_address(&merged[1][head]);
      const uint32_t quad_at = ptx::shared_address(&outputs[0][head][at]);
      float highest = -INFINITY;
      for (int s = 0; s < p.splits; ++s) highest = fmaxf(highest, ptx::load_cluster_float(maximum_at, s));
      total = 0;
      quad = make_float4(0, 0, 0, 0);
#pragma unroll 4
      for (int s = 0; s < p.splits; ++s) {
        const float own = ptx::load_cluster_float(maximum_at, s);
        const float weight = own == -INFINITY ? 0.f : exp2_fast(own - highest);
        const float4 part = ptx::load_cluster(quad_at, s);
        total += weight * ptx::load_cluster_float(sum_at, s);
        quad.x += weight * part.x;
        quad.y += weight * part.y;
        quad.z += weight * part.z;
        quad.w += weight * part.w;
      }
    }
#endif
    const float inverse = 1 / total;
    const int value = first_value + head * HeadDim + at;
    const int64_t to = a.out_tiled ? tiled_element(p.tiles, row, value) : row * row_values + value;
    *reinterpret_cast<uint2*>(out + to) = make_uint2(
        to_pair(quad.x * inverse, quad.y * inverse, T{}), to_pair(quad.z * inverse, quad.w * inverse, T{}));
  }
#if SPARSERT_HOPPER
  if (p.splits > 1) ptx::cluster_sync();  // nobody's shared memory goes away while another rank reads it
#endif
}

template <typename T, int HeadDim, int kWarps>
cudaError_t launch(const KernelArguments& arguments, int blocks, bool dependent_launch, cudaStream_t stream) {
  auto kernel = decode_attention_kernel<T, HeadDim, kWarps>;
  if (arguments.splits > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  return launch_kernel(kernel, arguments, {dim3(blocks), 32 * kWarps, 0, arguments.splits}, dependent_launch, stream);
}

template <typename T, int HeadDim>
cudaError_t launch(const KernelArguments& arguments, int blocks, int warps, bool dependent_launch, cudaStream_t stream) {
  if constexpr (HeadDim <= 128) {  // eight warps' sums of 256 dimensions would not fit
    if (warps == 8) return launch<T, HeadDim, 8>(arguments, blocks, dependent_launch, stream);
  }
  return launch<T, HeadDim, 4>(arguments, blocks, dependent_launch, stream);
}

template <typename T>
cudaError_t launch(const KernelArguments& arguments, int blocks, int warps, bool dependent_launch, cudaStream_t stream) {
  switch (arguments.a.head_dim) {
    case 32: return launch<T, 32>(arguments, blocks, warps, dependent_launch, stream);
    case 64: return launch<T, 64>(arguments, blocks, warps, dependent_launch, stream);
    case 96: return launch<T, 96>(arguments, blocks, warps, dependent_launch, stream);
    case 128: return launch<T, 128>(arguments, blocks, warps, dependent_launch, stream);
    case 256: return launch<T, 256>(arguments, blocks, warps, dependent_launch, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

bool decode_attention_takes(int head_dim) {
  return head_dim == 32 || head_dim == 64 || head_dim == 96 || head_dim == 128 || head_dim == 256;
}

// Measured on an H100 inside decode steps of Llama-2-7B and Llama-3.1-8B, batch 1-16, contexts of 200, 2000 and 8000:
// eight warps a block where there are few units; clusters of four and more cost more than they bring where they take
// more than half of the multiprocessors.
DecodeAttentionChoice select_decode_attention(int batch, int num_heads, int num_kv_heads, int head_dim, int window,
                                              int multiprocessors, bool clusters) {
  const int group = num_heads / num_kv_heads, head_groups = (group + kGroup - 1) / kGroup;
  const int units = batch * num_kv_heads * head_groups;
  DecodeAttentionChoice choice = {units <= multiprocessors && head_dim <= 128 ? 8 : 4, 1};
  if (!clusters) return choice;
  const int useful = window / (units <= multiprocessors / 4 ? 64 : 128);
  for (int splits = 2; splits <= kMaxSplits && splits <= useful; splits *= 2)
    if (units * splits <= (splits == 2 ? multiprocessors : multiprocessors / 2)) choice.splits = splits;
  return choice;
}

int decode_attention(const DecodeAttentionArguments& a, DecodeAttentionChoice choice, bool dependent_launch,
                     void* stream) {
  if (a.batch < 1 || a.num_kv_heads < 1 || a.num_heads % a.num_kv_heads != 0 || !decode_attention_takes(a.head_dim) ||
      a.rotary_dim % 2 != 0 || a.rotary_dim > a.head_dim || a.dtype == DType::kFloat32 ||
      (a.out_tiled && (a.num_heads * a.head_dim % 64 != 0 || a.batch > kMaxTiledRows)) ||
      choice.splits < 1 || choice.splits > kMaxSplits || (choice.warps != 4 && choice.warps != 8))
    return cudaErrorInvalidValue;
  for (const void* address : {a.keys, a.values})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return cudaErrorMisalignedAddress;
  KernelArguments arguments;
  arguments.a = a;
  arguments.splits = choice.splits;
  arguments.group = a.num_heads / a.num_kv_heads;
  arguments.head_groups = (arguments.group + kGroup - 1) / kGroup;
  arguments.tiles = activation_tiles(a.batch);
  const int blocks = a.batch * a.num_kv_heads * arguments.head_groups * choice.splits;
  const auto on = static_cast<cudaStream_t>(stream);
  return a.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(arguments, blocks, choice.warps, dependent_launch, on)
                                     : launch<__half>(arguments, blocks, choice.warps, dependent_launch, on);
}

}  // namespace sparsert
