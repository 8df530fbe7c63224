// The contrast sums for CUDA: partial sums of chunks of rows, then the chunks added in order. The division of the work is
// that of pnlac_fast/ops/triton/sums.py, which explains the pieces and what becomes of rows and offsets that do not fit.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "contrast.h"

namespace pnlac::cuda {
namespace {

constexpr int kLanesX = 32;     // of a block, along the neurons: a warp reads 512 adjacent bytes
constexpr int kLanesY = 8;      // along the rows
constexpr int kThreads = kLanesX * kLanesY;
constexpr int kShortSum = 64;   // rows that bfloat16 is added over in float
constexpr int64_t kShortestChunk = 64;
constexpr int64_t kBlocks = 512;  // to aim for before chunks grow; a constant, so that the bits do not depend on the device

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T, int kWide>
struct alignas(sizeof(T) * kWide) Vector {
  T values[kWide];
};

template <typename T>
struct Traits {
  using Sum = double;
  static constexpr bool kShort = false;  // whether a sum may run over kShortSum rows only
};
template <>
struct Traits<__nv_bfloat16> {
  using Sum = float;
  static constexpr bool kShort = true;
};

struct Work {
  int64_t chunk;    // rows
  int64_t columns;  // blocks of neurons
};

// What is read in place of a row that is not there: zeros behind the end of a piece, and for one that does not exist a NaN
// of any type, all bits set.
__device__ const uint4 kInstead[2] = {{0, 0, 0, 0}, {~0u, ~0u, ~0u, ~0u}};

// Where the values of a listed row are. A choice between addresses, since one whether to read would be a branch, and the
// compiler moves no read across it: the rows of a turn would wait for each other, each for its number and then its values.
template <typename T>
__device__ inline const T* find(const void* from, int64_t stride, int64_t row, int64_t count, int64_t column, bool live) {
  if (row >= 0 && row < count) return static_cast<const T*>(from) + row * stride + column;
  return reinterpret_cast<const T*>(kInstead + live);
}

// How many of the ascending offsets are below (or, with kOrEqual, at or below) a limit.
template <bool kOrEqual>
__device__ inline int64_t below(const int64_t* offsets, int64_t count, int64_t limit) {
  int64_t low = 0, high = count;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (kOrEqual ? offsets[middle] <= limit : offsets[middle] < limit)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One block: the pieces of one chunk and kLanesX * kWide neurons.
template <typename T, int kWide, int kUnroll>
__global__ __launch_bounds__(kThreads, 2) void partial(ContrastParams p, Extent extent, Work work, double* pieces) {
  using Sum = typename Traits<T>::Sum;
  constexpr int kWidth = kLanesX * kWide;
  __shared__ Sum lanes[kLanesY][kWidth];
  const int64_t index = blockIdx.x / work.columns;
  const int64_t first_column = (blockIdx.x % work.columns) * kWidth;
  const int64_t column = first_column + threadIdx.x * kWide;
  const bool inside = column < p.neurons;  // a vector is inside or outside as a whole
  const int64_t start = index * work.chunk;
  const int64_t stop = min(start + work.chunk, extent.selected);
  const int64_t last = below<false>(p.offsets, p.groups, stop);
  for (int64_t group = below<true>(p.offsets + 1, p.groups, start); group < last; ++group) {
    const int64_t begin = max(p.offsets[group], start), end = min(p.offsets[group + 1], stop);
    const int64_t span = Traits<T>::kShort ? static_cast<int64_t>(kShortSum) * kLanesY : work.chunk;
    // Of the neuron that this thread sums up over the lanes; see below.
    double totals[kSums] = {};
    for (int64_t from = begin; from < end; from += span) {
      const int64_t to = min(from + span, end);
      Sum sums[kSums][kWide] = {};
      if (inside) {
        const T *base[kUnroll], *tuned[kUnroll];  // of the next turn
        const auto find_rows = [&](int64_t at) {
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t place = at + u * kLanesY;
            const bool live = place < to;
            const int64_t base_row = live ? p.base_rows[place] : -1, row = live ? p.rows[place] : -1;
            base[u] = find<T>(p.base, p.base_row_stride, base_row, extent.base_rows, column, live);
            tuned[u] = find<T>(p.tuned, p.tuned_row_stride, row, extent.tuned_rows, column, live);
          }
        };
        find_rows(from + threadIdx.y);
        for (int64_t at = from + threadIdx.y; at < to; at += kLanesY * kUnroll) {
          Vector<T, kWide> a[kUnroll], b[kUnroll];
#pragma unroll
          for (int u = 0; u < kUnroll; ++u) {
            a[u] = *reinterpret_cast<const Vector<T, kWide>*>(base[u]);
            b[u] = *reinterpret_cast<const Vector<T, kWide>*>(tuned[u]);
          }
          find_rows(at + kLanesY * kUnroll);
#pragma unroll
          for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int i = 0; i < kWide; ++i) {
              const Sum x = widen(a[u].values[i]), y = widen(b[u].values[i]), d = y - x;
              sums[kBase][i] += x;
              sums[kTuned][i] += y;
              sums[kBaseSquared][i] = fma(x, x, sums[kBaseSquared][i]);
              sums[kTunedSquared][i] = fma(y, y, sums[kTunedSquared][i]);
              sums[kDifferenceSquared][i] = fma(d, d, sums[kDifferenceSquared][i]);
            }
        }
      }
      // The lanes of a neuron are added in order, in double, by the thread of the same number.
      const int mine = threadIdx.y * kLanesX + threadIdx.x;
#pragma unroll
      for (int kind = 0; kind < kSums; ++kind) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kWide; ++i) lanes[threadIdx.y][i * kLanesX + threadIdx.x] = sums[kind][i];
        __syncthreads();
        if (mine < kWidth)
          for (int y = 0; y < kLanesY; ++y) totals[kind] += lanes[y][mine];
      }
    }
    const int mine = threadIdx.y * kLanesX + threadIdx.x;
    const int64_t neuron = first_column + (mine % kLanesX) * kWide + mine / kLanesX;
    if (mine < kWidth && neuron < p.neurons)
#pragma unroll
      for (int kind = 0; kind < kSums; ++kind)
        pieces[((index + group) * kSums + kind) * p.neurons + neuron] = totals[kind];
  }
}

// Adds the pieces of each group in order of the chunks.
__global__ void merge(ContrastParams p, Extent extent, Work work, const double* pieces) {
  const int64_t width = kSums * p.neurons, blocks = (width + kThreads - 1) / kThreads;
  const int64_t group = blockIdx.x / blocks, place = (blockIdx.x % blocks) * kThreads + threadIdx.x;
  if (place >= width) return;
  const int64_t begin = p.offsets[group], end = p.offsets[group + 1];
  double* sum = p.sums + group * width + place;
  if (p.offsets[0] != 0 || p.offsets[p.groups] != extent.selected || begin < 0 || begin > end ||
      end > extent.selected) {
    *sum = nan("");
    return;
  }
  double total = *sum;
  if (begin < end)
    for (int64_t index = begin / work.chunk; index <= (end - 1) / work.chunk; ++index)
      total += pieces[(index + group) * width + place];
  *sum = total;
}

int wide_of(const ContrastParams& p, DType dtype) {
  const int size = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2, wide = 16 / size;
  const bool whole = p.neurons % wide == 0 && p.base_row_stride % wide == 0 && p.tuned_row_stride % wide == 0 &&
                     reinterpret_cast<uintptr_t>(p.base) % 16 == 0 && reinterpret_cast<uintptr_t>(p.tuned) % 16 == 0;
  return whole ? wide : 1;
}

Work divide(const ContrastParams& p, const Extent& extent, DType dtype) {
  const int64_t width = static_cast<int64_t>(kLanesX) * wide_of(p, dtype);
  Work work{kShortestChunk, (p.neurons + width - 1) / width};
  while (work.chunk * 2 <= extent.selected * work.columns / kBlocks) work.chunk *= 2;
  return work;
}

int64_t chunks_of(const Extent& extent, const Work& work) { return (extent.selected + work.chunk - 1) / work.chunk; }

template <typename T, int kUnroll>
void launch(const ContrastParams& p, const Extent& extent, const Work& work, int wide, double* scratch,
            cudaStream_t stream) {
  const dim3 lanes(kLanesX, kLanesY);
  const unsigned blocks = static_cast<unsigned>(chunks_of(extent, work) * work.columns);
  if (blocks == 0) return;
  if (wide == 1)
    partial<T, 1, kUnroll><<<blocks, lanes, 0, stream>>>(p, extent, work, scratch);
  else
    partial<T, 16 / sizeof(T), kUnroll><<<blocks, lanes, 0, stream>>>(p, extent, work, scratch);
}

}  // namespace

int64_t contrast_scratch(const ContrastParams& p, const Extent& extent, DType dtype) {
  return (chunks_of(extent, divide(p, extent, dtype)) + p.groups) * kSums * p.neurons;
}

const char* contrast(const ContrastParams& p, const Extent& extent, DType dtype, double* scratch, int device,
                     void* stream) {
  const Work work = divide(p, extent, dtype);
  const int wide = wide_of(p, dtype);
  const auto queue = static_cast<cudaStream_t>(stream);
  // This library has a runtime of its own, which need not know which device torch has made current.
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  switch (dtype) {
    case DType::kFloat32: launch<float, 2>(p, extent, work, wide, scratch, queue); break;
    case DType::kFloat64: launch<double, 2>(p, extent, work, wide, scratch, queue); break;
    case DType::kFloat16: launch<__half, 1>(p, extent, work, wide, scratch, queue); break;
    case DType::kBFloat16: launch<__nv_bfloat16, 2>(p, extent, work, wide, scratch, queue); break;
  }
  const int64_t merge_blocks = p.groups * ((kSums * p.neurons + kThreads - 1) / kThreads);
  merge<<<static_cast<unsigned>(merge_blocks), kThreads, 0, queue>>>(p, extent, work, scratch);
  error = cudaGetLastError();
  cudaSetDevice(before);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace pnlac::cuda
