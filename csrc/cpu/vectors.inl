// Vectors as wide as the registers of the instruction set, and activations of every type read into them. Included by
// kernels.inl, inside a namespace.

template <typename T, int64_t Bytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <typename T, int64_t Bytes = PNLAC_VECTOR_BYTES>
using Vector = typename VectorOf<T, Bytes>::type;

using F32 = Vector<float>;
using F64 = Vector<double>;
using U32 = Vector<uint32_t>;

template <typename V>
inline V load(const void* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename To, typename From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Intrinsics only where gcc 12 makes several instructions of what is one (and of _mm512_cvtps_pd a false warning).
#if PNLAC_VECTOR_BYTES == 64
inline F64 widen_to_f64(const float* from) { return _mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from)); }
inline F64 widen_to_f64(const Float16* from) {
  return _mm512_maskz_cvtps_pd(0xff, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline F32 widen_to_f32(const Float16* from) {
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void narrow_to_f16(F32 from, Float16* to) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, from, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), half);
}
inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm512_fmadd_ps(a, b, c); }
inline F64 multiply_add(F64 a, F64 b, F64 c) { return _mm512_fmadd_pd(a, b, c); }
#elif PNLAC_VECTOR_BYTES == 32
inline F64 widen_to_f64(const float* from) { return _mm256_cvtps_pd(_mm_loadu_ps(from)); }
inline F64 widen_to_f64(const Float16* from) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline F32 widen_to_f32(const Float16* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void narrow_to_f16(F32 from, Float16* to) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(from, _MM_FROUND_TO_NEAREST_INT));
}
inline F32 multiply_add(F32 a, F32 b, F32 c) { return _mm256_fmadd_ps(a, b, c); }
inline F64 multiply_add(F64 a, F64 b, F64 c) { return _mm256_fmadd_pd(a, b, c); }
#else
inline F64 widen_to_f64(const float* from) {
  return __builtin_convertvector((load<Vector<float, PNLAC_VECTOR_BYTES / 2>>(from)), F64);
}
inline F64 widen_to_f64(const Float16* from) {
  Vector<float, PNLAC_VECTOR_BYTES / 2> vector;
  for (int lane = 0; lane < PNLAC_VECTOR_BYTES / 8; ++lane) vector[lane] = widen(from[lane]);
  return __builtin_convertvector(vector, F64);
}
inline F32 widen_to_f32(const Float16* from) {
  F32 vector;
  for (int lane = 0; lane < PNLAC_VECTOR_BYTES / 4; ++lane) vector[lane] = widen(from[lane]);
  return vector;
}
inline void narrow_to_f16(F32 from, Float16* to) {
  for (int lane = 0; lane < PNLAC_VECTOR_BYTES / 4; ++lane) to[lane] = store<Float16>(from[lane]);
}
template <typename V>
inline V multiply_add(V a, V b, V c) { return a * b + c; }
#endif

// Where the product is rounded. The processor pays for a separate rounding only in fp32 (a fifth of the time), so
// that there, the default instruction set has other bits than the others.
inline F32 multiply_add_inexact(F32 a, F32 b, F32 c) { return multiply_add(a, b, c); }
inline F64 multiply_add_inexact(F64 a, F64 b, F64 c) { return a * b + c; }

// A column is a neuron. Activations<T>::read makes the two vectors that sums over kColumns neurons are added in.
// Squares of bfloat16 have 16 bits, so that 64 of about one size add up exactly in fp32. Those of float16 have 22 and
// of float32 48: in fp32 the spread is lost where the mean is much larger (15 % off in the standard deviation of
// float16 with mean 100 and deviation 0.1).
template <typename T>
struct Activations {
  using Sum = F64;
  static constexpr int64_t kColumns = 2 * sizeof(F64) / sizeof(double);
  static void read(const T* from, F64& first, F64& second) {
    first = widen_to_f64(from);
    second = widen_to_f64(from + kColumns / 2);
  }
  static constexpr int64_t column(int64_t part, int64_t lane) { return part * (kColumns / 2) + lane; }
};

template <>
struct Activations<double> : Activations<float> {
  static void read(const double* from, F64& first, F64& second) {
    first = load<F64>(from);
    second = load<F64>(from + kColumns / 2);
  }
};

// Even and odd columns apart: one operation each, and none that crosses lanes.
template <>
struct Activations<BFloat16> {
  using Sum = F32;
  static constexpr int64_t kColumns = 2 * sizeof(F32) / sizeof(float);
  static void read(const BFloat16* from, F32& even, F32& odd) {
    const U32 both = load<U32>(from);
    even = bits_as<F32>(both << 16);
    odd = bits_as<F32>(both & 0xffff0000u);
  }
  static constexpr int64_t column(int64_t part, int64_t lane) { return 2 * lane + part; }
};
