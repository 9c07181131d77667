// Host entry points of the CUDA kernels: raw pointers, sizes, a stream. No torch, no Python.
// Every function returns a cudaError_t as int; 0 is success.
#pragma once

#include <cstdint>

namespace sparsert {

enum class DType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

struct Linear24Arguments {
  const void* values;        // [row tile][block][lane][8], 16-bit
  const uint32_t* metadata;  // see layout.cuh
  const void* x;             // [M, K], row stride ldx elements
  const void* bias;          // [N] or null
  void* y;                   // [M, N], row-major, contiguous
  int M, N, K;               // M <= 64
  int64_t ldx;
  DType dtype;               // bf16 or fp16, of values, x, bias and y alike
};

// Which instantiation runs a problem, and over how many blocks of a cluster the inputs are split.
struct Linear24Choice {
  int config;
  int splits;
};

int linear24_config_count();
const char* linear24_config_name(int config);
// The largest batch that the kernel takes.
int linear24_max_batch();
int linear24(const Linear24Arguments& arguments, Linear24Choice choice, bool dependent_launch, void* stream);

struct Pack24Arguments {
  const void* dense;   // [N, K], row stride ld elements
  const uint8_t* mask; // [N, K] contiguous, non-zero keeps; null: non-zero weights are kept
  void* values;
  uint32_t* metadata;
  long long* stats;    // {groups that keep three or four, flat index of the first}; {0, LLONG_MAX} before the call
  int N, K;
  int64_t ld;
  DType dtype;
};
int pack24(const Pack24Arguments& arguments, void* stream);

struct Unpack24Arguments {
  const void* values;
  const uint32_t* metadata;
  void* dense;  // [N, K] contiguous
  int N, K;
  DType dtype;
};
int unpack24(const Unpack24Arguments& arguments, void* stream);

}  // namespace sparsert
