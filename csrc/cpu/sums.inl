// Sums over rows of activations: of two streams that are contrasted, of one alone. Included by kernels.inl, inside a
// namespace.

// Rows whose sums are formed apart, in the precision of Activations<T>::Sum, before they go to the fp64 sums.
constexpr int64_t kTileRows = 64;
// Bytes of the sums of a tile: whole rows of 14336 bfloat16. Narrower tiles break the streams that the processor
// prefetches (20 KiB: two thirds of the speed), and they leave most of a 1 MiB L2 cache free.
constexpr int64_t kTileBytes = 288 * 1024;
// Rows added per pass: the sums are loaded and stored once for so many rows. More are more streams than are prefetched.
constexpr int kPassRows = 4;

// What is added up of a pair of activations, each as often as its weight says; a weight of 1 costs nothing.
struct Contrast {
  static constexpr int kStreams = 2;
  static constexpr int kTerms = kSums;
  template <typename V>
  static void add(const V* x, V* sums) {
    add(x, x[0], x[1], x[1] - x[0], sums);
  }
  template <typename V>
  static void add_weighted(const V* x, V weight, V* sums) {
    add(x, weight * x[0], weight * x[1], weight * (x[1] - x[0]), sums);
  }
  template <typename V>
  static void add(const V* x, V a, V b, V d, V* sums) {
    sums[kBase] += a;
    sums[kTuned] += b;
    // Squares of the type's own values are exact: one instruction or two, the bits are the same.
    sums[kBaseSquared] = multiply_add(a, x[0], sums[kBaseSquared]);
    sums[kTunedSquared] = multiply_add(b, x[1], sums[kTunedSquared]);
    sums[kDifferenceSquared] = multiply_add_inexact(d, x[1] - x[0], sums[kDifferenceSquared]);
  }
};

struct Moments {
  static constexpr int kStreams = 1;
  static constexpr int kTerms = 2;
  template <typename V>
  static void add(const V* x, V* sums) {
    sums[0] += x[0];
    sums[1] = multiply_add(x[0], x[0], sums[1]);
  }
};

// Rows of one pass, per stream.
template <typename What, typename T>
struct Rows {
  const T* at[What::kStreams][kPassRows];
  float weights[kPassRows];
};

// The sums of Activations<T>::kColumns neurons.
template <typename What, typename T>
struct Chunk {
  typename Activations<T>::Sum sums[What::kTerms][2];
};

template <typename What, typename T>
constexpr int64_t chunks(int64_t neurons) {
  return (neurons + Activations<T>::kColumns - 1) / Activations<T>::kColumns;
}

template <typename What, typename T, int R, bool Weighted>
inline void add_chunk(const Rows<What, T>& rows, int64_t column, Chunk<What, T>& chunk) {
  using V = typename Activations<T>::Sum;
  V first[What::kTerms], second[What::kTerms];
  for (int k = 0; k < What::kTerms; ++k) {
    first[k] = chunk.sums[k][0];
    second[k] = chunk.sums[k][1];
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    V x[What::kStreams], y[What::kStreams];
    for (int s = 0; s < What::kStreams; ++s) Activations<T>::read(rows.at[s][r] + column, x[s], y[s]);
    if constexpr (Weighted) {
      const V weight = V{} + rows.weights[r];
      What::add_weighted(x, weight, first);
      What::add_weighted(y, weight, second);
    } else {
      What::add(x, first);
      What::add(y, second);
    }
  }
  for (int k = 0; k < What::kTerms; ++k) {
    chunk.sums[k][0] = first[k];
    chunk.sums[k][1] = second[k];
  }
}

// Adds R rows to a tile. The last neurons, fewer than a chunk, are read through a copy.
template <typename What, typename T, int R, bool Weighted = false>
void add_pass(const Rows<What, T>& rows, int64_t neurons, Chunk<What, T>* tile) {
  constexpr int64_t kColumns = Activations<T>::kColumns;
  int64_t column = 0;
  for (; column + kColumns <= neurons; column += kColumns) add_chunk<What, T, R, Weighted>(rows, column, *tile++);
  if (column == neurons) return;
  T copy[What::kStreams][R][kColumns] = {};
  Rows<What, T> last = rows;
  for (int s = 0; s < What::kStreams; ++s)
    for (int r = 0; r < R; ++r) {
      __builtin_memcpy(copy[s][r], rows.at[s][r] + column, (neurons - column) * sizeof(T));
      last.at[s][r] = copy[s][r];
    }
  add_chunk<What, T, R, Weighted>(last, 0, *tile);
}

template <typename What, typename T>
void clear(Chunk<What, T>* tile, int64_t neurons) {
  __builtin_memset(static_cast<void*>(tile), 0, chunks<What, T>(neurons) * sizeof(*tile));
}

// `sums` is where the first of the neurons is in the sums of the group, [term, stride].
template <typename What, typename T>
void add_tile(const Chunk<What, T>* tile, int64_t neurons, double* sums, int64_t stride) {
  constexpr int64_t kColumns = Activations<T>::kColumns;
  for (int64_t start = 0; start < neurons; start += kColumns, ++tile)
    for (int k = 0; k < What::kTerms; ++k)
      for (int64_t part = 0; part < 2; ++part)
        for (int64_t lane = 0; lane < kColumns / 2; ++lane) {
          const int64_t column = start + Activations<T>::column(part, lane);
          if (column < neurons) sums[k * stride + column] += tile->sums[k][part][lane];
        }
}

struct Stream {
  const void* data;
  int64_t row_stride;
  const int64_t* rows;
};

template <typename What, typename T>
void add_group(const Stream* streams, int64_t start, int64_t stop, int64_t first, int64_t neurons, double* sums,
               int64_t stride, Chunk<What, T>* tile) {
  Rows<What, T> rows;
  const auto point_at = [&](int slot, int64_t i) {
    for (int s = 0; s < What::kStreams; ++s)
      rows.at[s][slot] = static_cast<const T*>(streams[s].data) + streams[s].rows[i] * streams[s].row_stride + first;
  };
  for (int64_t i = start; i < stop;) {
    const int64_t end = least(i + kTileRows, stop);
    clear(tile, neurons);
    for (; i + kPassRows <= end; i += kPassRows) {
      for (int slot = 0; slot < kPassRows; ++slot) point_at(slot, i + slot);
      add_pass<What, T, kPassRows>(rows, neurons, tile);
    }
    for (; i < end; ++i) {
      point_at(0, i);
      add_pass<What, T, 1>(rows, neurons, tile);
    }
    add_tile(tile, neurons, sums, stride);
  }
}

template <typename What, typename T>
void add_all(const Stream* streams, const int64_t* offsets, int64_t groups, int64_t neurons, double* sums,
             int64_t first, int64_t last) {
  constexpr int64_t kChunks = kTileBytes / sizeof(Chunk<What, T>);
  constexpr int64_t kNeurons = kChunks * Activations<T>::kColumns;
  Chunk<What, T> tile[kChunks];
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t block = first; block < last; block += kNeurons)
      add_group<What, T>(streams, offsets[g], offsets[g + 1], block, least(kNeurons, last - block),
                         sums + g * What::kTerms * neurons + block, neurons, tile);
}

template <typename What, typename... Arguments>
void add_all_of(DType dtype, Arguments... arguments) {
  switch (dtype) {
    case DType::kFloat32: return add_all<What, float>(arguments...);
    case DType::kFloat64: return add_all<What, double>(arguments...);
    case DType::kBFloat16: return add_all<What, BFloat16>(arguments...);
    case DType::kFloat16: return add_all<What, Float16>(arguments...);
  }
}

void contrast(const ContrastParams& p, DType dtype, int64_t first, int64_t last) {
  const Stream streams[] = {{p.base, p.base_row_stride, p.base_rows}, {p.tuned, p.tuned_row_stride, p.rows}};
  add_all_of<Contrast>(dtype, streams, p.offsets, p.groups, p.neurons, p.sums, first, last);
}

void moments(const MomentsParams& p, DType dtype, int64_t first, int64_t last) {
  const Stream stream{p.x, p.row_stride, p.rows};
  add_all_of<Moments>(dtype, &stream, p.offsets, p.groups, p.neurons, p.sums, first, last);
}
