// What the binding hands to the kernels: plain pointers and sizes, no tensor of any framework.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "fraction.h"

namespace adam_ghost {

enum Dtype : uint8_t { F32, BF16 };

struct Array {
  void* data = nullptr;  // null: the optimizer holds no such tensor, read as zeros
  Dtype dtype = F32;
};

// K tensors of a parameter's shape, `stride` elements from one to the next.
struct Planes {
  void* data = nullptr;  // null: not there, or not asked for
  int64_t stride = 0;
  Dtype dtype = F32;

  AG_INLINE Array operator[](int64_t k) const {
    return {static_cast<char*>(data) + k * stride * (dtype == F32 ? 4 : 2), dtype};
  }
};

// What an op's planes are.
enum : int { VAL, OUT };                                         // variance_correction: out may be val
enum : int { ALONG };                                            // gradient_sums: P
enum : int { EMPTY, MID };                                       // weight_points: one each
enum : int { LAMBDA_W, LAMBDA_M, LAMBDA_V, LAMBDA_V_MAX, LAMBDA_G };  // adjoint: the last is written only
constexpr int PLANES = 5;

// The tensors of one parameter, `numel` elements each in one common order.
struct Param {
  int64_t numel = 0;
  int64_t row = 0;          // its row in the step table
  Array w, g, m, v, v_max;  // the state before the step
  Planes planes[PLANES];
  bool foreseen = false;    // Adam's variance_correction: g is what history lets expect of it
};

// Sums of one parameter: K of <P, g>, then K of <val, w - w(empty)>.
inline int64_t sum_count(int64_t K) { return 2 * K; }
// Sums of one gradient: of |g| and g^2, then K of <P, g>.
inline int64_t gradient_sum_count(int64_t K) { return 2 + K; }

// Row: StepRow or FractionRow, whichever the optimizer's steps are.
template <class Row>
void variance_correction_cpu(const std::vector<Param>&, const Row* rows, int rule, int64_t K, double* sums);
template <class Row>
void weight_points_cpu(const std::vector<Param>&, const Row* rows);
void adjoint_cpu(const std::vector<Param>&, const StepRow* rows, int64_t K);
void gradient_sums_cpu(const std::vector<Param>&, int64_t K, double* sums);
const char* cpu_capability();

}  // namespace adam_ghost
