// The Python module sparsert._C. It takes addresses, sizes and a stream as integers, so it depends on no version of
// torch; sparsert/ops checks tensors before it calls.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "linear_cpu.h"
#include "pack_cpu.h"
#ifdef SPARSERT_CUDA
#include <cuda_runtime_api.h>

#include "../kernels/cuda/api.h"
#include "select.h"
#endif

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void pack24_cpu(uintptr_t dense, uintptr_t mask, uintptr_t values, uintptr_t metadata, uintptr_t stats, int64_t rows,
                int64_t columns, int64_t row_stride, int dtype, int threads) {
  py::gil_scoped_release release;
  sparsert::pack24_cpu(pointer<void>(dense), pointer<uint8_t>(mask), pointer<void>(values), pointer<uint32_t>(metadata),
                       pointer<int64_t>(stats), rows, columns, row_stride, dtype == 2 ? 4 : 2, threads);
}

void unpack24_cpu(uintptr_t values, uintptr_t metadata, uintptr_t dense, int64_t rows, int64_t columns, int dtype,
                  int threads) {
  py::gil_scoped_release release;
  sparsert::unpack24_cpu(pointer<void>(values), pointer<uint32_t>(metadata), pointer<void>(dense), rows, columns,
                         dtype == 2 ? 4 : 2, threads);
}

void linear24_cpu(uintptr_t values, uintptr_t metadata, uintptr_t x, uintptr_t y, int64_t batch, int64_t rows,
                  int64_t columns, int dtype, int threads, bool portable) {
  py::gil_scoped_release release;
  sparsert::linear24_cpu(pointer<void>(values), pointer<uint32_t>(metadata), pointer<float>(x), pointer<float>(y),
                         batch, rows, columns, dtype, threads, portable);
}

#ifdef SPARSERT_CUDA
void check(int error, const char* what) {
  if (error != 0) {
    const auto code = static_cast<cudaError_t>(error);
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code));
  }
}

void linear24_cuda(uintptr_t values, uintptr_t metadata, uintptr_t x, uintptr_t bias, uintptr_t y, int M, int N, int K,
                   int64_t ldx, int dtype, uintptr_t stream) {
  const sparsert::Linear24Arguments arguments{pointer<void>(values), pointer<uint32_t>(metadata), pointer<void>(x),
                                              pointer<void>(bias),   pointer<void>(y),            M, N, K, ldx,
                                              static_cast<sparsert::DType>(dtype)};
  const sparsert::DeviceFacts device = sparsert::current_device_facts();
  check(sparsert::linear24(arguments, sparsert::select_linear24(M, N, K, device), device.capability >= 90,
                           pointer<void>(stream)),
        "linear24");
}

// A layer inside a decode step: an activation behind it, a norm's division in front of it, or the end of a sub-block.
void linear24_step_cuda(uintptr_t values, uintptr_t metadata, uintptr_t x, uintptr_t bias, uintptr_t y, int M, int N,
                        int K, int64_t ldx, int activation, bool gated, uintptr_t squares_in, int squares_parts,
                        float eps, uintptr_t residual, uintptr_t norm_weight, uintptr_t weighted, uintptr_t squares_out,
                        bool x_tiled, bool y_tiled, int dtype, uintptr_t stream) {
  sparsert::Linear24Arguments arguments{pointer<void>(values), pointer<uint32_t>(metadata), pointer<void>(x),
                                        pointer<void>(bias),   pointer<void>(y),            M, N, K, ldx,
                                        static_cast<sparsert::DType>(dtype)};
  arguments.activation = static_cast<sparsert::Activation>(activation);
  arguments.gated = gated;
  arguments.squares_in = pointer<float>(squares_in);
  arguments.squares_parts = squares_parts;
  arguments.eps = eps;
  arguments.residual = pointer<void>(residual);
  arguments.norm_weight = pointer<void>(norm_weight);
  arguments.weighted = pointer<void>(weighted);
  arguments.squares_out = pointer<float>(squares_out);
  arguments.x_tiled = x_tiled;
  arguments.y_tiled = y_tiled;
  const sparsert::DeviceFacts device = sparsert::current_device_facts();
  check(sparsert::linear24(arguments, sparsert::select_linear24(M, N, K, device, gated), device.capability >= 90,
                           pointer<void>(stream)),
        "linear24");
}

// named: (config, cluster, even) instead of the chosen one, for tuning and for tests that cover every config.
sparsert::Gemm24Choice gemm24_choice(int M, int N, int K, const std::optional<std::tuple<int, int, bool>>& named) {
  if (!named) return sparsert::select_gemm24(M, N, K, sparsert::current_device_facts());
  return {std::get<0>(*named), std::get<1>(*named), std::get<2>(*named)};
}

int64_t gemm24_workspace(int M, int N, int K, const std::optional<std::tuple<int, int, bool>>& named) {
  return sparsert::gemm24_workspace_bytes(gemm24_choice(M, N, K, named), sparsert::current_device_facts().multiprocessors);
}

std::string gemm24_choice_name(int M, int N, int K, int multiprocessors) {
  const sparsert::Gemm24Choice choice = sparsert::select_gemm24(M, N, K, {multiprocessors, 90});
  std::string name = sparsert::gemm24_config_name(choice.config);
  if (choice.cluster > 1) name += (sparsert::gemm24_config_splits(choice.config) ? " over " : ", shared by ") +
                                  std::to_string(choice.cluster) + " blocks";
  return name + (choice.even ? ", dealt out evenly" : "");
}

void gemm24_cuda(uintptr_t values, uintptr_t metadata, uintptr_t x, uintptr_t bias, uintptr_t y, int M, int N, int K,
                 int64_t ldx, int activation, bool gated, uintptr_t workspace, int dtype, uintptr_t stream,
                 const std::optional<std::tuple<int, int, bool>>& named) {
  sparsert::Gemm24Arguments arguments{pointer<void>(values), pointer<uint32_t>(metadata), pointer<void>(x),
                                      pointer<void>(bias),   pointer<void>(y),            M, N, K, ldx,
                                      static_cast<sparsert::DType>(dtype)};
  arguments.activation = static_cast<sparsert::Activation>(activation);
  arguments.gated = gated;
  arguments.workspace = pointer<void>(workspace);
  check(sparsert::gemm24(arguments, gemm24_choice(M, N, K, named), sparsert::current_device_facts().multiprocessors, true,
                         pointer<void>(stream)),
        "gemm24");
}

// (name, outputs and tokens of a block, whether a cluster splits the inputs) of each config.
std::vector<std::tuple<std::string, int, int, bool>> gemm24_configs() {
  std::vector<std::tuple<std::string, int, int, bool>> configs;
  for (int i = 0; i < sparsert::gemm24_config_count(); ++i)
    configs.emplace_back(sparsert::gemm24_config_name(i), sparsert::gemm24_config_outputs(i),
                         sparsert::gemm24_config_tokens(i), sparsert::gemm24_config_splits(i));
  return configs;
}

// named: (config, splits) instead of the chosen ones, for tuning and for tests that cover every config.
sparsert::Gemm24MmaChoice gemm24_mma_choice(int M, int N, int K, const std::optional<std::tuple<int, int>>& named) {
  if (!named) return sparsert::select_gemm24_mma(M, N, K, sparsert::current_device_facts());
  return {std::get<0>(*named), std::get<1>(*named)};
}

int64_t gemm24_mma_workspace(int M, int N, int K, const std::optional<std::tuple<int, int>>& named) {
  return sparsert::gemm24_mma_workspace_bytes(gemm24_mma_choice(M, N, K, named), M, N);
}

// (config, splits, both in words)
std::tuple<int, int, std::string> gemm24_mma_choice_for(int M, int N, int K, int multiprocessors, int capability) {
  const sparsert::Gemm24MmaChoice choice = sparsert::select_gemm24_mma(M, N, K, {multiprocessors, capability});
  std::string name = sparsert::gemm24_mma_config_name(choice.config);
  if (choice.splits > 1) name += ", inputs split over " + std::to_string(choice.splits) + " blocks";
  return {choice.config, choice.splits, name};
}

void gemm24_mma_cuda(uintptr_t values, uintptr_t metadata, uintptr_t x, uintptr_t bias, uintptr_t y, int M, int N, int K,
                     int64_t ldx, int activation, bool gated, uintptr_t workspace, int dtype, uintptr_t stream,
                     const std::optional<std::tuple<int, int>>& named) {
  sparsert::Gemm24Arguments arguments{pointer<void>(values), pointer<uint32_t>(metadata), pointer<void>(x),
                                      pointer<void>(bias),   pointer<void>(y),            M, N, K, ldx,
                                      static_cast<sparsert::DType>(dtype)};
  arguments.activation = static_cast<sparsert::Activation>(activation);
  arguments.gated = gated;
  arguments.workspace = pointer<void>(workspace);
  check(sparsert::gemm24_mma(arguments, gemm24_mma_choice(M, N, K, named), pointer<void>(stream)), "gemm24_mma");
}

// (name, outputs and tokens of a block) of each config.
std::vector<std::tuple<std::string, int, int>> gemm24_mma_configs() {
  std::vector<std::tuple<std::string, int, int>> configs;
  for (int i = 0; i < sparsert::gemm24_mma_config_count(); ++i)
    configs.emplace_back(sparsert::gemm24_mma_config_name(i), sparsert::gemm24_mma_config_outputs(i),
                         sparsert::gemm24_mma_config_tokens(i));
  return configs;
}

// Parts of the squares that linear24_step_cuda writes for each batch row.
int linear24_parts(int M, int N, int K) {
  return sparsert::linear24_blocks(sparsert::select_linear24(M, N, K, sparsert::current_device_facts()), N);
}

// One named tile instead of the chosen one: for tuning and for tests that cover every tile.
void linear24_cuda_with(uintptr_t values, uintptr_t metadata, uintptr_t x, uintptr_t bias, uintptr_t y, int M, int N,
                        int K, int64_t ldx, int dtype, uintptr_t stream, int config, int splits) {
  const sparsert::Linear24Arguments arguments{pointer<void>(values), pointer<uint32_t>(metadata), pointer<void>(x),
                                              pointer<void>(bias),   pointer<void>(y),            M, N, K, ldx,
                                              static_cast<sparsert::DType>(dtype)};
  check(sparsert::linear24(arguments, {config, splits}, sparsert::current_device_facts().capability >= 90,
                           pointer<void>(stream)),
        "linear24");
}

std::vector<std::string> linear24_configs() {
  std::vector<std::string> names;
  for (int i = 0; i < sparsert::linear24_config_count(); ++i) names.emplace_back(sparsert::linear24_config_name(i));
  return names;
}

std::string linear24_choice(int M, int N, int K, int multiprocessors, int capability) {
  const sparsert::Linear24Choice choice = sparsert::select_linear24(M, N, K, {multiprocessors, capability});
  return std::string(sparsert::linear24_config_name(choice.config)) + ", inputs split over " +
         std::to_string(choice.splits) + (choice.splits == 1 ? " block" : " blocks of a cluster");
}

void pack24_cuda(uintptr_t dense, uintptr_t mask, uintptr_t values, uintptr_t metadata, uintptr_t stats, int N, int K,
                 int64_t ld, int dtype, uintptr_t stream) {
  check(sparsert::pack24({pointer<void>(dense), pointer<uint8_t>(mask), pointer<void>(values),
                          pointer<uint32_t>(metadata), pointer<long long>(stats), N, K, ld,
                          static_cast<sparsert::DType>(dtype)},
                         pointer<void>(stream)),
        "pack24");
}

void pack24_bitmask_cuda(uintptr_t compressed, uintptr_t bitmask, uintptr_t values, uintptr_t metadata, uintptr_t bad,
                         int N, int K, int dtype, uintptr_t stream) {
  check(sparsert::pack24_bitmask({pointer<void>(compressed), pointer<uint8_t>(bitmask), pointer<void>(values),
                                  pointer<uint32_t>(metadata), pointer<int>(bad), N, K,
                                  static_cast<sparsert::DType>(dtype)},
                                 pointer<void>(stream)),
        "pack24_bitmask");
}

void unpack24_cuda(uintptr_t values, uintptr_t metadata, uintptr_t dense, int N, int K, int dtype, uintptr_t stream) {
  check(sparsert::unpack24({pointer<void>(values), pointer<uint32_t>(metadata), pointer<void>(dense), N, K,
                            static_cast<sparsert::DType>(dtype)},
                           pointer<void>(stream)),
        "unpack24");
}

bool dependent_launch() { return sparsert::current_device_facts().capability >= 90; }

void dense_linear_cuda(uintptr_t weight, uintptr_t x, uintptr_t bias, uintptr_t y, int M, int N, int K, int64_t ldx,
                       int dtype, uintptr_t stream) {
  check(sparsert::dense_linear({pointer<void>(weight), pointer<void>(x), pointer<void>(bias), pointer<void>(y), M, N, K,
                                ldx, static_cast<sparsert::DType>(dtype)},
                               dependent_launch(), pointer<void>(stream)),
        "dense_linear");
}

void residual_norm_cuda(uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t bias, uintptr_t post_weight,
                        uintptr_t stream_out, uintptr_t normed, int rows, int width, float eps, bool centered,
                        bool weight_is_float, int dtype, uintptr_t stream) {
  check(sparsert::residual_norm({pointer<void>(x), pointer<void>(residual), pointer<void>(weight), pointer<void>(bias),
                                 pointer<void>(post_weight), pointer<void>(stream_out), pointer<void>(normed), rows,
                                 width, eps, centered, weight_is_float, static_cast<sparsert::DType>(dtype)},
                                dependent_launch(), pointer<void>(stream)),
        "residual_norm");
}

void prompt_heads_cuda(uintptr_t heads, uintptr_t keys, uintptr_t values, uintptr_t rows, uintptr_t positions,
                       uintptr_t cosine, uintptr_t signed_sine, uintptr_t q_norm, uintptr_t k_norm, int64_t cache_length,
                       int tokens, int num_heads, int num_kv_heads, int head_dim, int rotary_dim, float norm_eps,
                       bool norm_is_float, int dtype, uintptr_t stream) {
  check(sparsert::prompt_heads({pointer<void>(heads), pointer<void>(keys), pointer<void>(values), pointer<long long>(rows),
                                pointer<long long>(positions), pointer<void>(cosine), pointer<void>(signed_sine),
                                pointer<void>(q_norm), pointer<void>(k_norm), cache_length, tokens, num_heads,
                                num_kv_heads, head_dim, rotary_dim, norm_eps, norm_is_float,
                                static_cast<sparsert::DType>(dtype)},
                               dependent_launch(), pointer<void>(stream)),
        "prompt_heads");
}

void activate_cuda(uintptr_t x, uintptr_t y, int rows, int width, int kind, bool gated, bool interleaved, int dtype,
                   uintptr_t stream) {
  check(sparsert::activate({pointer<void>(x), pointer<void>(y), rows, width, static_cast<sparsert::Activation>(kind),
                            gated, interleaved, static_cast<sparsert::DType>(dtype)},
                           dependent_launch(), pointer<void>(stream)),
        "activate");
}

// splits 0: chosen for the window, warps too.
void decode_attention_cuda(uintptr_t heads, uintptr_t keys, uintptr_t values, uintptr_t lengths, uintptr_t cosine,
                           uintptr_t signed_sine, uintptr_t q_norm, uintptr_t k_norm, uintptr_t out,
                           int64_t heads_stride, int64_t cache_length, int batch, int num_heads, int num_kv_heads,
                           int head_dim, int rotary_dim, int sliding_window, float scale, float softcap, float norm_eps,
                           bool norm_is_float, bool out_tiled, bool settled, int window, int warps, int splits, int dtype,
                           uintptr_t stream) {
  const sparsert::DeviceFacts device = sparsert::current_device_facts();
  const int reach = sliding_window > 0 && sliding_window < window ? sliding_window : window;
  sparsert::DecodeAttentionChoice choice = {warps, splits};
  if (splits == 0)
    choice = sparsert::select_decode_attention(batch, num_heads, num_kv_heads, head_dim, reach, device.multiprocessors,
                                               device.capability >= 90);
  check(sparsert::decode_attention(
            {pointer<void>(heads), pointer<void>(keys), pointer<void>(values), pointer<long long>(lengths),
             pointer<void>(cosine), pointer<void>(signed_sine), pointer<void>(q_norm), pointer<void>(k_norm),
             pointer<void>(out), heads_stride, cache_length, batch, num_heads, num_kv_heads, head_dim, rotary_dim,
             sliding_window, scale, softcap, norm_eps, norm_is_float, out_tiled, settled, static_cast<sparsert::DType>(dtype)},
            choice, dependent_launch(), pointer<void>(stream)),
        "decode_attention");
}
#endif

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
#ifdef SPARSERT_CUDA
  const std::string list = SPARSERT_CUDA_ARCHITECTURES;  // "80 86 90a"
  for (size_t begin = 0; begin < list.size();) {
    const size_t end = std::min(list.find(' ', begin), list.size());
    if (end > begin) names.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
#endif
  return names;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of sparsert: CPU packers and, when built with nvcc, the CUDA kernels.";
  module.def("cuda_architectures", &cuda_architectures);
  module.def("pack24_cpu", &pack24_cpu);
  module.def("unpack24_cpu", &unpack24_cpu);
  module.def("linear24_cpu", &linear24_cpu, py::arg("values"), py::arg("metadata"), py::arg("x"), py::arg("y"),
             py::arg("batch"), py::arg("rows"), py::arg("columns"), py::arg("dtype"), py::arg("threads"),
             py::arg("portable") = false);
#ifdef SPARSERT_CUDA
  module.def("linear24_cuda", &linear24_cuda);
  module.def("linear24_step_cuda", &linear24_step_cuda);
  module.def("gemm24_cuda", &gemm24_cuda, py::arg("values"), py::arg("metadata"), py::arg("x"), py::arg("bias"), py::arg("y"),
             py::arg("M"), py::arg("N"), py::arg("K"), py::arg("ldx"), py::arg("activation"), py::arg("gated"),
             py::arg("workspace"), py::arg("dtype"), py::arg("stream"), py::arg("named") = py::none());
  module.def("gemm24_workspace", &gemm24_workspace, py::arg("M"), py::arg("N"), py::arg("K"), py::arg("named") = py::none());
  module.def("gemm24_choice", &gemm24_choice_name);
  module.def("gemm24_configs", &gemm24_configs);
  module.def("gemm24_mma_cuda", &gemm24_mma_cuda, py::arg("values"), py::arg("metadata"), py::arg("x"), py::arg("bias"),
             py::arg("y"), py::arg("M"), py::arg("N"), py::arg("K"), py::arg("ldx"), py::arg("activation"),
             py::arg("gated"), py::arg("workspace"), py::arg("dtype"), py::arg("stream"), py::arg("named") = py::none());
  module.def("gemm24_mma_workspace", &gemm24_mma_workspace, py::arg("M"), py::arg("N"), py::arg("K"),
             py::arg("named") = py::none());
  module.def("gemm24_mma_choice", &gemm24_mma_choice_for);
  module.def("gemm24_mma_configs", &gemm24_mma_configs);
  module.def("linear24_parts", &linear24_parts);
  module.def("activation_tiles", &sparsert::activation_tiles);
  module.def("linear24_override", &sparsert::override_linear24);
  module.def("linear24_cuda_with", &linear24_cuda_with);
  module.def("linear24_configs", &linear24_configs);
  module.def("linear24_choice", &linear24_choice);
  module.def("pack24_cuda", &pack24_cuda);
  module.def("pack24_bitmask_cuda", &pack24_bitmask_cuda);
  module.def("unpack24_cuda", &unpack24_cuda);
  module.def("dense_linear_cuda", &dense_linear_cuda);
  module.def("dense_linear_max_batch", &sparsert::dense_linear_max_batch);
  module.def("residual_norm_cuda", &residual_norm_cuda);
  module.def("residual_norm_max_width", &sparsert::residual_norm_max_width);
  module.def("prompt_heads_cuda", &prompt_heads_cuda);
  module.def("prompt_heads_takes", &sparsert::prompt_heads_takes);
  module.def("activate_cuda", &activate_cuda);
  module.def("decode_attention_cuda", &decode_attention_cuda);
  module.def("decode_attention_takes", &sparsert::decode_attention_takes);
#endif
}
