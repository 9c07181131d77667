// Activation functions, in float.
#pragma once

#include "api.h"

namespace sparsert {

__device__ __forceinline__ float activation(Activation kind, float v) {
  switch (kind) {
    case Activation::kNone: return v;
    case Activation::kSilu: return v / (1 + __expf(-v));
    case Activation::kGelu: return 0.5f * v * (1 + erff(v * 0.70710678118654752f));
    case Activation::kGeluTanh: return 0.5f * v * (1 + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case Activation::kRelu2: return v > 0 ? v * v : 0;
  }
  return v;
}

}  // namespace sparsert
