// Tile loops of the CPU kernels. cpu.cpp includes this once per instruction set, each time in another namespace and under another
// target pragma; hence no include guard and no includes. A tile's intermediate values stay in the first-level cache.

constexpr int TILE = 512;

struct alignas(64) Scratch {
  float w[TILE], g[TILE], m[TILE], v[TILE], v_max[TILE], val[TILE], scale[TILE], moved[TILE];
  float e[TILE], per_m[TILE], by_u[TILE], share[TILE], lambda[PLANES][TILE];
};

inline uint16_t round_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  return uint16_t((x == x ? rounded : bits | 0x400000u) >> 16);
}

inline float from_bf16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}

// `n` floats from `start` on: in place for float32, widened into `scratch` otherwise.
inline const float* widen(const Array& x, int64_t start, int n, float* scratch) {
  alignas(64) static const float zeros[TILE] = {};
  if (!x.data) return zeros;
  if (x.dtype == F32) return static_cast<const float*>(x.data) + start;
  const uint16_t* source = static_cast<const uint16_t*>(x.data) + start;
#pragma omp simd
  for (int i = 0; i < n; ++i) scratch[i] = from_bf16(source[i]);
  return scratch;
}

inline void narrow(const float* source, const Array& x, int64_t start, int n) {
  uint16_t* target = static_cast<uint16_t*>(x.data) + start;
#pragma omp simd
  for (int i = 0; i < n; ++i) target[i] = round_bf16(source[i]);
}

struct State {
  const float *w, *g, *m, *v, *v_max;
};

inline State load(const Param& p, bool weights, int64_t start, int n, Scratch& t) {
  return {widen(weights ? p.w : Array{}, start, n, t.w), widen(p.g, start, n, t.g), widen(p.m, start, n, t.m),
          widen(p.v, start, n, t.v), widen(p.v_max, start, n, t.v_max)};
}

template <class Form>
void linearize_tile(const Form form, const State& x, int n, float* __restrict scale, float* __restrict moved) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Linearized y = form({x.w[i], x.g[i], x.m[i], x.v[i], x.v_max[i]});
    scale[i] = y.scale;
    moved[i] = y.moved;
  }
}

template <class Form>
void points_tile(const Form form, const State& x, int n, float* __restrict empty, float* __restrict mid) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Points y = form({x.w[i], x.g[i], x.m[i], x.v[i], x.v_max[i]});
    empty[i] = y.empty;
    mid[i] = y.mid;
  }
}

// `out` may be `val` itself: an element is read before it is written.
inline void direction_sums(const float* val, const float* g, const Scratch& t, int n, float* out, int64_t K, double* sums) {
  double reached = 0, history = 0;
#pragma omp simd reduction(+ : reached, history)
  for (int i = 0; i < n; ++i) {
    const float x = val[i], P = x * t.scale[i];
    history += double(x) * double(t.moved[i]);
    reached += double(P) * double(g[i]);
    out[i] = P;
  }
  sums[0] += reached;
  sums[K] += history;
}

// The same for a bfloat16 result; the sums are those of the numbers written.
inline void direction_sums_bf16(const float* val, const float* g, const Scratch& t, int n, uint16_t* out, int64_t K, double* sums) {
  double reached = 0, history = 0;
#pragma omp simd reduction(+ : reached, history)
  for (int i = 0; i < n; ++i) {
    const float x = val[i];
    const uint16_t rounded = round_bf16(x * t.scale[i]);
    const float P = from_bf16(rounded);
    history += double(x) * double(t.moved[i]);
    reached += double(P) * double(g[i]);
    out[i] = rounded;
  }
  sums[0] += reached;
  sums[K] += history;
}

inline double sum_v_range(const Param& p, int64_t begin, int64_t end) {
  alignas(64) float scratch[TILE];
  double sum = 0;
  for (int64_t start = begin; start < end; start += TILE) {
    const int n = int(end - start < TILE ? end - start : TILE);
    const float* v = widen(p.v, start, n, scratch);
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += double(v[i]);
  }
  return sum;
}

inline void gradient_sums_range(const Param& p, int64_t K, int64_t begin, int64_t end, double* sums) {
  Scratch t;
  for (int64_t start = begin; start < end; start += TILE) {
    const int n = int(end - start < TILE ? end - start : TILE);
    const float* g = widen(p.g, start, n, t.g);
    double l1 = 0, l2 = 0;
#pragma omp simd reduction(+ : l1, l2)
    for (int i = 0; i < n; ++i) {
      const double x = g[i];
      l1 += x < 0 ? -x : x;
      l2 += x * x;
    }
    sums[0] += l1;
    sums[1] += l2;
    for (int64_t k = 0; k < K; ++k) {
      const float* along = widen(p.planes[ALONG][k], start, n, t.val);
      double reached = 0;
#pragma omp simd reduction(+ : reached)
      for (int i = 0; i < n; ++i) reached += double(along[i]) * double(g[i]);
      sums[2 + k] += reached;
    }
  }
}

inline void foresee_tile(const Step& s, const State& x, int n, float least, float* __restrict g) {
#pragma omp simd
  for (int i = 0; i < n; ++i) g[i] = foresee(s, x.m[i], x.v[i], least);
}

template <class S>  // an optimizer's step: Step or Fraction
void correct_range(const Param& p, const S& s, int64_t K, int64_t begin, int64_t end, float least, double* sums) {
  Scratch t;
  for (int64_t start = begin; start < end; start += TILE) {
    const int n = int(end - start < TILE ? end - start : TILE);
    State x = load(p, reads_weights(s), start, n, t);
    if constexpr (std::is_same_v<S, Step>) {
      if (p.foreseen) {
        foresee_tile(s, x, n, least, t.g);
        x.g = t.g;
      }
    }
    with_linearized(s, [&](const auto form) { linearize_tile(form, x, n, t.scale, t.moved); });
    for (int64_t k = 0; k < K; ++k) {
      const float* val = widen(p.planes[VAL][k], start, n, t.val);
      const Array out = p.planes[OUT][k];
      if (out.dtype == F32)
        direction_sums(val, x.g, t, n, static_cast<float*>(out.data) + start, K, sums + k);
      else
        direction_sums_bf16(val, x.g, t, n, static_cast<uint16_t*>(out.data) + start, K, sums + k);
    }
  }
}

template <class S>
void move_range(const Param& p, const S& s, int64_t begin, int64_t end) {
  Scratch t;
  for (int64_t start = begin; start < end; start += TILE) {
    const int n = int(end - start < TILE ? end - start : TILE);
    const State x = load(p, true, start, n, t);
    with_points(s, [&](const auto form) { points_tile(form, x, n, t.scale, t.moved); });
    const float* made[] = {t.scale, t.moved};
    for (int i : {EMPTY, MID}) {
      const Array to = p.planes[i][0];
      if (!to.data) continue;
      if (to.dtype == F32)
        std::memcpy(static_cast<float*>(to.data) + start, made[i], n * sizeof(float));
      else
        narrow(made[i], to, start, n);
    }
  }
}

template <bool AMSGRAD>
void slopes_tile(const Step& s, const State& x, int n, Scratch& t) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Slopes y = slopes<AMSGRAD>(s, {x.w[i], x.g[i], x.m[i], x.v[i], x.v_max[i]});
    t.e[i] = y.e;
    t.per_m[i] = y.per_m;
    t.by_u[i] = y.by_u;
    t.share[i] = y.share;
  }
}

// Each array is read before it is written, element by element, and none is another's.
template <bool AMSGRAD>
void pull_back_tile(const Step& s, const Scratch& t, int n, float* w, float* m, float* v, float* v_max, float* g) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Lambdas y = pull_back<AMSGRAD>(s, {t.e[i], t.per_m[i], t.by_u[i], t.share[i]}, {w[i], m[i], v[i], v_max[i], 0.f});
    w[i] = y.w;
    m[i] = y.m;
    v[i] = y.v;
    if (AMSGRAD) v_max[i] = y.v_max;
    g[i] = y.g;
  }
}

inline void adjoint_range(const Param& p, const Step& s, int64_t K, int64_t begin, int64_t end) {
  Scratch t;
  for (int64_t start = begin; start < end; start += TILE) {
    const int n = int(end - start < TILE ? end - start : TILE);
    const State x = load(p, s.l2 != 0, start, n, t);
    s.amsgrad ? slopes_tile<true>(s, x, n, t) : slopes_tile<false>(s, x, n, t);
    for (int64_t k = 0; k < K; ++k) {
      float* at[PLANES];  // in place for float32, in a widened copy otherwise
      for (int i = 0; i < PLANES; ++i) {
        const Array a = p.planes[i][k];
        const bool in_place = a.data && a.dtype == F32;
        at[i] = in_place ? static_cast<float*>(a.data) + start : t.lambda[i];
        if (!in_place && i != LAMBDA_G) std::memcpy(at[i], widen(a, start, n, t.val), n * sizeof(float));
      }
      const auto run = s.amsgrad ? pull_back_tile<true> : pull_back_tile<false>;
      run(s, t, n, at[LAMBDA_W], at[LAMBDA_M], at[LAMBDA_V], at[LAMBDA_V_MAX], at[LAMBDA_G]);
      for (int i = 0; i < PLANES; ++i)
        if (p.planes[i].data && p.planes[i].dtype == BF16) narrow(at[i], p.planes[i][k], start, n);
    }
  }
}
