// Four outputs of one batch row at a time: sums, bias, rounding, store.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx.cuh"

namespace sparsert {

__device__ __forceinline__ void add(float4& to, const float4& v) {
  to.x += v.x;
  to.y += v.y;
  to.z += v.z;
  to.w += v.w;
}

#if SPARSERT_HOPPER
// What stands at `address` in each of a cluster's blocks, all asked for at once and added in the order of the blocks.
template <int MaxBlocks>
__device__ __forceinline__ float4 cluster_sum(uint32_t address, int blocks) {
  float4 part[MaxBlocks];
#pragma unroll
  for (int b = 0; b < MaxBlocks; ++b)
    if (b < blocks) part[b] = ptx::load_cluster(address, b);
  float4 total = part[0];
#pragma unroll
  for (int b = 1; b < MaxBlocks; ++b)
    if (b < blocks) add(total, part[b]);
  return total;
}
#endif

__device__ __forceinline__ void convert(__nv_bfloat16& to, float v) { to = __float2bfloat16_rn(v); }
__device__ __forceinline__ void convert(__half& to, float v) { to = __float2half_rn(v); }

// A number that is known at compile time, to be passed to a lambda.
template <int Value>
struct Selector {
  static constexpr int value = Value;
};

template <typename T>
struct alignas(8) Quad {
  T v[4];
};

// The bias of outputs `first`..`first`+3; those past N do not exist.
template <typename T>
__device__ __forceinline__ void add_bias(float4& to, const T* bias, int first, int N) {
  if (bias == nullptr) return;
  if (first < N) to.x += float(bias[first]);
  if (first + 1 < N) to.y += float(bias[first + 1]);
  if (first + 2 < N) to.z += float(bias[first + 2]);
  if (first + 3 < N) to.w += float(bias[first + 3]);
}

// Rounding and store of outputs `first`..`first`+3 of one batch row; those past N do not exist.
template <typename T>
__device__ __forceinline__ void store_quad(T* row, int first, int N, const float4& total) {
  const float v[4] = {total.x, total.y, total.z, total.w};
  Quad<T> quad;
#pragma unroll
  for (int i = 0; i < 4; ++i) convert(quad.v[i], v[i]);
  if (N % 4 == 0) {  // rows of y are 8-byte aligned
    if (first < N) *reinterpret_cast<Quad<T>*>(row + first) = quad;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (first + i < N) row[first + i] = quad.v[i];
  }
}

__device__ __forceinline__ void scale(float4& v, float by) {
  v.x *= by;
  v.y *= by;
  v.z *= by;
  v.w *= by;
}

}  // namespace sparsert
