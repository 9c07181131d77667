// Activation of a feed-forward layer: one read of gate and up, one write of their product.

#include <cuda_runtime.h>

#include <algorithm>

#include "activation.cuh"
#include "api.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "vector.cuh"

namespace sparsert {
namespace {

constexpr int kThreads = 256;
constexpr int kTurn = 16;  // values of gate and factor in turn when interleaved: a row tile of a packed weight

template <typename T, Activation Kind>
__global__ void __launch_bounds__(kThreads) activate_kernel(const __grid_constant__ ActivateArguments p) {
#if SPARSERT_HOPPER
  ptx::launch_dependents();
  ptx::wait_dependency();
#endif
  const int at = (blockIdx.x * kThreads + threadIdx.x) * kVector;
  if (at >= p.width) return;
  for (int row = blockIdx.y; row < p.rows; row += gridDim.y) {
    // interleaved: 16 values of the gate, the same 16 of the other factor, and so on
    const int first = p.interleaved ? at / kTurn * 2 * kTurn + at % kTurn : at;
    const T* const from = static_cast<const T*>(p.x) + int64_t(row) * (p.gated ? 2 : 1) * p.width + first;
    float v[kVector];
    unpack_vector<T>(v, *reinterpret_cast<const uint4*>(from));
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = activation(Kind, v[i]);
    if (p.gated) {
      float up[kVector];
      unpack_vector<T>(up, *reinterpret_cast<const uint4*>(from + (p.interleaved ? kTurn : p.width)));
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] *= up[i];
    }
    *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + int64_t(row) * p.width + at) = pack_vector<T>(v);
  }
}

template <typename T, Activation Kind>
cudaError_t launch(const ActivateArguments& a, bool dependent_launch, cudaStream_t stream) {
  const dim3 blocks((a.width / kVector + kThreads - 1) / kThreads, std::min(a.rows, 65535));
  return launch_kernel(activate_kernel<T, Kind>, a, {blocks, kThreads}, dependent_launch, stream);
}

template <typename T>
cudaError_t launch(const ActivateArguments& a, bool dependent_launch, cudaStream_t stream) {
  switch (a.kind) {
    case Activation::kNone: return cudaErrorInvalidValue;
    case Activation::kSilu: return launch<T, Activation::kSilu>(a, dependent_launch, stream);
    case Activation::kGelu: return launch<T, Activation::kGelu>(a, dependent_launch, stream);
    case Activation::kGeluTanh: return launch<T, Activation::kGeluTanh>(a, dependent_launch, stream);
    case Activation::kRelu2: return launch<T, Activation::kRelu2>(a, dependent_launch, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

int activate(const ActivateArguments& a, bool dependent_launch, void* stream) {
  if (a.rows < 1 || a.width < kVector || a.width % kVector != 0 || a.dtype == DType::kFloat32 ||
      (a.interleaved && (!a.gated || a.width % kTurn != 0)))
    return cudaErrorInvalidValue;
  for (const void* address : {a.x, static_cast<const void*>(a.y)})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return cudaErrorMisalignedAddress;
  const auto on = static_cast<cudaStream_t>(stream);
  return a.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(a, dependent_launch, on)
                                     : launch<__half>(a, dependent_launch, on);
}

}  // namespace sparsert
