// y = x W^T straight from a packed 2:4 weight, on the CPU, for a few rows of x.
#pragma once

#include <cstdint>

namespace sparsert {

// x [batch, columns] and y [batch, rows] are contiguous fp32; values are `dtype` as in kernels/cuda/api.h.
// `portable` leaves out what only some processors have; tests compare the two.
void linear24_cpu(const void* values, const uint32_t* metadata, const float* x, float* y, int64_t batch, int64_t rows,
                  int64_t columns, int dtype, int threads, bool portable);

}  // namespace sparsert
