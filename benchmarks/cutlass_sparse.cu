// CUTLASS's sparse GEMM for Hopper behind a plain C interface, for `sparsert bench kernels --peers cutlass`.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -DNDEBUG \
//        -Icutlass/include -Icutlass/tools/util/include -cudart static -shared -Xcompiler -fPIC \
//        benchmarks/cutlass_sparse.cu -o libcutlass_sparse.so
//
// y[N, M] = x[N, K] W[M, K]^T, all bf16 and row-major, sums in fp32. As in our own kernels the weight is the sparse
// operand A, so outputs are the rows M of the product and tokens its columns N. To CUTLASS that is A row-major, B = x^T
// column-major, D = y^T column-major; nothing is transposed and no number of tokens has to be padded.
//
// A weight is compressed by CUTLASS's own compressor. The kept values are the same for all kernels; the order of the
// metadata depends on the K of the tile, so a caller who tries kernels of both kinds keeps both orders.
//
// Nothing here knows torch: pointers to device memory, sizes, a stream. The compressor allocates and waits; a product
// does neither and can be captured. What it gives up: fp16, and anything that an epilogue could add.
//
// Source: CUTLASS 4: collective builders of sm90 with OpClassSparseTensorOp, StructuredSparseCompressor.

// Kernels may start while the one before still runs (programmatic dependent launch), as ours do.
#define CUTLASS_ENABLE_GDC_FOR_SM90

#include <cuda_runtime.h>

#include <cstdint>

#if !__has_include("cutlass/cutlass.h") || !__has_include("cutlass/util/packed_stride.hpp")
#error "CUTLASS is not found: give -I<checkout>/include and -I<checkout>/tools/util/include of a checkout of CUTLASS 4"
#endif
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "these are Hopper's instructions: compile with -gencode arch=compute_90a,code=sm_90a"
#endif

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/transform/device/transform_universal_adapter.hpp"
#include "cutlass/transform/kernel/sparse_gemm_compressor.hpp"
#include "cutlass/util/packed_stride.hpp"
#include "cutlass/version.h"

namespace {

using cute::Int;
using cute::Shape;
using cutlass::Status;

using Element = cutlass::bfloat16_t;
using ProblemShape = Shape<int, int, int, int>;  // M, N, K, and one product

constexpr int kAlignment = 8;  // 16 bytes, what the copy engine asks for

struct Cooperative {  // two warpgroups share a tile
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using Epilogue = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};

struct StreamK : Cooperative {  // tiles are divided over the inputs where they do not fill the last wave
  using Scheduler = cutlass::gemm::StreamKScheduler;
};

struct Pingpong {  // two warpgroups have a tile each; one multiplies while the other writes
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized;
  using Scheduler = cutlass::gemm::PersistentScheduler;
};

// What a caller gives for one product; device pointers.
struct Operands {
  const void* values;
  const void* metadata;
  const void* x;
  void* y;
};

template <class Tile, class Cluster, class Schedule>
struct Kernel {
  // C is void: there is nothing to add to the product, and its shared memory is left to the stages.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, cutlass::layout::ColumnMajor, kAlignment,
      Element, cutlass::layout::ColumnMajor, kAlignment, typename Schedule::Epilogue>::CollectiveOp;

  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, cutlass::layout::RowMajor, kAlignment,
      Element, cutlass::layout::ColumnMajor, kAlignment, float, Tile, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
      typename Schedule::Mainloop>::CollectiveOp;

  using Scheduler = typename Schedule::Scheduler;
  using GemmKernel = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue, Scheduler>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;
  using SparseConfig = typename Mainloop::SparseConfig;

  static Status arguments(const Operands& operands, int m, int n, int k, int swizzle,
                          typename Gemm::Arguments& arguments) {
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return Status::kErrorInternal;
    const ProblemShape problem{m, n, k, 1};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = problem;
    arguments.mainloop.ptr_A = static_cast<const Element*>(operands.values);
    arguments.mainloop.layout_a = SparseConfig::fill_layoutA(problem);
    arguments.mainloop.ptr_B = static_cast<const Element*>(operands.x);
    arguments.mainloop.dB = cutlass::make_cute_packed_stride(typename GemmKernel::StrideB{}, cute::make_shape(n, k, 1));
    arguments.mainloop.ptr_E = static_cast<const typename Mainloop::ElementE*>(operands.metadata);
    arguments.mainloop.layout_e = SparseConfig::fill_layoutE(problem);
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = 0.0f;
    arguments.epilogue.dC = cutlass::make_cute_packed_stride(typename GemmKernel::StrideC{}, cute::make_shape(m, n, 1));
    arguments.epilogue.ptr_D = static_cast<Element*>(operands.y);
    arguments.epilogue.dD = cutlass::make_cute_packed_stride(typename GemmKernel::StrideD{}, cute::make_shape(m, n, 1));
    arguments.hw_info = cutlass::KernelHardwareInfo::make_kernel_hardware_info<GemmKernel>(device);
    arguments.scheduler.max_swizzle_size = swizzle;
    return Status::kSuccess;
  }

  static int64_t workspace_bytes(int m, int n, int k, int swizzle) {
    typename Gemm::Arguments given{};
    if (arguments({}, m, n, k, swizzle, given) != Status::kSuccess) return -1;
    return static_cast<int64_t>(Gemm::get_workspace_size(given));
  }

  static Status run(const Operands& operands, void* workspace, int m, int n, int k, int swizzle, cudaStream_t stream) {
    typename Gemm::Arguments given{};
    Status status = arguments(operands, m, n, k, swizzle, given);
    if (status == Status::kSuccess) status = Gemm::can_implement(given);
    if (status != Status::kSuccess) return status;
    Gemm gemm;
    return gemm.run(given, workspace, stream, nullptr, /*launch_with_pdl=*/true);
  }

  // Makes kept values and metadata of a dense weight [m, k] that has its zeros. Allocates and waits.
  static Status compress(const void* weight, void* values, void* metadata, int m, int k, cudaStream_t stream) {
    using Compressor = cutlass::transform::device::TransformUniversalAdapter<
        cutlass::transform::kernel::StructuredSparseCompressor<ProblemShape, Element, cutlass::layout::RowMajor,
                                                               SparseConfig, cutlass::arch::Sm90>>;
    using Stride = cutlass::gemm::TagToStrideA_t<cutlass::layout::RowMajor>;
    typename Compressor::Arguments given{};
    given.problem_shape = ProblemShape{m, 1, k, 1};
    given.transform.ptr_A = weight;
    given.transform.dA = cutlass::make_cute_packed_stride(Stride{}, cute::make_shape(m, k, 1));
    given.transform.ptr_ACompress = values;
    given.transform.ptr_E = metadata;
    Status status = Compressor::can_implement(given);
    if (status != Status::kSuccess) return status;
    void* workspace = nullptr;
    if (cudaMalloc(&workspace, Compressor::get_workspace_size(given)) != cudaSuccess) {
      return Status::kErrorMemoryAllocation;
    }
    Compressor compressor;
    status = compressor.run(given, workspace, stream);
    const cudaError_t finished = cudaStreamSynchronize(stream);
    cudaFree(workspace);
    return status == Status::kSuccess && finished != cudaSuccess ? Status::kErrorInternal : status;
  }

  using Utility = cutlass::transform::kernel::StructuredSparseCompressorUtility<
      ProblemShape, Element, cutlass::layout::RowMajor, SparseConfig>;

  // CUTLASS's own count is an int of bits, which the values of 28672 x 14336 inputs exceed.
  static int64_t values_bytes(int m, int k) {
    const Utility utility(ProblemShape{m, 1, k, 1}, {});
    return int64_t{utility.get_tensorA_m_physical()} * utility.get_tensorA_k_physical() * sizeof(Element);
  }

  static int64_t metadata_bytes(int m, int k) {
    return static_cast<int64_t>(Utility(ProblemShape{m, 1, k, 1}, {}).get_tensor_E_bytes());
  }
};

struct Entry {
  const char* name;
  int tile_k;  // kernels with the same one share their metadata
  int64_t (*workspace_bytes)(int m, int n, int k, int swizzle);
  Status (*run)(const Operands&, void* workspace, int m, int n, int k, int swizzle, cudaStream_t);
  Status (*compress)(const void* weight, void* values, void* metadata, int m, int k, cudaStream_t);
  int64_t (*values_bytes)(int m, int k);
  int64_t (*metadata_bytes)(int m, int k);
};

template <int M, int N, int K, int ClusterM, int ClusterN, class Schedule>
constexpr Entry entry(const char* name) {
  using It = Kernel<Shape<Int<M>, Int<N>, Int<K>>, Shape<Int<ClusterM>, Int<ClusterN>, Int<1>>, Schedule>;
  return {name, K, It::workspace_bytes, It::run, It::compress, It::values_bytes, It::metadata_bytes};
}

#define KERNEL(M, N, K, CLUSTER_M, CLUSTER_N, SCHEDULE) \
  entry<M, N, K, CLUSTER_M, CLUSTER_N, SCHEDULE>(#M "x" #N "x" #K ", cluster " #CLUSTER_M "x" #CLUSTER_N ", " #SCHEDULE)

// A cluster of 2x1 reads x once for two blocks of outputs, one of 1x2 the weight once for two of tokens. A warpgroup
// holds sums of 128 x 128 at most in its registers, and cooperative ones need a tile of at least 128 outputs.
constexpr Entry kKernels[] = {
    KERNEL(128, 128, 128, 1, 1, Cooperative),
    KERNEL(128, 128, 128, 2, 1, Cooperative),
    KERNEL(128, 128, 128, 1, 2, Cooperative),
    KERNEL(128, 256, 64, 1, 1, Cooperative),
    KERNEL(128, 256, 64, 2, 1, Cooperative),
    KERNEL(128, 256, 128, 2, 1, Cooperative),
    KERNEL(256, 128, 64, 2, 1, Cooperative),
    KERNEL(256, 128, 128, 1, 1, Cooperative),
    KERNEL(256, 128, 128, 2, 1, Cooperative),
    KERNEL(128, 64, 128, 2, 1, Cooperative),
    KERNEL(128, 128, 128, 2, 1, StreamK),
    KERNEL(128, 256, 64, 2, 1, StreamK),
    KERNEL(256, 128, 128, 2, 1, StreamK),
    KERNEL(128, 128, 64, 2, 1, Pingpong),
    KERNEL(128, 128, 128, 1, 1, Pingpong),
    KERNEL(128, 128, 128, 2, 1, Pingpong),
    KERNEL(64, 256, 128, 2, 1, Pingpong),
    KERNEL(64, 128, 128, 2, 1, Pingpong),
};
constexpr int kCount = sizeof(kKernels) / sizeof(kKernels[0]);

bool known(int kernel) { return kernel >= 0 && kernel < kCount; }

}  // namespace

#define TEXT_OF(symbol) #symbol
#define TEXT(symbol) TEXT_OF(symbol)
#define EXPORT extern "C" __attribute__((visibility("default")))

// Changes with the functions below; whoever loads this compares it first.
EXPORT int cutlass_sparse_interface() { return 1; }

EXPORT const char* cutlass_sparse_version() {
  return TEXT(CUTLASS_MAJOR) "." TEXT(CUTLASS_MINOR) "." TEXT(CUTLASS_PATCH);
}

EXPORT int cutlass_sparse_kernels() { return kCount; }

EXPORT const char* cutlass_sparse_name(int kernel) { return known(kernel) ? kKernels[kernel].name : ""; }

EXPORT int cutlass_sparse_tile_k(int kernel) { return known(kernel) ? kKernels[kernel].tile_k : -1; }

// A status other than 0 in words.
EXPORT const char* cutlass_sparse_status(int status) {
  return cutlass::cutlassGetStatusString(static_cast<Status>(status));
}

// Bytes of the kept values and of the metadata of a weight [m, k], and of the workspace of a product; below 0: unknown.
EXPORT int64_t cutlass_sparse_values_bytes(int kernel, int m, int k) {
  return known(kernel) ? kKernels[kernel].values_bytes(m, k) : -1;
}

EXPORT int64_t cutlass_sparse_metadata_bytes(int kernel, int m, int k) {
  return known(kernel) ? kKernels[kernel].metadata_bytes(m, k) : -1;
}

EXPORT int64_t cutlass_sparse_workspace_bytes(int kernel, int m, int n, int k, int swizzle) {
  return known(kernel) ? kKernels[kernel].workspace_bytes(m, n, k, swizzle) : -1;
}

// weight: bf16 [m, k] on the device, at most two of every four inputs of an output not zero.
EXPORT int cutlass_sparse_compress(int kernel, const void* weight, void* values, void* metadata, int m, int k,
                                   void* stream) {
  if (!known(kernel)) return static_cast<int>(Status::kInvalid);
  return static_cast<int>(
      kKernels[kernel].compress(weight, values, metadata, m, k, static_cast<cudaStream_t>(stream)));
}

// x: bf16 [n, k], y: bf16 [n, m], all on the device and at addresses that are multiples of 16. swizzle: how many tiles
// wide the strips are in which blocks walk over y, at most: 1, 2, 4 or 8.
EXPORT int cutlass_sparse_run(int kernel, const void* values, const void* metadata, const void* x, void* y,
                              void* workspace, int m, int n, int k, int swizzle, void* stream) {
  if (!known(kernel)) return static_cast<int>(Status::kInvalid);
  return static_cast<int>(kKernels[kernel].run({values, metadata, x, y}, workspace, m, n, k, swizzle,
                                               static_cast<cudaStream_t>(stream)));
}
