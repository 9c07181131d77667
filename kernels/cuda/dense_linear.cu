// y[M, N] = x[M, K] W^T (+ bias) for batch 1-8, W dense and row-major as checkpoints store it.
//
// The head and layers that are kept dense. Like its sparse sibling it is a read of the weights, and unlike it there is
// nothing to prepare: the order of a tensor core's k-index is free, so 16 bytes of a weight row and the same 16 bytes of
// a batch row are operands of two mma as they come from memory, without shared memory or rearrangement.
//
//   * A block owns 16 outputs; its eight warps take chunks of the inputs in turn and add up through shared memory, in a
//     fixed order.
//   * Weights of the next chunk are requested before this one is multiplied; those of the first chunk before the wait
//     for the kernel that makes x.
//   * x is read from L1 and L2, 16 bytes a lane; batch rows that do not exist are not read.
//
// Measured on an H100 against cuBLAS, weights rotated past L2, batch 1-8: 1.01-1.30x. At 16 rows, with two batch tiles,
// it lost (0.86-1.04x), as x then moves as many bytes as the weights do; blocks that stay for several tiles were no
// faster. Source: PTX ISA (mma.m16n8k16, griddepcontrol).

#include <cuda_runtime.h>

#include <type_traits>

#include "api.h"
#include "launch.cuh"
#include "ptx.cuh"
#include "vector.cuh"

namespace sparsert {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16;              // outputs of a block
constexpr int kStep = 32;              // inputs of a 16-byte piece in each of four lanes: two mma
constexpr int kSteps = 4;
constexpr int kChunk = kStep * kSteps; // inputs that a warp takes at a time
constexpr int kColumns = 8;            // batch rows of an mma

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) dense_linear_kernel(const __grid_constant__ DenseLinearArguments p) {
  __shared__ float sums[kWarps][kColumns][kRows + 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int first = blockIdx.x * kRows, chunks = (p.K + kChunk - 1) / kChunk;

  uint4 w[2][2][kSteps], x[2][kSteps];  // [buffer][row g, row g + 8][step]
  auto request_weights = [&](int buffer, int chunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + half * 8 + g;
      const T* const from = static_cast<const T*>(p.weight) + int64_t(row) * p.K;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int k = chunk * kChunk + s * kStep + q * 8;
        w[buffer][half][s] = row < p.N && k < p.K ? ptx::load_stream_16(from + k) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  auto request_activations = [&](int buffer, int chunk) {
    const T* const from = static_cast<const T*>(p.x) + g * p.ldx;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = chunk * kChunk + s * kStep + q * 8;
      x[buffer][s] = g < p.M && k < p.K ? *reinterpret_cast<const uint4*>(from + k) : make_uint4(0, 0, 0, 0);
    }
  };

  int chunk = warp;
  request_weights(0, chunk);
#if SPARSERT_HOPPER
  ptx::launch_dependents();
  ptx::wait_dependency();
#endif
  request_activations(0, chunk);

  float sum[4] = {};
  // one chunk from a buffer, the next one requested into the other; registers must be named at compile time
  auto advance = [&](auto buffer_constant) {
    constexpr int buffer = decltype(buffer_constant)::value;
    request_weights(1 - buffer, chunk + kWarps);
    request_activations(1 - buffer, chunk + kWarps);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const uint4 &low = w[buffer][0][s], &high = w[buffer][1][s], &b = x[buffer][s];
      ptx::mma(sum, low.x, high.x, low.y, high.y, b.x, b.y, T{});
      ptx::mma(sum, low.z, high.z, low.w, high.w, b.z, b.w, T{});
    }
    chunk += kWarps;
  };
  while (chunk < chunks) {
    advance(std::integral_constant<int, 0>{});
    if (chunk >= chunks) break;
    advance(std::integral_constant<int, 1>{});
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) sums[warp][2 * q + i % 2][g + i / 2 * 8] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * p.M; i += kThreads) {
    const int row = i % kRows, column = i / kRows, output = first + row;
    if (output >= p.N) continue;
    float total = 0;
#pragma unroll
    for (int k = 0; k < kWarps; ++k) total += sums[k][column][row];
    if (p.bias != nullptr) total += float(static_cast<const T*>(p.bias)[output]);
    static_cast<T*>(p.y)[int64_t(column) * p.N + output] = T(total);
  }
}

template <typename T>
cudaError_t launch(const DenseLinearArguments& a, bool dependent_launch, cudaStream_t stream) {
  const dim3 blocks((a.N + kRows - 1) / kRows);
  return launch_kernel(dense_linear_kernel<T>, a, {blocks, kThreads}, dependent_launch, stream);
}

}  // namespace

int dense_linear_max_batch() { return kColumns; }

int dense_linear(const DenseLinearArguments& a, bool dependent_launch, void* stream) {
  if (a.M < 1 || a.M > dense_linear_max_batch() || a.N < 1 || a.K < 8 || a.K % 8 != 0 || a.dtype == DType::kFloat32)
    return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(a.weight) % 16 != 0 || reinterpret_cast<uintptr_t>(a.x) % 16 != 0 || a.ldx % 8 != 0)
    return cudaErrorMisalignedAddress;
  const auto on = static_cast<cudaStream_t>(stream);
  return a.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(a, dependent_launch, on)
                                     : launch<__half>(a, dependent_launch, on);
}

}  // namespace sparsert
