// The host's side of gemm24.cuh: checks, the tensor map, and the launch of the chosen config.

#include "gemm24.cuh"

#include <cudaTypedefs.h>

#include <algorithm>
#include <initializer_list>

namespace sparsert {

using namespace gemm24_detail;

namespace {

// From the driver that torch has loaded; linking against it would tie the module to machines that have one.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// All take SiLU with a gate and no activation without one; where inputs are split, others too.
bool takes(const Config& config, Activation activation, bool gated) {
  return config.split || (gated ? activation == Activation::kSilu : activation == Activation::kNone);
}

}  // namespace

int gemm24_config_count() { return kConfigCount; }
const char* gemm24_config_name(int config) { return kBFloat16Configs[config].name; }
int gemm24_config_outputs(int config) { return kBFloat16Configs[config].outputs; }
int gemm24_config_tokens(int config) { return kBFloat16Configs[config].tokens; }
bool gemm24_config_splits(int config) { return kBFloat16Configs[config].split; }
int64_t gemm24_workspace_bytes(Gemm24Choice choice, int multiprocessors) {
  if (!choice.even) return 0;
  const Config& config = kBFloat16Configs[choice.config];
  const int64_t blocks = multiprocessors / choice.cluster * choice.cluster;
  return blocks * config.outputs * config.tokens * 4 + blocks * 8;
}

int gemm24(const Gemm24Arguments& a, Gemm24Choice choice, int multiprocessors, bool dependent_launch, void* stream) {
  if (a.M < 1 || a.N < 1 || a.K < 8 || a.K % 8 != 0 || a.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  if (choice.config < 0 || choice.config >= kConfigCount || choice.cluster < 1) return cudaErrorInvalidValue;
  const Config& config = (a.dtype == DType::kBFloat16 ? kBFloat16Configs : kFloat16Configs)[choice.config];
  if (choice.cluster > (config.split ? kMaxSplits : kMaxSharers)) return cudaErrorInvalidValue;
  if (a.gated && a.N % (2 * kRowTile) != 0) return cudaErrorInvalidValue;
  if (!takes(config, a.activation, a.gated)) return cudaErrorInvalidValue;
  for (const void* address : {a.x, a.values, static_cast<const void*>(a.metadata)})
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0) return cudaErrorMisalignedAddress;
  if (a.ldx % 8 != 0) return cudaErrorMisalignedAddress;
  const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;

  // Boxes of a tensor whose innermost dimension comes first; `strides` in bytes, of the other dimensions.
  auto map = [&](CUtensorMap& to, CUtensorMapDataType type, const void* address, std::initializer_list<cuuint64_t> sizes,
                 std::initializer_list<cuuint64_t> strides, std::initializer_list<cuuint32_t> box, CUtensorMapSwizzle swizzle) {
    constexpr cuuint32_t kSteps[] = {1, 1, 1};
    return encode(&to, type, cuuint32_t(sizes.size()), const_cast<void*>(address), sizes.begin(), strides.begin(), box.begin(),
                  kSteps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
  };
  // Rows of 16-bit numbers in boxes of `rows` rows and `columns` columns, which are the bytes of a swizzle.
  const CUtensorMapDataType type =
      a.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  auto map_rows = [&](CUtensorMap& to, const void* address, int64_t width, int64_t stride, int columns, int rows) {
    return map(to, type, address, {cuuint64_t(width), cuuint64_t(a.M)}, {cuuint64_t(stride) * 2},
               {cuuint32_t(columns), cuuint32_t(rows)}, columns == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
  };
  KernelArguments arguments;
  const cuuint64_t row_tiles = (a.N + kRowTile - 1) / kRowTile, units = (a.K + kUnit - 1) / kUnit;
  const cuuint32_t block_tiles = config.outputs / kRowTile;
  if (!map_rows(arguments.x, a.x, a.K, a.ldx, kUnit, config.tokens / (config.split ? 1 : choice.cluster)) ||
      !map(arguments.values, type, a.values, {256, units * 2, row_tiles}, {512, units * kUnitValueBytes}, {256, 2, block_tiles},
           CU_TENSOR_MAP_SWIZZLE_NONE) ||
      !map(arguments.metadata, CU_TENSOR_MAP_DATA_TYPE_UINT32, a.metadata, {units * kMetadataUnitWords, row_tiles},
           {units * kMetadataUnitBytes}, {kUnitsPerChunk * kMetadataUnitWords, block_tiles}, CU_TENSOR_MAP_SWIZZLE_NONE))
    return cudaErrorInvalidValue;
  if (!config.split) {
    const int width = a.gated ? a.N / 2 : a.N;
    const bool half = a.gated && config.outputs == kRowTile * kWarps;  // a warpgroup's 64 outputs are 32 pairs
    if (width % 8 != 0 || reinterpret_cast<uintptr_t>(a.y) % 16 != 0) return cudaErrorMisalignedAddress;
    if (!map_rows(arguments.y_map, a.y, width, width, half ? 32 : 64, kStagedTokens)) return cudaErrorInvalidValue;
  }
  arguments.bias = a.bias;
  arguments.y = a.y;
  arguments.M = a.M;
  arguments.N = a.N;
  arguments.units = static_cast<int>(units);
  arguments.token_tiles = (a.M + config.tokens - 1) / config.tokens;
  arguments.cluster = choice.cluster;
  arguments.activation = a.activation;
  arguments.gated = a.gated;
  const int groups = (a.N + config.outputs - 1) / config.outputs;
  const int sharers = config.split ? 1 : choice.cluster;  // blocks of a cluster that have outputs of their own
  arguments.group_sets = (groups + sharers - 1) / sharers;
  const int tiles = arguments.group_sets * arguments.token_tiles, room = multiprocessors / choice.cluster;
  int clusters = config.split || tiles < room ? tiles : room;
  arguments.teams = 0;
  if (choice.even) {
    if (config.split || config.outputs != kRowTile * kWarps || a.workspace == nullptr ||
        arguments.token_tiles > kRaster)
      return cudaErrorInvalidValue;
    clusters = room;
    arguments.teams = room / arguments.token_tiles;
    arguments.partial_sums = static_cast<float*>(a.workspace);
    arguments.marks = reinterpret_cast<unsigned long long*>(static_cast<char*>(a.workspace) +
                                                            int64_t(room) * choice.cluster * config.outputs * config.tokens * 4);
  }
  return (a.gated ? config.gated_launcher : config.launcher)(arguments, clusters * choice.cluster, dependent_launch,
                                                             static_cast<cudaStream_t>(stream));
}

}  // namespace sparsert
