// gemm24.cuh for float16.
#include "gemm24.cuh"

namespace sparsert::gemm24_detail {

const Config* const kFloat16Configs = kConfigs<__half>;

}  // namespace sparsert::gemm24_detail
