// Residual addition and the norm behind it, one block a row, everything in registers between one read and one write.
//
// In a decode step a row is a few kilobytes in L2, so the time is latency: weights are read before the wait for the
// kernel that makes x, and the next kernel is let in at once to request its own weights.

#include <cuda_runtime.h>

#include <algorithm>

#include "api.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "vector.cuh"

namespace sparsert {
namespace {

constexpr int kMaxThreads = 1024;

// Sums of two numbers over the block, the same in every thread.
__device__ __forceinline__ float2 block_sum(float2 v, float2 (&partial)[32]) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    v.x += __shfl_xor_sync(0xffffffff, v.x, offset);
    v.y += __shfl_xor_sync(0xffffffff, v.y, offset);
  }
  const int warps = (blockDim.x + 31) / 32;
  __syncthreads();  // the sums of the last call have been read
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
  __syncthreads();
  v = make_float2(0, 0);
  for (int w = 0; w < warps; ++w) {
    v.x += partial[w].x;
    v.y += partial[w].y;
  }
  return v;
}

// Vectors: 16-byte pieces of the row that a thread holds.
template <typename T, typename Weight, int Vectors>
__global__ void residual_norm_kernel(const __grid_constant__ ResidualNormArguments p) {
  __shared__ float2 partial[32];
  const int64_t row = int64_t(blockIdx.x) * p.width;
  float weight[Vectors][kVector], v[Vectors][kVector];
  auto at = [&](int i) { return (i * int(blockDim.x) + int(threadIdx.x)) * kVector; };
#pragma unroll
  for (int i = 0; i < Vectors; ++i)
    if (at(i) < p.width) load_weight<T, Weight>(weight[i], p.weight, at(i));
#if SPARSERT_HOPPER
  ptx::launch_dependents();
  ptx::wait_dependency();
#endif
#pragma unroll
  for (int i = 0; i < Vectors; ++i)
    if (at(i) < p.width) unpack_vector<T>(v[i], *reinterpret_cast<const uint4*>(static_cast<const T*>(p.x) + row + at(i)));

  // (mean, 1 / deviation) of what the block holds; the mean is 0 for an RMSNorm
  auto moments = [&]() {
    float2 sums = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < Vectors; ++i)
      if (at(i) < p.width)
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          sums.x += v[i][j];
          sums.y += v[i][j] * v[i][j];
        }
    sums = block_sum(sums, partial);
    if (!p.centered) return make_float2(0, rsqrtf(sums.y / p.width + p.eps));
    // a second pass over the registers: the difference of large sums would lose the variance
    const float mean = sums.x / p.width;
    float2 squares = make_float2(0, 0);
#pragma unroll
    for (int i = 0; i < Vectors; ++i)
      if (at(i) < p.width)
#pragma unroll
        for (int j = 0; j < kVector; ++j) squares.y += (v[i][j] - mean) * (v[i][j] - mean);
    return make_float2(mean, rsqrtf(block_sum(squares, partial).y / p.width + p.eps));
  };

  if (p.post_weight != nullptr) {
    const float2 m = moments();
#pragma unroll
    for (int i = 0; i < Vectors; ++i)
      if (at(i) < p.width) {
        float post[kVector];
        load_weight<T, Weight>(post, p.post_weight, at(i));
#pragma unroll
        for (int j = 0; j < kVector; ++j) v[i][j] = (v[i][j] - m.x) * m.y * post[j];
        unpack_vector<T>(v[i], pack_vector<T>(v[i]));  // rounded as a norm's output is
      }
  }
  if (p.residual != nullptr) {
#pragma unroll
    for (int i = 0; i < Vectors; ++i)
      if (at(i) < p.width) {
        float residual[kVector];
        unpack_vector<T>(residual, *reinterpret_cast<const uint4*>(static_cast<const T*>(p.residual) + row + at(i)));
#pragma unroll
        for (int j = 0; j < kVector; ++j) v[i][j] += residual[j];
        const uint4 rounded = pack_vector<T>(v[i]);
        *reinterpret_cast<uint4*>(static_cast<T*>(p.stream_out) + row + at(i)) = rounded;
        unpack_vector<T>(v[i], rounded);  // the norm is of the stream as it is stored
      }
  } else if (p.stream_out != nullptr) {
#pragma unroll
    for (int i = 0; i < Vectors; ++i)
      if (at(i) < p.width) *reinterpret_cast<uint4*>(static_cast<T*>(p.stream_out) + row + at(i)) = pack_vector<T>(v[i]);
  }
  const float2 m = moments();
#pragma unroll
  for (int i = 0; i < Vectors; ++i)
    if (at(i) < p.width) {
      float normed[kVector], bias[kVector] = {};
      if (p.bias != nullptr) load_weight<T, Weight>(bias, p.bias, at(i));
#pragma unroll
      for (int j = 0; j < kVector; ++j) normed[j] = (v[i][j] - m.x) * m.y * weight[i][j] + bias[j];
      *reinterpret_cast<uint4*>(static_cast<T*>(p.normed) + row + at(i)) = pack_vector<T>(normed);
    }
}

template <typename T, typename Weight, int Vectors>
cudaError_t launch(const ResidualNormArguments& a, bool dependent_launch, cudaStream_t stream) {
  const int vectors = a.width / kVector;
  const int threads = (vectors + Vectors - 1) / Vectors;
  return launch_kernel(residual_norm_kernel<T, Weight, Vectors>, a, {dim3(a.rows), (threads + 31) / 32 * 32},
                       dependent_launch, stream);
}

template <typename T>
cudaError_t launch(const ResidualNormArguments& a, bool dependent_launch, cudaStream_t stream) {
  const bool narrow = a.width <= kMaxThreads * kVector;
  if (a.weight_is_float)
    return narrow ? launch<T, float, 1>(a, dependent_launch, stream) : launch<T, float, 4>(a, dependent_launch, stream);
  return narrow ? launch<T, T, 1>(a, dependent_launch, stream) : launch<T, T, 4>(a, dependent_launch, stream);
}

}  // namespace

int residual_norm_max_width() { return 4 * kMaxThreads * kVector; }

int residual_norm(const ResidualNormArguments& a, bool dependent_launch, void* stream) {
  if (a.rows < 1 || a.width < kVector || a.width % kVector != 0 || a.width > residual_norm_max_width() ||
      a.dtype == DType::kFloat32 || (a.residual != nullptr && a.stream_out == nullptr))
    return cudaErrorInvalidValue;
  for (const void* address : {a.x, a.residual, a.weight, a.bias, a.post_weight, static_cast<const void*>(a.stream_out),
                              static_cast<const void*>(a.normed)})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return cudaErrorMisalignedAddress;
  const auto on = static_cast<cudaStream_t>(stream);
  return a.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(a, dependent_launch, on)
                                     : launch<__half>(a, dependent_launch, on);
}

}  // namespace sparsert
