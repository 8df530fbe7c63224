// The masked optimizer steps. Included by kernels.inl, inside a namespace, after numbers.inl, whose types it uses.

int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

uint32_t to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
float load(T x) {
  return static_cast<float>(widen(x));
}

// To the nearest, ties to even, as torch rounds.
template <typename T>
T store(float x);

template <>
float store<float>(float x) {
  return x;
}

template <>
BFloat16 store<BFloat16>(float x) {
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
}

template <>
Float16 store<Float16>(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // The spacing of fp32 at 0.5 is that of the subnormal float16, so that this addition rounds to it.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // 65520 and more round to infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(sign | half)};
}

// By bits, because GCC takes `?:` for a branch around the arithmetic and then does not vectorise the loop, except for
// AVX-512 and floats, where it makes the faster blend of it.
template <typename T>
T select(bool take, T a, T b) {
  const uint16_t mask = take ? 0xffffu : 0u;
  return {static_cast<uint16_t>((a.bits & mask) | (b.bits & static_cast<uint16_t>(~mask)))};
}

float select(bool take, float a, float b) {
#if defined(__AVX512F__)
  return take ? a : b;
#else
  const uint32_t mask = take ? ~0u : 0u;
  return from_bits((to_bits(a) & mask) | (to_bits(b) & ~mask));
#endif
}

// The keep of an entry, and what becomes of updated values by it: `share` of a parameter, `pick` of any stored value.
struct Whole {
  float at(int64_t) const { return 1.0f; }
  static float share(float, float updated, float) { return updated; }
  template <typename T>
  static T pick(float, T updated, T) {
    return updated;
  }
};

struct ShareOfRow : Whole {
  float keep;
  float at(int64_t) const { return keep; }
  static float share(float keep, float updated, float old) { return old + keep * (updated - old); }
};

struct Columns {
  const float* keep;
  float at(int64_t j) const { return keep[j]; }
  static float share(float, float updated, float) { return updated; }
  template <typename T>
  static T pick(float keep, T updated, T old) {
    return select(keep != 0.0f, updated, old);
  }
};

struct ShareOfColumns : Columns {
  static float share(float keep, float updated, float old) {
    return select(keep == 1.0f, updated, old + keep * (updated - old));
  }
};

// The rules: the updated parameter from the old one and the gradient; moments are updated in place.
struct AdamWRule : AdamWStep {
  static constexpr bool kFirst = true, kSecond = true;
  float operator()(float param, float grad, float& first, float& second) const {
    first = first + first_weight * (grad - first);
    second = beta2 * second + second_weight * grad * grad;
    return param * decay - size * first / (__builtin_sqrtf(second) * correction + eps);
  }
};

template <bool kMomentum>
struct SGDRule : SGDStep {
  static constexpr bool kFirst = kMomentum, kSecond = false;
  float operator()(float param, float grad, float& buffer, float&) const {
    float change = grad + weight_decay * param;
    if constexpr (kMomentum) {
      buffer = first ? change : momentum * buffer + gradient_weight * change;
      change = nesterov ? change + momentum * buffer : buffer;
    }
    return param - lr * change;
  }
};

template <typename T, typename M, typename Rule, typename Keeps>
void step_entries(const MaskedTensor& t, const Rule& given, Keeps keeps, int64_t at, int64_t entries) {
  T* const param = static_cast<T*>(t.param) + at;
  const T* const grad = static_cast<const T*>(t.grad) + at;
  M* const firsts = static_cast<M*>(t.first) + (Rule::kFirst ? at : 0);
  M* const seconds = static_cast<M*>(t.second) + (Rule::kSecond ? at : 0);
  const Rule rule = given;  // a copy that no store can alias
#pragma GCC ivdep
  for (int64_t j = 0; j < entries; ++j) {
    // All is read before anything is written, so that nothing is read twice.
    const float keep = keeps.at(j), gradient = load(grad[j]);
    const T old = param[j];
    M old_first{}, old_second{};
    if constexpr (Rule::kFirst) old_first = firsts[j];
    if constexpr (Rule::kSecond) old_second = seconds[j];
    float first = load(old_first), second = load(old_second);
    const float updated = rule(load(old), gradient, first, second);
    param[j] = keeps.pick(keep, store<T>(keeps.share(keep, updated, load(old))), old);
    if constexpr (Rule::kFirst) firsts[j] = keeps.pick(keep, store<M>(first), old_first);
    if constexpr (Rule::kSecond) seconds[j] = keeps.pick(keep, store<M>(second), old_second);
  }
}

// The entries [begin, end) of one tensor. Neighbouring rows of one keep are one run, and rows of keep 0 are not touched.
template <typename T, typename M, typename Rule>
void step_tensor(const MaskedTensor& t, const Rule& rule, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end;) {
    const int64_t row = at / t.columns;
    int64_t next = row + 1;
    if (t.by_row)
      while (next * t.columns < end && t.keep[next] == t.keep[row]) ++next;
    const int64_t entries = least(next * t.columns, end) - at;
    if (!t.by_row) {
      const float* const keep = t.keep + (at - row * t.columns);
      if (t.fractions)
        step_entries<T, M>(t, rule, ShareOfColumns{{keep}}, at, entries);
      else
        step_entries<T, M>(t, rule, Columns{keep}, at, entries);
    } else if (t.keep[row] == 1.0f) {
      step_entries<T, M>(t, rule, Whole{}, at, entries);
    } else if (t.keep[row] != 0.0f) {
      step_entries<T, M>(t, rule, ShareOfRow{{}, t.keep[row]}, at, entries);
    }
    at += entries;
  }
}

template <typename T, typename Rule>
void step_typed(const MaskedTensor& t, const Rule& rule, int64_t begin, int64_t end) {
  if (t.moments == t.dtype)
    step_tensor<T, T>(t, rule, begin, end);
  else
    step_tensor<T, float>(t, rule, begin, end);
}

// The entries [begin, end) of all tensors, one after another.
template <typename Rule>
void step_all(const MaskedTensor* tensors, int64_t count, const Rule& rule, int64_t begin, int64_t end) {
  for (const MaskedTensor* t = tensors; t < tensors + count; ++t) {
    const int64_t from = most(begin - t->start, 0), to = least(end - t->start, t->rows * t->columns);
    if (from >= to) continue;
    switch (t->dtype) {
      case DType::kFloat32: step_tensor<float, float>(*t, rule, from, to); break;
      case DType::kBFloat16: step_typed<BFloat16>(*t, rule, from, to); break;
      case DType::kFloat16: step_typed<Float16>(*t, rule, from, to); break;
      case DType::kFloat64: break;  // refused before
    }
  }
}

void masked_adamw(const MaskedTensor* tensors, int64_t count, const AdamWStep& step, int64_t begin, int64_t end) {
  step_all(tensors, count, AdamWRule{step}, begin, end);
}

void masked_sgd(const MaskedTensor* tensors, int64_t count, const SGDStep& step, int64_t begin, int64_t end) {
  if (step.momentum == 0.0f)
    step_all(tensors, count, SGDRule<false>{step}, begin, end);
  else
    step_all(tensors, count, SGDRule<true>{step}, begin, end);
}
