// Adam's step, its linearizations and its adjoint for one element, shared by the CPU and the CUDA kernels.
// Symbols: docs/method.md; definitions: adam_ghost/optim/adam_definition.py. Here everything is float32, and small denominators
// are divided by one after another.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define AG_INLINE __host__ __device__ __forceinline__
#else
#define AG_INLINE inline __attribute__((always_inline))
#endif

namespace adam_ghost {

enum Rule : int { SECANT, TANGENT, FROZEN, SGD };  // order of adam_ghost.optim.adam_definition.RULES

// One row of the step table: the fields of adam_ghost.optim.adam_definition.StepScalars, in order.
struct StepRow {
  double t, lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize;
};

// What the kernels need of a row, derived in double once per tensor.
struct Step {
  float m_scale, g_scale;    // beta1/bc1, (1-beta1)/bc1
  float beta1, rest1;        // beta1, 1-beta1
  float beta2, rest2;        // beta2, 1-beta2
  float inv_bc1;             // 1/bc1
  float root_scale;          // 1/sqrt(bc2)
  float old_root_scale;      // the same for the state before the step
  float c2, inv_bc2;         // (1-beta2)/bc2, 1/bc2
  float eps, l2, decay, lr;  // decay: lr*weight_decay when decoupled
  float sign;                // -1 under maximize
  bool amsgrad;
  int rule;
};

AG_INLINE Step derive(const StepRow& r, int rule = SECANT) {
  const double bc1 = 1 - pow(r.beta1, r.t), bc2 = 1 - pow(r.beta2, r.t);
  const double before = 1 - pow(r.beta2, r.t - 1);
  Step s;
  s.m_scale = float(r.beta1 / bc1);
  s.g_scale = float((1 - r.beta1) / bc1);
  s.beta1 = float(r.beta1);
  s.rest1 = float(1 - r.beta1);
  s.inv_bc1 = float(1 / bc1);
  s.beta2 = float(r.beta2);
  s.rest2 = float(1 - r.beta2);
  s.root_scale = float(1 / sqrt(bc2));
  s.old_root_scale = float(before > 0 ? 1 / sqrt(before) : 1.0);  // at t = 1 v is zero, and any finite factor serves
  s.c2 = float((1 - r.beta2) / bc2);
  s.inv_bc2 = float(1 / bc2);
  s.eps = float(r.eps);
  s.l2 = r.decoupled != 0 ? 0.f : float(r.weight_decay);
  s.decay = r.decoupled != 0 ? float(r.lr * r.weight_decay) : 0.f;
  s.lr = float(r.lr);
  s.sign = r.maximize != 0 ? -1.f : 1.f;
  s.amsgrad = r.amsgrad != 0;
  s.rule = rule;
  return s;
}

AG_INLINE bool reads_weights(const Step& s) { return s.l2 != 0 || s.decay != 0; }

// The larger one, NaN where `x` is: fmax would drop it.
AG_INLINE float larger(float floor, float x) { return floor > x ? floor : x; }

struct Element {
  float w, g, m, v, v_max;  // v_max: of other optimizers than Adam whatever they keep third
};

// The gradient that history lets expect, of at least `least`: a tenth of the root mean square of the parameter's.
AG_INLINE float foresee(const Step& s, float m, float v, float least) {
  return s.sign * copysignf(larger(least, sqrtf(v) * s.old_root_scale), m);
}

AG_INLINE float least_foreseen(const Step& s, double mean_v) { return float(0.1 * sqrt(mean_v) * double(s.old_root_scale)); }

// The ends of the gradient's path, a -> e, and the update at a: what momentum and decay do alone.
template <bool AMSGRAD>
struct Ends {
  float a, g, e;
  float low, high;    // second moment at a and e, before bias correction, not below v_max
  float near, far;    // its bias-corrected roots
  float first;        // bias-corrected first moment at a
  float at_a;         // update(a)

  AG_INLINE Ends(const Step& s, const Element& x) {
    a = s.l2 != 0 ? s.l2 * x.w : 0.f;
    g = s.sign * x.g;
    e = a + g;
    low = s.beta2 * x.v + s.rest2 * a * a;
    high = s.beta2 * x.v + s.rest2 * e * e;
    near = sqrtf(AMSGRAD ? larger(x.v_max, low) : low) * s.root_scale;
    far = sqrtf(AMSGRAD ? larger(x.v_max, high) : high) * s.root_scale;
    first = s.m_scale * x.m + s.g_scale * a;
    at_a = first / (near + s.eps);
  }
};

// P per unit of validation gradient, and w - w(empty).
struct Linearized {
  float scale, moved;
};

template <int RULE, bool AMSGRAD>
AG_INLINE Linearized linearize(const Step& s, const Element& x) {
  const Ends<AMSGRAD> p(s, x);
  float S = 1.f;
  if (RULE == FROZEN) {
    S = s.g_scale / (sqrtf(AMSGRAD ? x.v_max : x.v) * s.old_root_scale + s.eps);
  } else if (RULE == TANGENT) {
    float slope = 2.f * s.c2 * p.e;
    if (AMSGRAD) slope = p.high >= x.v_max ? slope : 0.f;
    const float grown = 2.f * p.far;
    const float bracket = grown == 0 ? 0.f : slope / (grown == 0 ? 1.f : grown);
    const float update = (s.m_scale * x.m + s.g_scale * p.e) / (p.far + s.eps);
    S = (s.g_scale - update * bracket) / (p.far + s.eps);
  } else if (RULE == SECANT) {
    float slope = s.c2 * (2.f * p.a + p.g);
    if (AMSGRAD) {  // the second moment stands still below v_max: only the part of the path above it counts
      const bool under_a = p.low < x.v_max, under_e = p.high < x.v_max;
      const float part = (larger(x.v_max, p.high) - larger(x.v_max, p.low)) * s.inv_bc2;
      const float crossing = part / (p.g == 0 ? 1.f : p.g);
      slope = under_a != under_e ? crossing : under_a ? 0.f : slope;
    }
    const float grown = p.near + p.far;
    const float bracket = grown == 0 ? 0.f : slope / (grown == 0 ? 1.f : grown);
    S = (s.g_scale - p.at_a * bracket) / (p.far + s.eps);
  }
  return {S * (s.sign * s.lr), s.lr * p.at_a + (s.decay != 0 ? s.decay * x.w : 0.f)};
}

struct Points {
  float empty, mid;
};

template <bool AMSGRAD>
AG_INLINE Points points(const Step& s, const Element& x) {
  const Ends<AMSGRAD> p(s, x);
  const float at_e = (s.m_scale * x.m + s.g_scale * p.e) / (p.far + s.eps);
  const float empty = (s.decay != 0 ? x.w - s.decay * x.w : x.w) - s.lr * p.at_a;
  return {empty, empty - s.lr * (0.5f * (at_e - p.at_a))};
}

// The two as functions of an element, by which the loops over elements are formed. THIRD: whether v_max is read.
template <int RULE, bool AMSGRAD>
struct LinearizeAdam {
  static constexpr bool THIRD = AMSGRAD;
  const Step& s;
  AG_INLINE Linearized operator()(const Element& x) const { return linearize<RULE, AMSGRAD>(s, x); }
};

template <bool AMSGRAD>
struct PointsOfAdam {
  static constexpr bool THIRD = AMSGRAD;
  const Step& s;
  AG_INLINE Points operator()(const Element& x) const { return points<AMSGRAD>(s, x); }
};

// Calls f with the step's form, which is one for all elements of a tensor.
template <int RULE, class F>
AG_INLINE void with_linearized_by(const Step& s, const F& f) {
  if (s.amsgrad) return f(LinearizeAdam<RULE, true>{s});
  f(LinearizeAdam<RULE, false>{s});
}

template <class F>
AG_INLINE void with_linearized(const Step& s, const F& f) {
  if (s.rule == SECANT) return with_linearized_by<SECANT>(s, f);
  if (s.rule == TANGENT) return with_linearized_by<TANGENT>(s, f);
  if (s.rule == FROZEN) return with_linearized_by<FROZEN>(s, f);
  with_linearized_by<SGD>(s, f);
}

template <class F>
AG_INLINE void with_points(const Step& s, const F& f) {
  if (s.amsgrad) return f(PointsOfAdam<true>{s});
  f(PointsOfAdam<false>{s});
}

// The step's derivatives at one element.
struct Slopes {
  float e;       // what the moments take in: half the second moment's slope along it, over 1-beta2
  float per_m;   // of the step downhill by the new first moment
  float by_u;    // of the weight by the new second moment, through the root; 0 where that has no derivative
  float share;   // the part of the root's second moment that is the new one and not v_max: 1, 1/2 where they are equal, or 0
};

template <bool AMSGRAD>
AG_INLINE Slopes slopes(const Step& s, const Element& x) {
  const float e = (s.l2 != 0 ? s.l2 * x.w : 0.f) + s.sign * x.g;
  const float v = s.beta2 * x.v + s.rest2 * e * e;
  const float root = sqrtf(AMSGRAD ? larger(x.v_max, v) : v) * s.root_scale;
  const float d = root + s.eps;
  const float update = (s.m_scale * x.m + s.g_scale * e) / d;
  const float by_root = s.lr * update / d;
  const float by_u = root == 0 ? 0.f : by_root / (root == 0 ? 1.f : 2.f * root);
  const float share = !AMSGRAD || v > x.v_max ? 1.f : v == x.v_max ? 0.5f : 0.f;
  return {e, s.lr * s.inv_bc1 / d, by_u * s.inv_bc2, share};
}

// Derivatives of one number by an element's state, and by its gradient.
struct Lambdas {
  float w, m, v, v_max, g;
};

// From those by the state after the step to those by the state before it.
template <bool AMSGRAD>
AG_INLINE Lambdas pull_back(const Step& s, const Slopes& y, const Lambdas& after) {
  const float to_m = after.m - after.w * y.per_m;
  const float to_u = AMSGRAD ? after.w * y.by_u + after.v_max : after.w * y.by_u;
  const float to_v = after.v + (AMSGRAD ? to_u * y.share : to_u);
  const float to_e = s.rest1 * to_m + 2.f * s.rest2 * y.e * to_v;
  const float to_w = after.w - s.decay * after.w + s.l2 * to_e;
  return {to_w, s.beta1 * to_m, s.beta2 * to_v, AMSGRAD ? to_u * (1.f - y.share) : after.v_max, s.sign * to_e};
}

}  // namespace adam_ghost
