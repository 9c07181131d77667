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

__device__ __forceinline__ void activate(Activation kind, float4& v) {
  if (kind == Activation::kNone) return;
  v.x = activation(kind, v.x);
  v.y = activation(kind, v.y);
  v.z = activation(kind, v.z);
  v.w = activation(kind, v.w);
}
// v times the activated gate.
__device__ __forceinline__ void multiply_gate(Activation kind, float4& v, const float4& gate) {
  v.x *= activation(kind, gate.x);
  v.y *= activation(kind, gate.y);
  v.z *= activation(kind, gate.z);
  v.w *= activation(kind, gate.w);
}

}  // namespace sparsert
