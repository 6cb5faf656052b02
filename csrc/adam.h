// Adam's step and its linearizations for one element, shared by the CPU and the CUDA kernels (symbols: docs/method.md).
// The definitions are adam_ghost/optim/adam_definition.py; here everything is float32 and small denominators are divided by one after another.
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
  float beta2, rest2;        // beta2, 1-beta2
  float root_scale;          // 1/sqrt(bc2)
  float old_root_scale;      // the same for the state before the step
  float c2, inv_bc2;         // (1-beta2)/bc2, 1/bc2
  float eps, l2, decay, lr;  // decay: lr*weight_decay when decoupled
  float sign;                // -1 under maximize
  bool amsgrad;
};

AG_INLINE Step derive(const StepRow& r) {
  const double bc1 = 1 - pow(r.beta1, r.t), bc2 = 1 - pow(r.beta2, r.t);
  const double before = 1 - pow(r.beta2, r.t - 1);
  Step s;
  s.m_scale = float(r.beta1 / bc1);
  s.g_scale = float((1 - r.beta1) / bc1);
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
  return s;
}

AG_INLINE bool reads_weights(const Step& s) { return s.l2 != 0 || s.decay != 0; }

// The larger one, NaN where `x` is: fmax would drop it.
AG_INLINE float larger(float floor, float x) { return floor > x ? floor : x; }

struct Element {
  float w, g, m, v, v_max;
};

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

}  // namespace adam_ghost
