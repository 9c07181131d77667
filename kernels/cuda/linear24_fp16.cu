// linear24.cuh for float16.
#include "linear24.cuh"

namespace sparsert::linear24_detail {

const Config* const kFloat16Configs = kConfigs<__half>;

}  // namespace sparsert::linear24_detail
