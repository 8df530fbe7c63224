// The middle of a gated MLP: act(gate) * up, its gradients, and the contrast sums of it. Included by kernels.inl, inside
// a namespace, after sums.inl and masked.inl.

using I32 = Vector<int32_t>;

// Within 2 ulp, in plain arithmetic, so that every instruction set gives the same bits. Infinity and zero where they are
// due, subnormals included; NaN stays NaN.
inline F32 exponential(F32 x) {
  const F32 low = F32{} - 110.0f, high = F32{} + 90.0f;
  x = x > high ? high : x;
  x = x < low ? low : x;
  const float round = 12582912.0f;  // 1.5 * 2^23: added, it leaves the nearest whole number in the low bits
  const F32 shifted = x * 1.44269504f + round;
  const F32 whole = shifted - round;
  // ln 2 in two parts, the first short enough for an exact product.
  const F32 r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.0f;
  // 2^whole as two factors: one alone would overflow before the result does.
  const I32 n = bits_as<I32>(shifted) - 0x4b400000, half = n >> 1;
  return p * bits_as<F32>((half + 127) << 23) * bits_as<F32>((n - half + 127) << 23);
}

inline double exponential(double x) { return __builtin_exp(x); }

template <typename V>
inline V constant(double value);
template <>
inline F32 constant<F32>(double value) {
  return F32{} + static_cast<float>(value);
}
template <>
inline double constant<double>(double value) {
  return value;
}

// Both activations are x * sigmoid(exponent(x)); `slope` is the derivative of the exponent.
struct Silu {
  template <typename V>
  static V exponent(V x) {
    return x;
  }
  template <typename V>
  static V slope(V) {
    return constant<V>(1.0);
  }
};

// The exponent is 2 sqrt(2 / pi) (x + 0.044715 x^3), since 1 + tanh(y) = 2 sigmoid(2 y).
struct GeluTanh {
  template <typename V>
  static V exponent(V x) {
    return x * (x * x * constant<V>(0.07135481627260025) + constant<V>(1.5957691216057308));
  }
  template <typename V>
  static V slope(V x) {
    return x * x * constant<V>(0.21406444881780076) + constant<V>(1.5957691216057308);
  }
};

// How activations of a type are computed with: kColumns of them as two V, rounded to the type by `round`.
template <typename T>
struct Lanes;

template <>
struct Lanes<double> {
  using V = double;
  static constexpr int64_t kColumns = 2;
  static void read(const double* from, double* x) { __builtin_memcpy(x, from, 2 * sizeof(double)); }
  static void write(double* to, const double* x) { __builtin_memcpy(to, x, 2 * sizeof(double)); }
  static double round(double x) { return x; }
};

template <>
struct Lanes<float> {
  using V = F32;
  static constexpr int64_t kColumns = 2 * sizeof(F32) / sizeof(float);
  static void read(const float* from, F32* x) { __builtin_memcpy(x, from, 2 * sizeof(F32)); }
  static void write(float* to, const F32* x) { __builtin_memcpy(to, x, 2 * sizeof(F32)); }
  static F32 round(F32 x) { return x; }
};

template <>
struct Lanes<BFloat16> {
  using V = F32;
  static constexpr int64_t kColumns = 2 * sizeof(F32) / sizeof(float);
  static void read(const BFloat16* from, F32* x) { Activations<BFloat16>::read(from, x[0], x[1]); }
  // Of values that are rounded already.
  static void write(BFloat16* to, const F32* x) {
    const U32 both = (bits_as<U32>(x[0]) >> 16) | bits_as<U32>(x[1]);
    __builtin_memcpy(to, &both, sizeof(both));
  }
  static F32 round(F32 x) {
    const U32 bits = bits_as<U32>(x), nan = U32{} + 0x7fc00000u;
    const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return bits_as<F32>(x == x ? rounded : nan);
  }
};

template <>
struct Lanes<Float16> {
  using V = F32;
  static constexpr int64_t kHalf = sizeof(F32) / sizeof(float), kColumns = 2 * kHalf;
  static void read(const Float16* from, F32* x) {
    x[0] = widen_to_f32(from);
    x[1] = widen_to_f32(from + kHalf);
  }
  static void write(Float16* to, const F32* x) {
    narrow_to_f16(x[0], to);
    narrow_to_f16(x[1], to + kHalf);
  }
  static F32 round(F32 x) {
    Float16 rounded[kHalf];
    narrow_to_f16(x, rounded);
    return widen_to_f32(rounded);
  }
};

template <typename Act>
struct Swiglu {
  static constexpr int kIn = 2, kOut = 1;
  template <typename T, typename V = typename Lanes<T>::V>
  static void apply(const V* in, V* out) {
    const V gate = in[0], one = constant<V>(1.0);
    const V activated = Lanes<T>::round(gate / (one + exponential(-Act::exponent(gate))));
    out[0] = Lanes<T>::round(activated * in[1]);
  }
};

template <typename Act>
struct SwigluBackward {
  static constexpr int kIn = 3, kOut = 2;
  template <typename T, typename V = typename Lanes<T>::V>
  static void apply(const V* in, V* out) {
    const V grad = in[0], gate = in[1], up = in[2], one = constant<V>(1.0);
    const V divisor = one + exponential(-Act::exponent(gate));
    const V sigmoid = one / divisor;
    const V activated = Lanes<T>::round(gate / divisor);
    const V by_activated = Lanes<T>::round(grad * up);
    out[0] = Lanes<T>::round(by_activated * (sigmoid * (one + gate * (one - sigmoid) * Act::slope(gate))));
    out[1] = Lanes<T>::round(grad * activated);
  }
};

template <typename What, typename T>
inline void map_chunk(const T* const* in, T* const* out, int64_t column) {
  using V = typename Lanes<T>::V;
  V x[What::kIn][2], y[What::kOut][2];
  for (int i = 0; i < What::kIn; ++i) Lanes<T>::read(in[i] + column, x[i]);
  for (int part = 0; part < 2; ++part) {
    V of[What::kIn], to[What::kOut];
    for (int i = 0; i < What::kIn; ++i) of[i] = x[i][part];
    What::template apply<T>(of, to);
    for (int i = 0; i < What::kOut; ++i) y[i][part] = to[i];
  }
  for (int i = 0; i < What::kOut; ++i) Lanes<T>::write(out[i] + column, y[i]);
}

template <typename What, typename T>
void map_row(const T* const* in, T* const* out, int64_t neurons) {
  constexpr int64_t kColumns = Lanes<T>::kColumns;
  int64_t column = 0;
  for (; column + kColumns <= neurons; column += kColumns) map_chunk<What, T>(in, out, column);
  if (column == neurons) return;
  T x[What::kIn][kColumns] = {}, y[What::kOut][kColumns];
  const T* from[What::kIn];
  T* to[What::kOut];
  for (int i = 0; i < What::kIn; ++i) {
    __builtin_memcpy(x[i], in[i] + column, (neurons - column) * sizeof(T));
    from[i] = x[i];
  }
  for (int i = 0; i < What::kOut; ++i) to[i] = y[i];
  map_chunk<What, T>(from, to, 0);
  for (int i = 0; i < What::kOut; ++i) __builtin_memcpy(out[i] + column, y[i], (neurons - column) * sizeof(T));
}

template <typename T>
const T* at(const void* data, int64_t stride, int64_t row, int64_t column) {
  return static_cast<const T*>(data) + row * stride + column;
}

template <typename Act, typename T>
void swiglu_row(const SwigluParams& p, int64_t row, int64_t first, int64_t neurons) {
  const T* const in[] = {at<T>(p.gate, p.gate_row_stride, row, first), at<T>(p.up, p.up_row_stride, row, first)};
  T* const out[] = {static_cast<T*>(p.mid) + row * p.neurons + first};
  map_row<Swiglu<Act>, T>(in, out, neurons);
}

template <typename Act, typename T>
void swiglu_backward_row(const SwigluBackwardParams& p, int64_t row, int64_t first, int64_t neurons) {
  const SwigluParams& f = p.forward;
  const T* const in[] = {at<T>(p.grad, p.grad_row_stride, row, first), at<T>(f.gate, f.gate_row_stride, row, first),
                         at<T>(f.up, f.up_row_stride, row, first)};
  T* const out[] = {static_cast<T*>(p.by_gate) + row * f.neurons + first,
                    static_cast<T*>(p.by_up) + row * f.neurons + first};
  map_row<SwigluBackward<Act>, T>(in, out, neurons);
}

// Calls `run` with the types of the activation function and of the activations.
template <typename Act, typename Run>
void with_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32: return run(Act{}, float{});
    case DType::kFloat64: return run(Act{}, double{});
    case DType::kBFloat16: return run(Act{}, BFloat16{});
    case DType::kFloat16: return run(Act{}, Float16{});
  }
}

template <typename Run>
void with_types(Activation activation, DType dtype, const Run& run) {
  switch (activation) {
    case Activation::kSilu: return with_dtype<Silu>(dtype, run);
    case Activation::kGeluTanh: return with_dtype<GeluTanh>(dtype, run);
  }
}

// Calls `run` with every row, or part of one, among the entries [begin, end) of a [row, neuron] matrix.
template <typename Run>
void each_row(int64_t begin, int64_t end, int64_t neurons, const Run& run) {
  while (begin < end) {
    const int64_t row = begin / neurons, first = begin % neurons, count = least(neurons - first, end - begin);
    run(row, first, count);
    begin += count;
  }
}

void swiglu(const SwigluParams& p, DType dtype, int64_t begin, int64_t end) {
  with_types(p.activation, dtype, [&]<typename Act, typename T>(Act, T) {
    each_row(begin, end, p.neurons, [&](int64_t row, int64_t first, int64_t neurons) {
      swiglu_row<Act, T>(p, row, first, neurons);
    });
  });
}

void swiglu_backward(const SwigluBackwardParams& p, DType dtype, int64_t begin, int64_t end) {
  with_types(p.forward.activation, dtype, [&]<typename Act, typename T>(Act, T) {
    each_row(begin, end, p.forward.neurons, [&](int64_t row, int64_t first, int64_t neurons) {
      swiglu_backward_row<Act, T>(p, row, first, neurons);
    });
  });
}

// Bytes of a row that are computed before they are added: 64 rows of them, and of base, wait in the L2 cache.
constexpr int64_t kPieceBytes = 4096;

// Adds rows [start, stop) of mid to one group's sums of the neurons [first, first + neurons), by way of `tile`.
template <typename T>
void add_counted(const SwigluContrastParams& p, int64_t group, int64_t start, int64_t stop, int64_t first,
                 int64_t neurons, Chunk<Contrast, T>* tile) {
  const SwigluParams& f = p.forward;
  const float* counts = p.counts + group * p.rows;
  Rows<Contrast, T> rows;
  int waiting = 0;
  bool any = false;
  for (int64_t row = start; row < stop; ++row) {
    if (counts[row] == 0.0f) continue;
    if (!any) clear(tile, neurons);
    any = true;
    rows.at[0][waiting] = at<T>(p.base, p.base_row_stride, p.base_rows[row], first);
    rows.at[1][waiting] = at<T>(f.mid, f.neurons, row, first);
    rows.weights[waiting] = counts[row];
    if (++waiting < kPassRows) continue;
    add_pass<Contrast, T, kPassRows, true>(rows, neurons, tile);
    waiting = 0;
  }
  for (int slot = 0; slot < waiting; ++slot) {
    const Rows<Contrast, T> row{{{rows.at[0][slot]}, {rows.at[1][slot]}}, {rows.weights[slot]}};
    add_pass<Contrast, T, 1, true>(row, neurons, tile);
  }
  if (any) add_tile(tile, neurons, p.sums + group * kSums * f.neurons + first, f.neurons);
}

void swiglu_contrast(const SwigluContrastParams& p, DType dtype, int64_t first, int64_t last) {
  with_types(p.forward.activation, dtype, [&]<typename Act, typename T>(Act, T) {
    constexpr int64_t kPiece = kPieceBytes / sizeof(T);
    Chunk<Contrast, T> tile[chunks<Contrast, T>(kPiece)];
    for (int64_t start = 0; start < p.rows; start += kTileRows)
      for (int64_t piece = first; piece < last; piece += kPiece) {
        const int64_t stop = least(start + kTileRows, p.rows), neurons = least(kPiece, last - piece);
        for (int64_t row = start; row < stop; ++row) swiglu_row<Act, T>(p.forward, row, piece, neurons);
        for (int64_t group = 0; group < p.groups; ++group)
          add_counted<T>(p, group, start, stop, piece, neurons, tile);
      }
  });
}
