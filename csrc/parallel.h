// Split a range over threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsert {

// Calls function(worker, begin, end) for `threads` consecutive pieces of [0, count); the caller's thread takes the
// first.
template <typename Function>
void parallel_for(int64_t count, int threads, const Function& function) {
  const int64_t workers = std::clamp<int64_t>(threads, 1, std::max<int64_t>(count, 1));
  std::vector<std::thread> pool;
  for (int64_t w = 1; w < workers; ++w)
    pool.emplace_back([&, w] { function(static_cast<int>(w), count * w / workers, count * (w + 1) / workers); });
  function(0, 0, count / workers);
  for (auto& thread : pool) thread.join();
}

}  // namespace sparsert
