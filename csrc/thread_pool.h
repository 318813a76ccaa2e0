// A small persistent pool: run a function on every index of a range, each index exactly once.
#pragma once

#include <cstdint>
#include <functional>

namespace lf {

// Calls task(i) for every i in [0, n) on up to `threads` threads (the caller is one of them) and returns when all are
// done. Which thread runs which index is not determined, so tasks must not share what they write. One caller at a
// time uses the pool; others run their tasks on their own thread. `task` must not throw.
void parallel_for(int64_t n, int threads, const std::function<void(int64_t)>& task);

}  // namespace lf
