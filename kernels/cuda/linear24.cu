// The host's side of linear24.cuh: checks, arguments, and the launch of the chosen tile.

#include "linear24.cuh"

namespace sparsert {

using namespace linear24_detail;

int linear24_config_count() { return kConfigCount; }
const char* linear24_config_name(int config) { return kBFloat16Configs[config].name; }
int linear24_config_outputs(int config) { return kBFloat16Configs[config].outputs; }
int linear24_max_batch() { return 64; }
int linear24_blocks(Linear24Choice choice, int N) {
  const int outputs = kBFloat16Configs[choice.config].outputs;
  return (N + outputs - 1) / outputs * choice.splits;
}

int linear24(const Linear24Arguments& a, Linear24Choice choice, bool dependent_launch, void* stream) {
  if (a.M < 1 || a.M > linear24_max_batch() || a.N < 1 || a.K < 4 || a.K % 4 != 0) return cudaErrorInvalidValue;
  if (choice.config < 0 || choice.config >= linear24_config_count() || choice.splits < 1 || choice.splits > kMaxSplits ||
      a.dtype == DType::kFloat32)
    return cudaErrorInvalidValue;
  if (a.gated && (a.N % (2 * kRowTile) != 0 || linear24_config_outputs(choice.config) % (2 * kRowTile) != 0))
    return cudaErrorInvalidValue;
  if (a.residual != nullptr && (a.N % 8 != 0 || a.gated || a.activation != Activation::kNone))
    return cudaErrorInvalidValue;
  const int width = a.gated ? a.N / 2 : a.N;
  if ((a.x_tiled || a.y_tiled) && a.M > kMaxTiledRows) return cudaErrorInvalidValue;
  if ((a.x_tiled && (a.K % kUnit != 0 || reinterpret_cast<uintptr_t>(a.x) % 16 != 0)) ||
      (a.y_tiled && width % kUnit != 0))
    return cudaErrorInvalidValue;
  const auto x_address = reinterpret_cast<uintptr_t>(a.x);
  if (x_address % 8 != 0 || a.ldx % 4 != 0) return cudaErrorMisalignedAddress;

  KernelArguments arguments;
  arguments.values = static_cast<const char*>(a.values);
  arguments.metadata = reinterpret_cast<const char*>(a.metadata);
  arguments.x = static_cast<const char*>(a.x);
  arguments.bias = a.bias;
  arguments.y = a.y;
  arguments.M = a.M;
  arguments.N = a.N;
  arguments.K = a.K;
  arguments.ldx_bytes = a.ldx * 2;
  arguments.row_tiles = (a.N + kRowTile - 1) / kRowTile;
  arguments.units = (a.K + kUnit - 1) / kUnit;
  arguments.splits = choice.splits;
  arguments.activation = a.activation;
  arguments.gated = a.gated;
  arguments.squares_in = a.squares_in;
  arguments.squares_parts = a.squares_parts;
  arguments.residual = a.residual;
  arguments.norm_weight = a.norm_weight;
  arguments.weighted = a.weighted;
  arguments.squares_out = a.squares_out;
  arguments.eps = a.eps;
  arguments.x_wide = x_address % 16 == 0 && a.ldx % 8 == 0 && a.K % 8 == 0;
  // Above 16 rows the copy engine's one request a row takes longer than 32 lanes with 16 bytes each (H100: 4096x4096
  // at batch 64 16.9 us against 15.9, 28672x4096 66 against 53).
  arguments.x_bulk = a.x_tiled || (arguments.x_wide && a.K % kUnit == 0 && a.M <= 16);
  arguments.x_tiled = a.x_tiled;
  arguments.y_tiled = a.y_tiled;
  const int batch = a.M <= 8 ? 0 : a.M <= 16 ? 1 : a.M <= 32 ? 2 : 3;
  const Launcher launcher = (a.dtype == DType::kBFloat16 ? kBFloat16Configs : kFloat16Configs)[choice.config].launchers[batch];
  if (launcher == nullptr) return cudaErrorInvalidConfiguration;
  return launcher(arguments, choice.splits, dependent_launch, static_cast<cudaStream_t>(stream));
}

}  // namespace sparsert
