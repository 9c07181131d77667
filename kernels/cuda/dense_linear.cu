// y[M, N] = x[M, K] W^T (+ bias) for batch 1-16, W dense and row-major as checkpoints store it.
//
// The head and layers that are kept dense. Like its sparse sibling it is a read of the weights, and unlike it there is
// nothing to prepare: the order of a tensor core's k-index is free, so 16 bytes of a weight row and the same 16 bytes of
// a batch row are operands of two mma as they come from memory, without shared memory or rearrangement.
//
//   * A block owns 16 or 32 outputs at a time; its eight warps take chunks of the inputs in turn and add up through
//     shared memory, in a fixed order.
//   * Weights of the next chunk, and of the next outputs, are requested before this chunk is multiplied; those of the
//     first chunk before the wait for the kernel that makes x.
//   * x is read from L1 and L2, 16 bytes a lane; batch rows that do not exist are not read.
//
// Source: PTX ISA (mma.m16n8k16, griddepcontrol).

#include <cuda_runtime.h>

#include <algorithm>

#include "api.h"
#include "ptx.cuh"
#include "vector.cuh"

namespace sparsert {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStep = 32;  // inputs of a 16-byte piece of each of four lanes: two mma

struct KernelArguments {
  const char* weight;
  const char* x;
  const void* bias;
  void* y;
  int M, N, K;
  int64_t ldx_bytes;
  int tiles;
};

// Tiles: row tiles of 16 outputs a block; Steps: of 32 inputs in a chunk; BatchTiles: of 8 batch rows.
template <typename T, int BatchTiles, int Tiles, int Steps>
__global__ void __launch_bounds__(kThreads, 2) dense_linear_kernel(const __grid_constant__ KernelArguments p) {
  constexpr int kRows = 16 * Tiles, kColumns = 8 * BatchTiles, kChunk = kStep * Steps;
  // two sets: while one is added up, the next outputs' sums may be written; a row stride that is odd in 16 floats
  __shared__ float sums[2][kWarps][kColumns][kRows + 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int chunks = (p.K + kChunk - 1) / kChunk;
  const int64_t row_bytes = int64_t(p.K) * 2;

  uint4 w[2][Tiles][2][Steps];
  uint4 x[2][BatchTiles][Steps];
  auto request_weights = [&](int buffer, int tile, int chunk) {
#pragma unroll
    for (int t = 0; t < Tiles; ++t)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = tile * kRows + t * 16 + half * 8 + g;
        const char* const from = p.weight + row * row_bytes;
#pragma unroll
        for (int s = 0; s < Steps; ++s) {
          const int k = chunk * kChunk + s * kStep + q * 8;
          w[buffer][t][half][s] =
              row < p.N && k < p.K && tile < p.tiles ? ptx::load_stream_16(from + k * 2) : make_uint4(0, 0, 0, 0);
        }
      }
  };
  auto request_activations = [&](int buffer, int chunk) {
#pragma unroll
    for (int n = 0; n < BatchTiles; ++n) {
      const int row = n * 8 + g;
#pragma unroll
      for (int s = 0; s < Steps; ++s) {
        const int k = chunk * kChunk + s * kStep + q * 8;
        x[buffer][n][s] = row < p.M && k < p.K ? *reinterpret_cast<const uint4*>(p.x + row * p.ldx_bytes + k * 2)
                                               : make_uint4(0, 0, 0, 0);
      }
    }
  };

  int tile = blockIdx.x, chunk = warp;
  request_weights(0, tile, chunk);
#if SPARSERT_HOPPER
  ptx::launch_dependents();
  ptx::wait_dependency();
#endif
  request_activations(0, chunk);

  float sum[Tiles][BatchTiles][4] = {};
  int parity = 0;
  // one chunk from `buffer`, the next one requested into the other; buffers must be named at compile time
  auto advance = [&](auto buffer_constant) {
    constexpr int buffer = decltype(buffer_constant)::value;
    int next_tile = tile, next_chunk = chunk + kWarps;
    const bool last = next_chunk >= chunks;
    if (last) {
      next_tile = tile + gridDim.x;
      next_chunk = warp;
    }
    request_weights(1 - buffer, next_tile, next_chunk);
    request_activations(1 - buffer, next_chunk);
    if (chunk < chunks) {
#pragma unroll
      for (int s = 0; s < Steps; ++s)
#pragma unroll
        for (int t = 0; t < Tiles; ++t)
#pragma unroll
          for (int n = 0; n < BatchTiles; ++n) {
            const uint4 &low = w[buffer][t][0][s], &high = w[buffer][t][1][s], &b = x[buffer][n][s];
            ptx::mma(sum[t][n], low.x, high.x, low.y, high.y, b.x, b.y, T{});
            ptx::mma(sum[t][n], low.z, high.z, low.w, high.w, b.z, b.w, T{});
          }
    }
    if (last) {
#pragma unroll
      for (int t = 0; t < Tiles; ++t)
#pragma unroll
        for (int n = 0; n < BatchTiles; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            sums[parity][warp][n * 8 + 2 * q + i % 2][t * 16 + g + i / 2 * 8] = sum[t][n][i];
            sum[t][n][i] = 0;
          }
      __syncthreads();
      for (int i = threadIdx.x; i < kRows * p.M; i += kThreads) {
        const int row = i % kRows, column = i / kRows, output = tile * kRows + row;
        float total = 0;
#pragma unroll
        for (int k = 0; k < kWarps; ++k) total += sums[parity][k][column][row];
        if (output < p.N) {
          if (p.bias != nullptr) total += float(static_cast<const T*>(p.bias)[output]);
          static_cast<T*>(p.y)[int64_t(column) * p.N + output] = T(total);
        }
      }
      parity ^= 1;
    }
    tile = next_tile;
    chunk = next_chunk;
  };
  while (tile < p.tiles) {
    advance(std::integral_constant<int, 0>{});
    if (tile >= p.tiles) break;
    advance(std::integral_constant<int, 1>{});
  }
}

template <typename T, int BatchTiles, int Tiles, int Steps>
cudaError_t launch(KernelArguments arguments, int blocks, bool dependent_launch, cudaStream_t stream) {
  arguments.tiles = (arguments.N + 16 * Tiles - 1) / (16 * Tiles);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks > 0 ? std::min(blocks, arguments.tiles) : arguments.tiles);
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = dependent_launch ? 1 : 0;
  return cudaLaunchKernelEx(&config, dense_linear_kernel<T, BatchTiles, Tiles, Steps>, arguments);
}

template <typename T>
cudaError_t launch(const KernelArguments& arguments, int blocks, bool dependent_launch, cudaStream_t stream) {
  return arguments.M <= 8 ? launch<T, 1, 1, 4>(arguments, blocks, dependent_launch, stream)
                          : launch<T, 2, 2, 2>(arguments, blocks, dependent_launch, stream);
}

}  // namespace

int dense_linear_max_batch() { return 16; }

int dense_linear(const DenseLinearArguments& a, int blocks, bool dependent_launch, void* stream) {
  if (a.M < 1 || a.M > dense_linear_max_batch() || a.N < 1 || a.K < 8 || a.K % 8 != 0 || a.dtype == DType::kFloat32)
    return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(a.weight) % 16 != 0 || reinterpret_cast<uintptr_t>(a.x) % 16 != 0 || a.ldx % 8 != 0)
    return cudaErrorMisalignedAddress;
  const KernelArguments arguments = {static_cast<const char*>(a.weight), static_cast<const char*>(a.x), a.bias, a.y,
                                     a.M, a.N, a.K, a.ldx * 2, 0};
  const auto on = static_cast<cudaStream_t>(stream);
  return a.dtype == DType::kBFloat16 ? launch<__nv_bfloat16>(arguments, blocks, dependent_launch, on)
                                     : launch<__half>(arguments, blocks, dependent_launch, on);
}

}  // namespace sparsert
