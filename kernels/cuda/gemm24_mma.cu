// The host's side of gemm24_mma.cuh: checks, and the launch of the chosen config.

#include "gemm24_mma.cuh"

namespace sparsert {

using namespace gemm24_mma_detail;

namespace {

constexpr int kConfigCount = sizeof(kConfigs<__nv_bfloat16>) / sizeof(Config);
constexpr int kMaxGridRows = 65535;

}  // namespace

int gemm24_mma_config_count() { return kConfigCount; }
const char* gemm24_mma_config_name(int config) { return kConfigs<__nv_bfloat16>[config].name; }
int gemm24_mma_config_outputs(int config) { return kConfigs<__nv_bfloat16>[config].outputs; }
int gemm24_mma_config_tokens(int config) { return kConfigs<__nv_bfloat16>[config].tokens; }
int64_t gemm24_mma_workspace_bytes(Gemm24MmaChoice choice, int M, int N) {
  return choice.splits == 1 ? 0 : int64_t(choice.splits) * M * ((N + kRowTile - 1) / kRowTile * kRowTile) * 4;
}

int gemm24_mma(const Gemm24Arguments& a, Gemm24MmaChoice choice, void* stream) {
  if (a.M < 1 || a.N < 1 || a.K < 8 || a.K % 8 != 0 || a.dtype == DType::kFloat32) return cudaErrorInvalidValue;
  if (choice.config < 0 || choice.config >= kConfigCount) return cudaErrorInvalidValue;
  if (a.activation != (a.gated ? Activation::kSilu : Activation::kNone)) return cudaErrorInvalidValue;
  if (a.gated && a.N % (2 * kRowTile) != 0) return cudaErrorInvalidValue;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.y);
  if (addresses % 16 != 0 || a.ldx % 8 != 0) return cudaErrorMisalignedAddress;

  const Config& config = (a.dtype == DType::kBFloat16 ? kConfigs<__nv_bfloat16> : kConfigs<__half>)[choice.config];
  KernelArguments arguments;
  arguments.values = static_cast<const char*>(a.values);
  arguments.metadata = reinterpret_cast<const char*>(a.metadata);
  arguments.x = static_cast<const char*>(a.x);
  arguments.bias = a.bias;
  arguments.y = a.y;
  arguments.parts = static_cast<float*>(a.workspace);
  arguments.M = a.M;
  arguments.N = a.N;
  arguments.K = a.K;
  arguments.ldx_bytes = a.ldx * 2;
  arguments.row_tiles = (a.N + kRowTile - 1) / kRowTile;
  arguments.units = (a.K + kUnit - 1) / kUnit;
  arguments.groups = (a.N + config.outputs - 1) / config.outputs;
  arguments.token_tiles = (a.M + config.tokens - 1) / config.tokens;
  arguments.splits = choice.splits;
  arguments.gated = a.gated;
  const int chunks = (arguments.units + kUnitsPerChunk - 1) / kUnitsPerChunk;
  if (choice.splits < 1 || choice.splits > std::min(chunks, kMaxGridRows)) return cudaErrorInvalidValue;
  if (choice.splits > 1 && (a.workspace == nullptr || reinterpret_cast<uintptr_t>(a.workspace) % 16 != 0))
    return cudaErrorInvalidValue;
  return config.launcher(arguments, static_cast<cudaStream_t>(stream));
}

}  // namespace sparsert
