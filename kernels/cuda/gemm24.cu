// The host's side of gemm24.cuh: checks, the tensor map, and the launch of the chosen config.

#include "gemm24.cuh"

#include <algorithm>

namespace sparsert {

using namespace gemm24_detail;

namespace {

// From the driver that torch has loaded; linking against it would tie the module to machines that have one.
PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result) !=
            cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

}  // namespace

int gemm24_config_count() { return kConfigCount; }
const char* gemm24_config_name(int config) { return kBFloat16Configs[config].name; }
int gemm24_config_outputs(int config) { return kBFloat16Configs[config].outputs; }
int gemm24_config_tokens(int config) { return kBFloat16Configs[config].tokens; }
bool gemm24_config_splits(int config) { return kBFloat16Configs[config].split; }
bool gemm24_config_takes(int config, Activation activation, bool gated) {
  return kBFloat16Configs[config].split || (gated ? activation == Activation::kSilu : activation == Activation::kNone);
}

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
  if (!gemm24_config_takes(choice.config, a.activation, a.gated)) return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(a.x) % 16 != 0 || a.ldx % 8 != 0) return cudaErrorMisalignedAddress;
  const PFN_cuTensorMapEncodeTiled_v12000 encode = tensor_map_encoder();
  if (encode == nullptr) return cudaErrorNotSupported;

  KernelArguments arguments;
  const cuuint64_t sizes[] = {cuuint64_t(a.K), cuuint64_t(a.M)}, strides[] = {cuuint64_t(a.ldx) * 2};
  const cuuint32_t box[] = {kUnit, cuuint32_t(config.tokens / (config.split ? 1 : choice.cluster))}, steps[] = {1, 1};
  const CUtensorMapDataType type =
      a.dtype == DType::kBFloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  if (encode(&arguments.x, type, 2, const_cast<void*>(a.x), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) !=
      CUDA_SUCCESS)
    return cudaErrorInvalidValue;
  arguments.values = static_cast<const char*>(a.values);
  arguments.metadata = reinterpret_cast<const char*>(a.metadata);
  arguments.bias = a.bias;
  arguments.y = a.y;
  arguments.M = a.M;
  arguments.N = a.N;
  arguments.row_tiles = (a.N + kRowTile - 1) / kRowTile;
  arguments.units = (a.K + kUnit - 1) / kUnit;
  arguments.token_tiles = (a.M + config.tokens - 1) / config.tokens;
  arguments.cluster = choice.cluster;
  arguments.activation = a.activation;
  arguments.gated = a.gated;
  const int groups = (a.N + config.outputs - 1) / config.outputs;
  const int sharers = config.split ? 1 : choice.cluster;  // blocks of a cluster that have outputs of their own
  arguments.group_sets = (groups + sharers - 1) / sharers;
  const int tiles = arguments.group_sets * arguments.token_tiles, room = multiprocessors / choice.cluster;
  int clusters = config.split || tiles < room ? tiles : room;
  arguments.shared_tiles = 0;
  if (choice.even) {
    if (config.split || config.outputs != kRowTile * kWarps || a.workspace == nullptr) return cudaErrorInvalidValue;
    clusters = room;
    // the last round and, if there is one, the round before it: everybody then has at least a tile's work
    arguments.shared_tiles = tiles < room ? tiles : tiles % room == 0 ? 0 : tiles % room + room;
    arguments.partial_sums = static_cast<float*>(a.workspace);
    arguments.marks = reinterpret_cast<unsigned long long*>(static_cast<char*>(a.workspace) +
                                                            int64_t(room) * choice.cluster * config.outputs * config.tokens * 4);
  }
  return (a.gated ? config.gated_launcher : config.launcher)(arguments, clusters * choice.cluster, dependent_launch,
                                                             static_cast<cudaStream_t>(stream));
}

}  // namespace sparsert
