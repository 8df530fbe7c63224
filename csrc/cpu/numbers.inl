// The types of numbers, one at a time. Included by kernels.inl, inside a namespace.

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float widen(float x) { return x; }

inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }

// By hand, because _Float16 is missing from older compilers. Never forms a subnormal fp32, so that it is
// right with denormals flushed to zero too.
inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const uint32_t rebias = 112u << 23;
  const uint32_t special = magnitude >= (31u << 23) ? rebias : 0u;
  const float normal = from_bits(sign | (magnitude + rebias + special));
  const float tiny = from_bits(0x38800000u);  // 2^-14, the smallest normal float16
  const float subnormal = from_bits(magnitude + 0x38800000u) - tiny;
  return magnitude < (1u << 23) ? (sign ? -subnormal : subnormal) : normal;
}
