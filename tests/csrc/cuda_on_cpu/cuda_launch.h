// Runs CUDA kernels on the CPU, for tests: a block's threads are fibers that change over at __syncthreads().
// It shows wrong indices, bounds and sums; memory order, registers and speed are a real device's to show.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 threadIdx(0), blockIdx(0);

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline void __stcg(uint4* to, uint4 x) { std::memcpy(to, &x, 16); }

enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }

namespace adam_ghost {

constexpr int THREADS = 32;

struct Fibers {
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<bool> done;
  void (*body)(const void*) = nullptr;
  const void* argument = nullptr;

  static constexpr size_t STACK = 256 << 10;

  static void enter();

  void run_block() {
    done.assign(threads.size(), false);
    for (size_t i = 0; i < threads.size(); ++i) {
      getcontext(&threads[i]);
      threads[i].uc_stack.ss_sp = stacks[i].get();
      threads[i].uc_stack.ss_size = STACK;
      threads[i].uc_link = &scheduler;
      makecontext(&threads[i], &Fibers::enter, 0);
    }
    for (bool running = true; running;) {
      running = false;
      for (size_t i = 0; i < threads.size(); ++i) {
        if (done[i]) continue;
        threadIdx.x = unsigned(i);
        swapcontext(&scheduler, &threads[i]);
        running |= !done[i];
      }
    }
  }
};
inline Fibers fibers;

inline void Fibers::enter() {
  fibers.body(fibers.argument);
  fibers.done[threadIdx.x] = true;
}

template <class Body>
void run_grid(dim3 grid, const Body& body) {
  fibers.threads.resize(THREADS);
  while (fibers.stacks.size() < fibers.threads.size()) fibers.stacks.emplace_back(new char[Fibers::STACK]);
  fibers.body = [](const void* f) { (*static_cast<const Body*>(f))(); };
  fibers.argument = &body;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) fibers.run_block();
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, void*, const Arguments&... arguments) {
  run_grid(grid, [&] { kernel(arguments...); });
}

}  // namespace adam_ghost

inline void __syncthreads() {
  const unsigned thread = threadIdx.x;
  swapcontext(&adam_ghost::fibers.threads[thread], &adam_ghost::fibers.scheduler);
}
