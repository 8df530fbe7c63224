// Parameters of the contrast sums, and of the sums of one stream. No torch header here: kernels for any device include this file alone.
#pragma once
#include <cstdint>

namespace pnlac {

// Order of the five sums of a group.
enum Sum : int32_t { kBase, kTuned, kBaseSquared, kTunedSquared, kDifferenceSquared, kSums };

struct ContrastParams {
  const void* base;          // [row, neuron], neurons contiguous
  const void* tuned;         // [row, neuron], neurons contiguous
  int64_t base_row_stride;   // in elements
  int64_t tuned_row_stride;  // in elements
  const int64_t* rows;       // [selected] rows of tuned, ordered by group
  const int64_t* base_rows;  // [selected] the rows of base to compare them with
  const int64_t* offsets;    // [group + 1] where each group starts in `rows`
  double* sums;              // [group, kSums, neuron], added to
  int64_t groups;
  int64_t neurons;
};

struct MomentsParams {
  const void* x;           // [row, neuron], neurons contiguous
  int64_t row_stride;      // in elements
  const int64_t* rows;     // [selected] rows of x, ordered by group
  const int64_t* offsets;  // [group + 1] where each group starts in `rows`
  double* sums;            // [group, 2, neuron], of x and of x^2, added to
  int64_t groups;
  int64_t neurons;
};

}  // namespace pnlac
