#include "select.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>

// On Hopper and datacentre Blackwell a small measured table decides; a shape that is not in it takes the choice of
// the nearest one that is, where near means a small ratio of outputs and of inputs. Nothing is tuned at run time.
// Other GPUs get the small tile that fits their shared memory, and for prompts what a small model of their time says
// (neither is tuned: no such GPU was at hand).

namespace sparsert {
namespace {

constexpr int kChunk = 256;
constexpr int kMaxSplits = 8;
constexpr int kSmallTile = 0;  // 32 outputs, fits 99 KB of shared memory at every batch
constexpr int kSmallTileOutputs = 32;
constexpr int kPairTile = 3;  // 64 outputs, 2x4 warps: for batches up to 16, as the tile that it stands in for
constexpr int kPairOutputs = 32;

constexpr std::array<int, 8> kTableBatches = {1, 4, 8, 16, 24, 32, 48, 64};

struct TableRow {
  int N, K;
  Linear24Choice choices[kTableBatches.size()];
};

constexpr TableRow kTable[] = {
#include "linear24_table.inc"
};

// Of gemm24: where inputs are split rows of y may have any length; even work knows at most so many tiles of tokens.
constexpr int kSplitConfig = 7;
constexpr int kGemmMostTokenTiles = 8;
constexpr std::array<int, 14> kGemmBatches = {32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096};

struct GemmRow {
  int N, K;
  Gemm24Choice choices[kGemmBatches.size()];
};

constexpr GemmRow kGemmTable[] = {
#include "gemm24_table.inc"
};

// Of gemm24_mma, in the order of its configs: blocks that a multiprocessor holds with 160 KB of shared memory and with
// 100 KB, and the share of the tensor cores' rate that one, two and three of them reach.
struct MmaConfigFacts {
  int resident, resident_small;
  double rate[3];
};
constexpr MmaConfigFacts kMmaConfigs[] = {
    {1, 1, {0.80, 0.80, 0.80}},
    {2, 1, {0.60, 0.75, 0.75}},
    {3, 2, {0.40, 0.55, 0.60}},
};
constexpr double kMmaStartClocks = 3000;       // of a block: first copies, writing of outputs
constexpr double kMmaAddClocks = 4000;         // of the kernel that adds up split inputs
constexpr double kMmaAddBytesPerClock = 20;    // of a multiprocessor: sums are written once and read once

// (N, K, place of the batch) -> choice; empty but while tuning
std::map<std::array<int, 3>, Linear24Choice> overrides;

double ratio(int a, int b) { return a > b ? double(a) / b : double(b) / a; }

// The row of a table for a shape, or the nearest to it: a small ratio of outputs and of inputs.
template <typename Row, size_t Rows>
const Row& nearest(const Row (&table)[Rows], int N, int K) {
  return *std::min_element(table, table + Rows, [&](const Row& a, const Row& b) {
    return ratio(N, a.N) * ratio(K, a.K) < ratio(N, b.N) * ratio(K, b.K);
  });
}

}  // namespace

DeviceFacts current_device_facts() {
  constexpr int kDevices = 64;
  static std::array<std::atomic<int>, kDevices> cache{};  // multiprocessors * 1000 + capability; 0: not asked yet
  int device = 0;
  cudaGetDevice(&device);
  int packed = device < kDevices ? cache[device].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int multiprocessors = 1, major = 0, minor = 0;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    packed = multiprocessors * 1000 + major * 10 + minor;
    if (device < kDevices) cache[device].store(packed, std::memory_order_relaxed);
  }
  return {packed / 1000, packed % 1000};
}

Linear24Choice select_linear24(int M, int N, int K, const DeviceFacts& device, bool gated) {
  const int chunks = (K + kChunk - 1) / kChunk;
  const bool clusters = device.capability >= 90;
  if (device.capability < 90 || device.capability >= 120) {
    const int groups = (N + kSmallTileOutputs - 1) / kSmallTileOutputs;
    const int wanted = (2 * device.multiprocessors + groups - 1) / groups;
    return {kSmallTile, clusters ? std::clamp(wanted, 1, std::min(kMaxSplits, chunks)) : 1};
  }
  const size_t batch = std::lower_bound(kTableBatches.begin(), kTableBatches.end(), M) - kTableBatches.begin();
  if (!overrides.empty()) {
    const auto found = overrides.find({N, K, static_cast<int>(std::min(batch, kTableBatches.size() - 1))});
    if (found != overrides.end()) return found->second;
  }
  Linear24Choice choice = nearest(kTable, N, K).choices[std::min(batch, kTableBatches.size() - 1)];
  choice.splits = std::min(choice.splits, chunks);
  // the only tile of 16 outputs also splits the inputs over eight warps; this is the next one that does
  if (gated && linear24_config_outputs(choice.config) % kPairOutputs != 0) choice = {kPairTile, 1};
  return choice;
}

Gemm24Choice select_gemm24(int M, int N, int K, const DeviceFacts& device) {
  if (N % 16 != 0)  // rows of y, or half of them behind a gate, that the copy engine cannot write
    return {kSplitConfig, 1, false};
  const size_t batch = std::lower_bound(kGemmBatches.begin(), kGemmBatches.end(), M) - kGemmBatches.begin();
  Gemm24Choice choice = nearest(kGemmTable, N, K).choices[std::min(batch, kGemmBatches.size() - 1)];
  if (gemm24_config_splits(choice.config)) {
    const int chunks = (K + kChunk - 1) / kChunk;
    choice.cluster = std::min(choice.cluster, chunks);
  }
  const int tokens = gemm24_config_tokens(choice.config);
  if ((M + tokens - 1) / tokens > std::min(kGemmMostTokenTiles, device.multiprocessors / choice.cluster)) choice.even = false;
  return choice;
}

// The least by a model of the clocks of a multiprocessor. It knows that the last round may be half empty, that one block
// of few warps does not fill a multiprocessor, and what split inputs cost; not that some GPUs have more bandwidth.
Gemm24MmaChoice select_gemm24_mma(int M, int N, int K, const DeviceFacts& device) {
  const int chunks = (K + kChunk - 1) / kChunk;
  const bool large = device.capability == 80 || (device.capability >= 90 && device.capability < 120);
  const double products_per_clock = large ? 2048 : 1024;
  Gemm24MmaChoice best = {0, 1};
  double least = 0;
  for (int config = 0; config < gemm24_mma_config_count(); ++config) {
    const MmaConfigFacts& facts = kMmaConfigs[config];
    const int outputs = gemm24_mma_config_outputs(config), tokens = gemm24_mma_config_tokens(config);
    const int64_t tiles = int64_t((N + outputs - 1) / outputs) * ((M + tokens - 1) / tokens);
    const int resident = large ? facts.resident : facts.resident_small;
    const double chunk_clocks = double(outputs) * tokens * kChunk / products_per_clock;
    const int most = tiles < 2 * device.multiprocessors ? std::min(kMaxSplits, chunks) : 1;
    for (int splits = 1; splits <= most; ++splits) {
      const int64_t blocks = (tiles * splits + device.multiprocessors - 1) / device.multiprocessors;  // of the busiest
      const int together = static_cast<int>(std::min<int64_t>(blocks, resident));
      const int deepest = (chunks + splits - 1) / splits;
      double clocks = blocks * deepest * chunk_clocks / facts.rate[together - 1] +
                      (blocks + resident - 1) / resident * kMmaStartClocks;
      if (splits > 1)
        clocks += kMmaAddClocks + 2.0 * gemm24_mma_workspace_bytes({config, splits}, M, N) /
                                      (kMmaAddBytesPerClock * device.multiprocessors);
      if (least == 0 || clocks < least) {
        least = clocks;
        best = {config, splits};
      }
    }
  }
  return best;
}

void override_linear24(int N, int K, int batch, int config, int splits) {
  const size_t place = std::lower_bound(kTableBatches.begin(), kTableBatches.end(), batch) - kTableBatches.begin();
  const std::array<int, 3> key = {N, K, static_cast<int>(std::min(place, kTableBatches.size() - 1))};
  if (config < 0)
    overrides.erase(key);
  else
    overrides[key] = {config, splits};
}

}  // namespace sparsert
