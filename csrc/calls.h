// Recorded layer calls and what they are contracted with: plain pointers and sizes, no tensor of any framework.
#pragma once
#include <cstdint>
#include <vector>

namespace adam_ghost {

// The order of adam_ghost/scores/together.py.
enum CallKind : int { LINEAR, LAYER_NORM, RMS_NORM, EMBEDDING };

// One call: `rows` rows of inputs and output gradients, all tensors row-major.
struct LayerCall {
  int kind = LINEAR;
  int64_t rows = 0, d_in = 0, d_out = 0;  // an embedding's d_in: its number of rows
  const float* a = nullptr;               // inputs [rows, d_in]
  const int64_t* indices = nullptr;       // an embedding's, [rows]
  const float* b = nullptr;               // output gradients [rows, d_out]
  const float* weight = nullptr;          // P [K, d_out, d_in], a norm's [K, d_out], an embedding's [K, d_in, d_out]; null: none
  const float* bias = nullptr;            // P [K, d_out]; null: none
  double eps = 0;
  bool half = false;                      // b and P are rounded to bfloat16
  int64_t padding = -1;                   // the index without a gradient; -1: none
};

// Adds every sample's scores to `scores` [n, K]; sample i has the rows i * rows / n to (i + 1) * rows / n.
void contract_calls_cpu(const std::vector<LayerCall>&, int64_t n, int64_t K, double* scores);
bool contracts_half();  // whether this processor takes calls that are `half`

}  // namespace adam_ghost
