// What csrc/cuda takes from CUDA, for a CPU: the threads of a block are threads, and blocks come one after another.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using std::fma, std::max, std::min;

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

inline thread_local dim3 blockIdx, threadIdx;
inline std::barrier<>* together = nullptr;
inline void __syncthreads() { together->arrive_and_wait(); }

// KERNEL<<<blocks, threads, 0, stream>>>(...). A thread that leaves a kernel early waits here for the block to end, so a
// kernel in which some leave and others still wait for them would hang, as it may on a GPU.
template <typename Kernel>
void run_on_cpu(unsigned blocks, dim3 threads, int, cudaStream_t, Kernel kernel) {
  std::barrier<> all(threads.x * threads.y);
  together = &all;
  std::vector<std::thread> running;
  for (unsigned y = 0; y < threads.y; ++y)
    for (unsigned x = 0; x < threads.x; ++x)
      running.emplace_back([=, &all] {
        threadIdx = dim3(x, y);
        for (unsigned block = 0; block < blocks; ++block) {
          blockIdx = dim3(block);
          kernel();
          all.arrive_and_wait();
        }
      });
  for (std::thread& thread : running) thread.join();
}
