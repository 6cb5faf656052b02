// What the binding hands to the kernels: plain pointers and sizes, no tensor of any framework.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "adam.h"

namespace adam_ghost {

enum Dtype : uint8_t { F32, BF16 };

struct Array {
  void* data = nullptr;  // null: the optimizer holds no such tensor, read as zeros
  Dtype dtype = F32;
};

// The tensors of one parameter, `numel` elements each in one common order.
struct Param {
  int64_t numel = 0;
  int64_t row = 0;                           // its row in the step table
  Array w, g, m, v, v_max;                   // inputs
  Array val, out;                            // variance_correction: K planes each
  int64_t val_stride = 0, out_stride = 0;    // elements between planes
  Array empty, mid;                          // weight_points: null where not asked for
};

// Sums of one parameter: K of <P, g>, then K of <val, w - w(empty)>.
inline int64_t sum_count(int64_t K) { return 2 * K; }

void variance_correction_cpu(const std::vector<Param>&, const StepRow* rows, int rule, int64_t K, double* sums);
void weight_points_cpu(const std::vector<Param>&, const StepRow* rows);
const char* cpu_capability();

}  // namespace adam_ghost
