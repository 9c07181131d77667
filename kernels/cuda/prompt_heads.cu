// Queries, keys and values of many tokens at once: head norms, rotation, and the keys' and values' way into the cache.
//
// One block a token. A warp holds as many heads as fit into 32 lanes of 8 values each; what a lane rotates with, and what
// the others of its head have squared, it gets by shuffles. Queries and keys are turned where they stand.

#include <cuda_runtime.h>

#include <algorithm>

#include "api.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "vector.cuh"

namespace sparsert {
namespace {

constexpr int kMaxWarps = 8;

template <typename T, typename Weight>
__global__ void prompt_heads_kernel(const __grid_constant__ PromptHeadsArguments p) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int vectors = p.head_dim / kVector, at_once = 32 / vectors;  // lanes of a head, heads of a warp
  const int part = lane / vectors, vector = lane % vectors, first_lane = part * vectors;
  const int half = p.rotary_dim / 2 / kVector;  // lanes of half of what is turned
  const int partner = first_lane + (vector < half ? vector + half : vector < 2 * half ? vector - half : vector);
  const int heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t token = blockIdx.x;
#if SPARSERT_HOPPER
  ptx::launch_dependents();
  ptx::wait_dependency();
#endif
  float cosine[kVector], sine[kVector];
  const bool turns = part < at_once && vector < 2 * half;
  if (turns) {
    unpack_vector<T>(cosine, static_cast<const uint4*>(p.cosine)[token * p.rotary_dim / kVector + vector]);
    unpack_vector<T>(sine, static_cast<const uint4*>(p.signed_sine)[token * p.rotary_dim / kVector + vector]);
  }
  const int64_t place = (p.rows[token] * p.num_kv_heads * p.cache_length + p.positions[token]) * p.head_dim;

  for (int first = warp * at_once; first < heads; first += warps * at_once) {  // every lane takes part in the shuffles
    const int head = first + part;
    const bool there = part < at_once && head < heads;
    const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + p.num_kv_heads;
    uint4* const at = static_cast<uint4*>(p.heads) + ((token * heads + head) * p.head_dim) / kVector + vector;
    uint4 stored = there ? *at : make_uint4(0, 0, 0, 0);
    float x[kVector];
    unpack_vector<T>(x, stored);
    if (p.q_norm != nullptr || p.k_norm != nullptr) {
      float own = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < kVector; ++i) own += x[i] * x[i];
      for (int i = 0; i < vectors; ++i) squares += __shfl_sync(0xffffffff, own, (first_lane + i) % 32);
      const void* const norm = is_query ? p.q_norm : p.k_norm;
      if (there && !is_value && norm != nullptr) {
        float weight[kVector];
        load_weight<T, Weight>(weight, norm, vector * kVector);
        const float inverse = rsqrtf(squares / p.head_dim + p.norm_eps);
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] *= inverse * weight[i];
      }
    }
    float other[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) other[i] = __shfl_sync(0xffffffff, x[i], partner % 32);
    if (!there) continue;
    if (!is_value) {
      if (turns) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) x[i] = x[i] * cosine[i] + other[i] * sine[i];
      }
      stored = pack_vector<T>(x);
      *at = stored;
    }
    if (!is_query) {
      const int kv_head = (head - p.num_heads) % p.num_kv_heads;
      void* const cache = is_value ? p.values : p.keys;
      static_cast<uint4*>(cache)[(place + kv_head * p.cache_length * p.head_dim) / kVector + vector] = stored;
    }
  }
}

}  // namespace

bool prompt_heads_takes(int head_dim, int rotary_dim) {
  return head_dim % kVector == 0 && head_dim <= 32 * kVector && rotary_dim % (2 * kVector) == 0 && rotary_dim <= head_dim;
}

int prompt_heads(const PromptHeadsArguments& a, bool dependent_launch, void* stream) {
  if (a.tokens < 1 || !prompt_heads_takes(a.head_dim, a.rotary_dim) || a.dtype == DType::kFloat32)
    return cudaErrorInvalidValue;
  for (const void* address : {static_cast<const void*>(a.heads), static_cast<const void*>(a.keys),
                              static_cast<const void*>(a.values), a.cosine, a.signed_sine})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return cudaErrorMisalignedAddress;
  const int at_once = 32 / (a.head_dim / kVector), heads = a.num_heads + 2 * a.num_kv_heads;
  const int warps = std::min(kMaxWarps, (heads + at_once - 1) / at_once);
  const auto launch = [&](auto kernel) {
    return launch_kernel(kernel, a, {dim3(a.tokens), warps * 32}, dependent_launch, static_cast<cudaStream_t>(stream));
  };
  if (a.dtype == DType::kBFloat16)
    return launch(a.norm_is_float ? prompt_heads_kernel<__nv_bfloat16, float>
                                  : prompt_heads_kernel<__nv_bfloat16, __nv_bfloat16>);
  return launch(a.norm_is_float ? prompt_heads_kernel<__half, float> : prompt_heads_kernel<__half, __half>);
}

}  // namespace sparsert
