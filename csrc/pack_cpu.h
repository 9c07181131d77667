// Pack and unpack 2:4 weights on the CPU, with threads. Same bytes as kernels/cuda/pack24.cu.
#pragma once

#include <cstdint>

namespace sparsert {

// Element size in bytes: 2 (bf16, fp16) or 4 (fp32). `stats` as in kernels/cuda/api.h.
void pack24_cpu(const void* dense, const uint8_t* mask, void* values, uint32_t* metadata, int64_t* stats, int64_t rows,
                int64_t columns, int64_t row_stride, int element_size, int threads);

void unpack24_cpu(const void* values, const uint32_t* metadata, void* dense, int64_t rows, int64_t columns,
                  int element_size, int threads);

}  // namespace sparsert
