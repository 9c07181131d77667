// Host entry points of the CUDA kernels: raw pointers, sizes, a stream. No torch, no Python.
// Every function returns a cudaError_t as int; 0 is success.
#pragma once

#include <cstdint>

namespace sparsert {

enum class DType : int { kBFloat16 = 0, kFloat16 = 1, kFloat32 = 2 };

enum class Activation : int { kNone = -1, kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu2 = 3 };

// Activations of more than a few batch rows can be stored in tiles instead of rows: [K / 32][batch tile][k / 8 % 4]
// [row % 8][k % 8], with as many batch tiles of 8 rows as activation_tiles() says. A chunk of inputs is then contiguous
// whatever the batch, one copy instead of one a row, and a 16-byte piece is a row of an ldmatrix. K is a multiple of 64;
// rows past the batch are never looked at.
constexpr int kMaxTiledRows = 16;
constexpr int activation_tiles(int rows) { return rows <= 8 ? 1 : 2; }

struct Linear24Arguments {
  const void* values;        // [row tile][block][lane][8], 16-bit
  const uint32_t* metadata;  // see layout.cuh
  const void* x;             // [M, K], row stride ldx elements
  const void* bias;          // [N] or null
  void* y;                   // [M, N], row-major, contiguous
  int M, N, K;               // M <= 64
  int64_t ldx;
  DType dtype;               // bf16 or fp16, of values, x, bias and y alike
  // y = activation(sum + bias). Gated: row tiles of W are a gate's and the other factor's in turn, N is both together,
  // y is [M, N / 2] = activation(gate) * factor, and N is a multiple of 32.
  Activation activation = Activation::kNone;
  bool gated = false;
  bool x_tiled = false;  // x is in tiles; ldx is not looked at
  // y is written in tiles, or weighted if there is a residual; N (N / 2 if gated) is a multiple of 64.
  bool y_tiled = false;
  // The division of an RMSNorm that the layer before left to this one: x is the stream times the norm's weight, and the
  // result of each batch row is scaled by 1 / sqrt(sum of its parts / K + eps), before the bias.
  const float* squares_in = nullptr;  // [M, squares_parts]
  int squares_parts = 0;
  float eps = 0;
  // The other end of it: y = residual + sum + bias is the new stream, weighted = y * norm_weight the next layer's x, and
  // squares_out its parts, one a block. N is a multiple of 8; no activation. All null, or none.
  const void* residual = nullptr;     // [M, N]
  const void* norm_weight = nullptr;  // [N]
  void* weighted = nullptr;           // [M, N]
  float* squares_out = nullptr;       // [M, linear24_blocks()]
};

// Which instantiation runs a problem, and over how many blocks of a cluster the inputs are split.
struct Linear24Choice {
  int config;
  int splits;
};

int linear24_config_count();
const char* linear24_config_name(int config);
int linear24_config_outputs(int config);
// Blocks of a launch.
int linear24_blocks(Linear24Choice choice, int N);
// The largest batch that the kernel takes.
int linear24_max_batch();
int linear24(const Linear24Arguments& arguments, Linear24Choice choice, bool dependent_launch, void* stream);

// Prompts and large batches.
struct Gemm24Arguments {
  const void* values;        // as in Linear24Arguments
  const uint32_t* metadata;
  const void* x;             // [M, K], 16-byte aligned, row stride ldx elements, a multiple of 8
  const void* bias;          // [N] or null
  void* y;                   // [M, N], or [M, N / 2] if gated; row-major, contiguous
  int M, N, K;               // K a multiple of 8
  int64_t ldx;
  DType dtype;               // bf16 or fp16, of values, x, bias and y alike
  Activation activation = Activation::kNone;
  bool gated = false;        // as in Linear24Arguments; N is a multiple of 32
  // gemm24_workspace_bytes() or gemm24_mma_workspace_bytes(), 16-byte aligned, of any content; must not be shared with a
  // launch that may run at a time with this one.
  void* workspace = nullptr;
};

// On a Hopper GPU: which instantiation, and how many blocks make a cluster: by some configs they share activations, by
// others the inputs are split over them.
struct Gemm24Choice {
  int config;
  int cluster;
  bool even;  // the inputs are dealt out evenly (stream-K); configs with 128 outputs, at most 8 tiles of tokens
};

int gemm24_config_count();
const char* gemm24_config_name(int config);
int gemm24_config_outputs(int config);
int gemm24_config_tokens(int config);
bool gemm24_config_splits(int config);  // the others want rows of y whose bytes are a multiple of 16
int64_t gemm24_workspace_bytes(Gemm24Choice choice, int multiprocessors);
int gemm24(const Gemm24Arguments& arguments, Gemm24Choice choice, int multiprocessors, bool dependent_launch, void* stream);

// On any GPU from sm_80: which instantiation, and over how many blocks the inputs are split, at most one a 256 inputs.
struct Gemm24MmaChoice {
  int config;
  int splits;
};

int gemm24_mma_config_count();
const char* gemm24_mma_config_name(int config);
int gemm24_mma_config_outputs(int config);
int gemm24_mma_config_tokens(int config);
int64_t gemm24_mma_workspace_bytes(Gemm24MmaChoice choice, int M, int N);
// y is 16-byte aligned; no activation, or SiLU with a gate.
int gemm24_mma(const Gemm24Arguments& arguments, Gemm24MmaChoice choice, void* stream);

struct DenseLinearArguments {
  const void* weight;  // [N, K] contiguous
  const void* x;       // [M, K], row stride ldx elements, 16-byte aligned rows
  const void* bias;    // [N] or null
  void* y;             // [M, N] contiguous
  int M, N, K;         // M <= dense_linear_max_batch(), K a multiple of 8
  int64_t ldx;
  DType dtype;         // bf16 or fp16
};
int dense_linear_max_batch();
int dense_linear(const DenseLinearArguments& arguments, bool dependent_launch, void* stream);

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

struct Pack24BitmaskArguments {
  const void* compressed;  // [N, K / 2], two kept values of every group in column order; a pair is aligned
  const uint8_t* bitmask;  // [N, ceil(K / 8)], bit j of byte c is column 8 c + j
  void* values;
  uint32_t* metadata;
  int* bad;  // 0 before the call; above 0 after it if some group does not have two bits, or bits follow the last column
  int N, K;
  DType dtype;
};
int pack24_bitmask(const Pack24BitmaskArguments& arguments, void* stream);

struct Unpack24Arguments {
  const void* values;
  const uint32_t* metadata;
  void* dense;  // [N, K] contiguous
  int N, K;
  DType dtype;
};
int unpack24(const Unpack24Arguments& arguments, void* stream);

// stream = residual + (post_weight ? norm(x) * post_weight : x); normed = norm(stream) * weight + bias.
struct ResidualNormArguments {
  const void* x;            // [rows, width]
  const void* residual;     // like x, or null: the stream is x
  const void* weight;       // [width], float or dtype
  const void* bias;         // [width] in the weight's type, or null
  const void* post_weight;  // [width] in the weight's type, or null
  void* stream_out;         // [rows, width]; null when it is x itself
  void* normed;             // [rows, width]
  int rows, width;          // width: multiple of 8, at most residual_norm_max_width()
  float eps;
  bool centered;            // LayerNorm
  bool weight_is_float;
  DType dtype;              // bf16 or fp16
};
int residual_norm_max_width();
int residual_norm(const ResidualNormArguments& arguments, bool dependent_launch, void* stream);

struct ActivateArguments {
  const void* x;   // [rows, gated ? 2 * width : width]: gate, then up
  void* y;         // [rows, width]
  int rows, width; // width: multiple of 8
  Activation kind;
  bool gated;
  bool interleaved;  // 16 values of the gate, 16 of the other factor, and so on; width is a multiple of 16
  DType dtype;       // bf16 or fp16
};
int activate(const ActivateArguments& arguments, bool dependent_launch, void* stream);

// Queries and keys of prompts are normed and rotated where they stand; keys and values are kept in a cache.
struct PromptHeadsArguments {
  void* heads;                 // [tokens, num_heads + 2 * num_kv_heads, head_dim]; values are not changed
  void* keys;                  // [rows, num_kv_heads, cache_length, head_dim]
  void* values;
  const long long* rows;       // [tokens], of the cache
  const long long* positions;  // [tokens], of the cache
  const void* cosine;          // [tokens, rotary_dim]
  const void* signed_sine;
  const void* q_norm;          // [head_dim], or null
  const void* k_norm;
  int64_t cache_length;
  int tokens, num_heads, num_kv_heads, head_dim, rotary_dim;
  float norm_eps;
  bool norm_is_float;          // q_norm and k_norm are float instead of dtype
  DType dtype;                 // bf16 or fp16, of everything else; addresses are multiples of 16 bytes
};
bool prompt_heads_takes(int head_dim, int rotary_dim);
int prompt_heads(const PromptHeadsArguments& arguments, bool dependent_launch, void* stream);

struct DecodeAttentionArguments {
  const void* heads;         // [batch, num_heads + 2 * num_kv_heads, head_dim], row stride heads_stride elements
  void* keys;                // [rows >= batch, num_kv_heads, cache_length, head_dim], 16-byte aligned
  void* values;
  const long long* lengths;  // [batch], tokens in the cache before this one
  const void* cosine;        // [positions, rotary_dim]
  const void* signed_sine;
  const void* q_norm;        // [head_dim], or null
  const void* k_norm;
  void* out;                 // [batch, num_heads, head_dim]
  int64_t heads_stride, cache_length;
  int batch, num_heads, num_kv_heads, head_dim, rotary_dim;
  int sliding_window;        // 0: none
  float scale, softcap;      // softcap 0: none
  float norm_eps;
  bool norm_is_float;        // q_norm and k_norm are float instead of dtype
  bool out_tiled;            // out as activation_tiles() has it, with num_heads * head_dim values a row
  bool settled;              // lengths and earlier positions were written before the preceding kernel began
  DType dtype;               // bf16 or fp16, of everything else
};
bool decode_attention_takes(int head_dim);
// Warps of a block (4 or 8), and over how many blocks of a cluster the context is split.
struct DecodeAttentionChoice {
  int warps;
  int splits;
};
// window: positions that there may be.
DecodeAttentionChoice select_decode_attention(int batch, int num_heads, int num_kv_heads, int head_dim, int window,
                                              int multiprocessors, bool clusters);
int decode_attention(const DecodeAttentionArguments& arguments, DecodeAttentionChoice choice, bool dependent_launch,
                     void* stream);

}  // namespace sparsert
