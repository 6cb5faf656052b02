// The steps of the elementwise optimizers beside Adam, for one element: a mean over a size. Shared by the CPU and the CUDA kernels.
// The coefficients are an optimizer's own: adam_ghost/optim/one_pass.py. Here everything is float32.
#pragma once
#include "adam.h"

namespace adam_ghost {

enum Size : int { ROOT, LARGEST, SIGN };  // order of adam_ghost.optim.one_pass.SIZES

// One row of the table: the fields of adam_ghost.optim.one_pass.Coefficients, in order.
struct FractionRow {
  double size, lr, uphill, l2, mean_m, mean_x, square_v, square_x, off_m, off_x, root, eps, plain, adaptive, third, third_w, decay;
};

struct Fraction {
  float lr, sign, l2;
  float mean_m, mean_x;                    // mean = mean_m*m + mean_x*x
  float square_v, square_x, off_m, off_x;  // square = square_v*v + square_x*x^2 - (off_m*m + off_x*x)^2
  float root, eps;                         // size = root*sqrt(square) + eps
  float plain, adaptive;                   // update = plain*mean + adaptive*mean/size
  float third, third_w, decay;             // a step takes off lr*update + third*(v_max - third_w*w) + decay*w
  int size, rule;
};

AG_INLINE Fraction derive(const FractionRow& r, int rule) {
  return {float(r.lr),       r.uphill != 0 ? -1.f : 1.f, float(r.l2),       float(r.mean_m), float(r.mean_x), float(r.square_v),
          float(r.square_x), float(r.off_m),             float(r.off_x),    float(r.root),   float(r.eps),    float(r.plain),
          float(r.adaptive), float(r.third),             float(r.third_w),  float(r.decay),  int(r.size),     rule};
}

AG_INLINE bool reads_weights(const Fraction& s) { return s.l2 != 0 || s.decay != 0 || s.third_w != 0; }

AG_INLINE float sign_of(float x) { return float(x > 0) - float(x < 0); }

// The step at one end of the gradient's path.
template <int SIZE>
struct End {
  float x, mean, off, root, size, update;

  AG_INLINE End(const Fraction& s, const Element& e, float at) : x(at) {
    mean = s.mean_m * e.m + s.mean_x * x;
    off = s.off_m * e.m + s.off_x * x;
    root = SIZE == ROOT ? sqrtf(s.square_v * e.v + s.square_x * x * x - off * off) : 0.f;
    size = SIZE == ROOT ? root * s.root + s.eps : larger(s.square_v * e.v, fabsf(x) + s.eps);
    update = SIZE == SIGN ? sign_of(mean) : s.plain * mean + s.adaptive * (mean / size);
  }
};

AG_INLINE float or_one(bool holds, float x) { return holds ? x : 1.f; }

// The slope of the size between two ends; its derivative where they are one.
template <int SIZE>
AG_INLINE float size_slope(const Fraction& s, const Element& e, const End<SIZE>& near, const End<SIZE>& far) {
  if (SIZE == ROOT) {
    const float grown = near.root + far.root;
    const float slope = s.square_x * (near.x + far.x) - s.off_x * (near.off + far.off);
    return grown == 0 ? 0.f : s.root * (slope / or_one(grown != 0, grown));
  }
  const float from = fabsf(near.x) + s.eps, to = fabsf(far.x) + s.eps, floor = s.square_v * e.v;
  const bool crosses = sign_of(near.x) * sign_of(far.x) < 0, under = from < floor, under_far = to < floor;
  const float part = (far.size - near.size) / or_one(under != under_far, to - from);  // of the path, above the floor
  const float of_size = crosses ? (to - from) / or_one(crosses, far.x - near.x) : sign_of(near.x + far.x);
  return of_size * (under != under_far ? part : under ? 0.f : 1.f);
}

// What the step takes off whatever the gradient.
AG_INLINE float carried(const Fraction& s, const Element& e) { return s.third * (e.v_max - s.third_w * e.w) + s.decay * e.w; }

template <int SIZE>
AG_INLINE Linearized linearize(const Fraction& s, const Element& e) {
  const float a = s.l2 * e.w, b = a + s.sign * e.g;
  const End<SIZE> start(s, e, a), far(s, e, b), near(s, e, s.rule == TANGENT ? b : a);
  float S;
  if (SIZE == SIGN) {
    const float jump = far.update - near.update;
    S = jump == 0 ? 0.f : s.mean_x * (jump / or_one(jump != 0, far.mean - near.mean));
  } else {
    const float slope = size_slope<SIZE>(s, e, near, far);
    S = s.plain * s.mean_x + s.adaptive * ((s.mean_x - near.mean / near.size * slope) / far.size);
  }
  S = s.rule == SGD ? 1.f : S;
  return {S * (s.sign * s.lr), s.lr * start.update + carried(s, e)};
}

template <int SIZE>
AG_INLINE Points points(const Fraction& s, const Element& e) {
  const End<SIZE> start(s, e, s.l2 * e.w), far(s, e, s.l2 * e.w + s.sign * e.g);
  const float empty = e.w - carried(s, e) - s.lr * start.update;
  return {empty, empty - s.lr * (0.5f * (far.update - start.update))};
}

// The two as functions of an element, by which the loops over elements are formed.
template <int SIZE>
struct LinearizeFraction {
  static constexpr bool THIRD = true;
  const Fraction& s;
  AG_INLINE Linearized operator()(const Element& e) const { return linearize<SIZE>(s, e); }
};

template <int SIZE>
struct PointsOfFraction {
  static constexpr bool THIRD = true;
  const Fraction& s;
  AG_INLINE Points operator()(const Element& e) const { return points<SIZE>(s, e); }
};

// Calls f with the step's form, which is one for all elements of a tensor.
template <class F>
AG_INLINE void with_linearized(const Fraction& s, const F& f) {
  if (s.size == ROOT) return f(LinearizeFraction<ROOT>{s});
  if (s.size == LARGEST) return f(LinearizeFraction<LARGEST>{s});
  f(LinearizeFraction<SIGN>{s});
}

template <int, class F>  // of Adam the rule is known when compiling
AG_INLINE void with_linearized_by(const Fraction& s, const F& f) {
  with_linearized(s, f);
}

template <class F>
AG_INLINE void with_points(const Fraction& s, const F& f) {
  if (s.size == ROOT) return f(PointsOfFraction<ROOT>{s});
  if (s.size == LARGEST) return f(PointsOfFraction<LARGEST>{s});
  f(PointsOfFraction<SIGN>{s});
}

}  // namespace adam_ghost
