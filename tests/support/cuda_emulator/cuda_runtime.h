// Stands in for the toolkit's header of this name: CUDA's execution model on one CPU thread, for tests.
//
// A block's threads are coroutines that run until they meet a barrier or a shuffle; blocks run one after the other.
// The order in which threads take turns is a setting, so that a result that depends on it shows. Shared memory is
// filled with NaNs before each block, and reads past its size trap under AddressSanitizer.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(address, size) ((void)(address), (void)(size))
#endif

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)
using std::max;
using std::min;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
struct cudaFuncAttributes {};
struct dim3 {
  dim3(unsigned n = 1) : x(n) {}
  unsigned x;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulator {
constexpr int kSharedBytes = 232448;  // what a block of an H100 can have
}
namespace lf {
extern uint32_t shared_words[emulator::kSharedBytes / 4];  // what kernels declare as their dynamic shared memory
}

namespace emulator {

constexpr int kWarp = 32, kMostWarps = 32;
constexpr size_t kStack = 256 << 10;

// Where a coroutine stands. After its start a switch is a long jump, which unlike swapcontext makes no system call;
// AddressSanitizer follows only the latter.
struct Place {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
};

inline void leave(Place& from, Place& to) {
#ifdef __SANITIZE_ADDRESS__
  swapcontext(&from.context, &to.context);
#else
  from.started = true;
  if (_setjmp(from.jump)) return;
  if (to.started) _longjmp(to.jump, 1);
  setcontext(&to.context);
#endif
}

struct Thread {
  Place place;
  std::unique_ptr<char[]> stack;
  unsigned index = 0;
  uint32_t value = 0;                           // what it shows its warp
  bool done = false;
};

struct State {
  std::vector<Thread> threads = std::vector<Thread>(kWarp * kMostWarps);
  std::function<void()> body;
  Place scheduler;
  Thread* current = nullptr;
  unsigned n = 0;
  unsigned order = 0;         // how threads take turns: 0 forwards, 1 backwards, else a shuffle
  int vote = 0;               // of __syncthreads_or
  bool moved = false;         // whether a barrier was passed, or a thread ended, in this round of turns
  int block_arrived = 0, block_generation = 0;
  int warp_arrived[kMostWarps] = {}, warp_generation[kMostWarps] = {};
  int64_t most_shared = sizeof lf::shared_words;
};
inline State state;

inline void pause() { leave(state.current->place, state.scheduler); }

// A thread of every block, one block after the other.
inline void run_thread() {
  for (;;) {
    state.body();
    state.current->done = state.moved = true;
    pause();
  }
}

// Returns once all `n` threads have come to their next barrier of the group that counts in `arrived`. A thread that
// has left its kernel is waited for in vain.
inline void wait(int& arrived, int& generation, int n) {
  const int mine = generation;
  if (++arrived == n) {
    arrived = 0;
    ++generation;
    state.moved = true;
    return;
  }
  while (generation == mine) pause();
}

inline void warp_barrier() {
  const unsigned warp = state.current->index / kWarp;
  wait(state.warp_arrived[warp], state.warp_generation[warp], std::min<int>(kWarp, state.n - warp * kWarp));
}

inline void block_barrier() { wait(state.block_arrived, state.block_generation, state.n); }

inline void make(Thread& thread) {
  thread.stack.reset(new char[kStack]);
  getcontext(&thread.place.context);
  thread.place.context.uc_stack.ss_sp = thread.stack.get();
  thread.place.context.uc_stack.ss_size = kStack;
  thread.place.context.uc_link = nullptr;
  makecontext(&thread.place.context, run_thread, 0);
}

inline void run_block(size_t shared_bytes) {
  std::memset(lf::shared_words, 0xFF, shared_bytes);
  auto* behind = reinterpret_cast<char*>(lf::shared_words) + (shared_bytes + 7) / 8 * 8;
  const size_t rest = sizeof lf::shared_words - (shared_bytes + 7) / 8 * 8;
  ASAN_POISON_MEMORY_REGION(behind, rest);
  std::vector<unsigned> turns(state.n);
  for (unsigned i = 0; i < state.n; ++i) {
    turns[i] = state.order == 1 ? state.n - 1 - i : i;
    Thread& thread = state.threads[i];
    if (!thread.stack) make(thread);
    thread.index = i;
    thread.done = false;
  }
  unsigned random = state.order;
  if (state.order > 1)
    for (unsigned i = state.n; i > 1; --i) {
      random = random * 1664525u + 1013904223u;
      std::swap(turns[i - 1], turns[(random >> 8) % i]);
    }
  state.vote = 0;
  for (bool live = true; live;) {
    live = state.moved = false;
    for (const unsigned i : turns) {
      Thread& thread = state.threads[i];
      if (thread.done) continue;
      live = true;
      state.current = &thread;
      leave(state.scheduler, thread.place);
    }
    if (live && !state.moved) std::abort();  // threads wait at different barriers for each other
  }
  ASAN_UNPOISON_MEMORY_REGION(behind, rest);
}

struct ThreadIndex {
  struct X {
    operator unsigned() const { return state.current->index; }
  } x;
};
inline dim3 block_index(0);

}  // namespace emulator

inline emulator::ThreadIndex threadIdx;
#define blockIdx emulator::block_index

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... arguments) {
  auto& state = emulator::state;
  if (config->dynamicSmemBytes > static_cast<size_t>(state.most_shared)) return cudaErrorInvalidValue;
  state.n = config->blockDim.x;
  if (state.n > state.threads.size()) std::abort();
  state.body = [&] { kernel(arguments...); };
  for (unsigned block = 0; block < config->gridDim.x; ++block) {
    emulator::block_index.x = state.order == 1 ? config->gridDim.x - 1 - block : block;
    emulator::run_block(config->dynamicSmemBytes);
  }
  return cudaSuccess;
}

inline void __syncwarp() { emulator::warp_barrier(); }
inline void __syncthreads() { emulator::block_barrier(); }
inline int __syncthreads_or(int vote) {
  auto& state = emulator::state;
  state.vote |= vote;
  emulator::block_barrier();
  const int result = state.vote;
  emulator::block_barrier();
  state.vote = 0;  // every thread clears it before any can vote again
  emulator::block_barrier();
  return result;
}
inline float __shfl_xor_sync(uint32_t, float value, int mask) {
  auto& self = *emulator::state.current;
  std::memcpy(&self.value, &value, 4);
  emulator::warp_barrier();
  float other;
  std::memcpy(&other, &emulator::state.threads[self.index ^ static_cast<unsigned>(mask)].value, 4);
  emulator::warp_barrier();
  return other;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  if (!(std::fabs(x) < 0x1p31f)) std::abort();  // kernels promise to stay inside
  return static_cast<int>(std::nearbyint(x));
}
template <class T>
T __ldg(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % alignof(T)) std::abort();
  return *from;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}
inline int atomicAdd(int* to, int value) {
  const int old = *to;
  *to = static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));
  return old;
}
inline unsigned atomicMax(unsigned* to, unsigned value) {
  const unsigned old = *to;
  *to = std::max(old, value);
  return old;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = static_cast<int>(emulator::state.most_shared);
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return cudaSuccess; }
