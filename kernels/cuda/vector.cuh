// Eight 16-bit values as one 16-byte access, computed with as float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace sparsert {

constexpr int kVector = 8;

__device__ __forceinline__ float2 to_float2(uint32_t pair, __nv_bfloat16) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
__device__ __forceinline__ float2 to_float2(uint32_t pair, __half) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}
// Rounded to nearest even; `low` goes to the lower address.
__device__ __forceinline__ uint32_t to_pair(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}
__device__ __forceinline__ uint32_t to_pair(float low, float high, __half) {
  const __half2 v = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(v);
}

template <typename T>
__device__ __forceinline__ void unpack_vector(float (&to)[kVector], const uint4& from) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = to_float2(words[i], T{});
    to[2 * i] = pair.x;
    to[2 * i + 1] = pair.y;
  }
}
template <typename T>
__device__ __forceinline__ uint4 pack_vector(const float (&from)[kVector]) {
  return make_uint4(to_pair(from[0], from[1], T{}), to_pair(from[2], from[3], T{}), to_pair(from[4], from[5], T{}),
                    to_pair(from[6], from[7], T{}));
}

// Eight weights from element `at`, a multiple of 8; Weight is float or T.
template <typename T, typename Weight>
__device__ __forceinline__ void load_weight(float (&to)[kVector], const void* from, int at) {
  if constexpr (sizeof(Weight) == 4) {
    const float4 low = static_cast<const float4*>(from)[at / 4], high = static_cast<const float4*>(from)[at / 4 + 1];
    const float v[kVector] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < kVector; ++i) to[i] = v[i];
  } else {
    unpack_vector<T>(to, static_cast<const uint4*>(from)[at / kVector]);
  }
}

}  // namespace sparsert
