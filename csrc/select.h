// Which tile of linear24 runs a problem.
#pragma once

#include "../kernels/cuda/api.h"

namespace sparsert {

struct DeviceFacts {
  int multiprocessors;
  int capability;  // 90 for compute capability 9.0
};

// Of the current CUDA device; asked for once per device.
DeviceFacts current_device_facts();

// M is at most linear24_max_batch(). Gated: a tile of at least a gate and its factor, 32 outputs.
Linear24Choice select_linear24(int M, int N, int K, const DeviceFacts& device, bool gated = false);

// For a Hopper GPU, with or without a gate.
Gemm24Choice select_gemm24(int M, int N, int K, const DeviceFacts& device);

// For any GPU from sm_80.
Gemm24MmaChoice select_gemm24_mma(int M, int N, int K, const DeviceFacts& device);

// For tuning: from now on a layer of this shape runs this way at batches up to `batch` (one of the table's) and above
// the next smaller one. config -1 forgets it.
void override_linear24(int N, int K, int batch, int config, int splits);

}  // namespace sparsert
