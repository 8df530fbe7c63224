// The contrast sums. Included by kernels.inl, inside a namespace.

// Sums over bfloat16 run in fp32 for this many rows, then go to fp64.
constexpr int64_t kTileRows = 64;
// Five rows of double accumulators of this width (40 KiB) stay in the L1 or L2 cache while the rows stream by.
constexpr int64_t kBlockNeurons = 1024;
// Rows added per pass: each accumulator is loaded and stored once for so many rows.
constexpr int kPassRows = 4;

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

// By hand, because _Float16 is missing from older compilers. Never forms a subnormal fp32, so that it is
// right with denormals flushed to zero too.
double widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t rebias = 112u << 23;
  const uint32_t special = magnitude >= (31u << 23) ? rebias : 0u;
  const float normal = from_bits(sign | (magnitude + rebias + special));
  const float tiny = from_bits(0x38800000u);  // 2^-14, the smallest normal float16
  const float subnormal = from_bits(magnitude + 0x38800000u) - tiny;
  return magnitude < (1u << 23) ? (sign ? -subnormal : subnormal) : normal;
}

double widen(float x) { return x; }
double widen(double x) { return x; }

// What `widen` returns. Squares of bfloat16 have 16 bits, so that 64 of about one size add up exactly in fp32. Those of
// float16 have 22 and of float32 48: in fp32 the spread is lost where the mean is much larger (15 % off in the standard
// deviation of float16 with mean 100 and deviation 0.1).
template <typename T>
using Accumulator = decltype(widen(T{}));

template <typename T, int R>
void add_rows(const T* const* base, const T* const* tuned, Accumulator<T>* const* into, int64_t neurons) {
  Accumulator<T>* const sum_base = into[kBase];
  Accumulator<T>* const sum_tuned = into[kTuned];
  Accumulator<T>* const sum_base_squared = into[kBaseSquared];
  Accumulator<T>* const sum_tuned_squared = into[kTunedSquared];
  Accumulator<T>* const sum_difference_squared = into[kDifferenceSquared];
#pragma GCC ivdep
  for (int64_t j = 0; j < neurons; ++j) {
    auto s0 = sum_base[j], s1 = sum_tuned[j];
    auto s2 = sum_base_squared[j], s3 = sum_tuned_squared[j], s4 = sum_difference_squared[j];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto a = widen(base[r][j]), b = widen(tuned[r][j]);
      const auto d = b - a;
      s0 += a;
      s1 += b;
      s2 += a * a;
      s3 += b * b;
      s4 += d * d;
    }
    sum_base[j] = s0;
    sum_tuned[j] = s1;
    sum_base_squared[j] = s2;
    sum_tuned_squared[j] = s3;
    sum_difference_squared[j] = s4;
  }
}

// Rows are added one after another in the order of `rows`, whatever R is.
template <typename T>
void add_selected(const ContrastParams& p, int64_t start, int64_t stop, int64_t first, int64_t neurons,
                  Accumulator<T>* const* into) {
  const T* base[kPassRows];
  const T* tuned[kPassRows];
  const auto point_at = [&](int slot, int64_t i) {
    base[slot] = static_cast<const T*>(p.base) + p.base_rows[i] * p.base_row_stride + first;
    tuned[slot] = static_cast<const T*>(p.tuned) + p.rows[i] * p.tuned_row_stride + first;
  };
  int64_t i = start;
  for (; i + kPassRows <= stop; i += kPassRows) {
    for (int slot = 0; slot < kPassRows; ++slot) point_at(slot, i + slot);
    add_rows<T, kPassRows>(base, tuned, into, neurons);
  }
  for (; i < stop; ++i) {
    point_at(0, i);
    add_rows<T, 1>(base, tuned, into, neurons);
  }
}

template <typename T>
void add_block(const ContrastParams& p, int64_t group, int64_t first, int64_t neurons) {
  double* sums[kSums];
  for (int k = 0; k < kSums; ++k) sums[k] = p.sums + (group * kSums + k) * p.neurons + first;
  const int64_t start = p.offsets[group], stop = p.offsets[group + 1];
  if constexpr (sizeof(Accumulator<T>) == sizeof(double)) {
    add_selected<T>(p, start, stop, first, neurons, sums);
  } else {
    alignas(64) float tile[kSums][kBlockNeurons];
    float* into[kSums];
    for (int k = 0; k < kSums; ++k) into[k] = tile[k];
    for (int64_t i = start; i < stop; i += kTileRows) {
      __builtin_memset(tile, 0, sizeof(tile));
      add_selected<T>(p, i, least(i + kTileRows, stop), first, neurons, into);
      for (int k = 0; k < kSums; ++k)
        for (int64_t j = 0; j < neurons; ++j) sums[k][j] += tile[k][j];
    }
  }
}

template <typename T>
void add_all(const ContrastParams& p, int64_t first, int64_t last) {
  for (int64_t group = 0; group < p.groups; ++group)
    for (int64_t block = first; block < last; block += kBlockNeurons)
      add_block<T>(p, group, block, least(kBlockNeurons, last - block));
}

void contrast(const ContrastParams& p, DType dtype, int64_t first, int64_t last) {
  switch (dtype) {
    case DType::kFloat32: return add_all<float>(p, first, last);
    case DType::kFloat64: return add_all<double>(p, first, last);
    case DType::kBFloat16: return add_all<BFloat16>(p, first, last);
    case DType::kFloat16: return add_all<Float16>(p, first, last);
  }
}
