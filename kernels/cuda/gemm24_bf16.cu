// gemm24.cuh for bfloat16.
#include "gemm24.cuh"

namespace sparsert::gemm24_detail {

const Config* const kBFloat16Configs = kConfigs<__nv_bfloat16>;
const int kConfigCount = sizeof(kConfigs<__nv_bfloat16>) / sizeof(Config);

}  // namespace sparsert::gemm24_detail
