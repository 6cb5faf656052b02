// The contractions of small layer calls, row by row. cpu.cpp includes this as it does cpu_tiles.h: no include guard, no includes.
// Products and sums within a row are float32, sums over rows float64: in an order that depends on shapes alone.

inline float dot(const float* __restrict x, const float* __restrict y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

constexpr int LANES = 16, TOGETHER = AG_ROWS;  // of a block of the product: its columns and its rows, which fit the registers

// sums[r] += (b @ P) . a of `R` rows, in columns `from` to `from + width` of the inputs; LANES of them where FULL.
template <int R, bool FULL>
void contract_block(const LayerCall& c, const float* P, int64_t row, int64_t from, int width, float* sums) {
  const int columns = FULL ? LANES : width;
  float z[R][LANES] = {};  // b @ P
  const float* b = c.b + row * c.d_out;
  for (int64_t o = 0; o < c.d_out; ++o) {
    const float* p = P + o * c.d_in + from;
    for (int r = 0; r < R; ++r) {
      const float x = b[r * c.d_out + o];
#pragma omp simd
      for (int d = 0; d < columns; ++d) z[r][d] += x * p[d];
    }
  }
  for (int r = 0; r < R; ++r) sums[r] += dot(z[r], c.a + (row + r) * c.d_in + from, columns);
}

template <int R>
void contract_rows(const LayerCall& c, const float* P, int64_t row, float* sums) {
  int64_t from = 0;
  for (; from + LANES <= c.d_in; from += LANES) contract_block<R, true>(c, P, row, from, LANES, sums);
  if (from < c.d_in) contract_block<R, false>(c, P, row, from, int(c.d_in - from), sums);
}

// The scores of rows from `row` on of the weight of a linear layer: of as many as go together, whose number it returns.
inline int contract_linear(const LayerCall& c, const float* P, int64_t row, float* sums) {
  const int64_t left = c.rows - row;
  if (left >= TOGETHER) return contract_rows<TOGETHER>(c, P, row, sums), TOGETHER;
  if (left >= 4) return contract_rows<4>(c, P, row, sums), 4;
  if (left >= 2) return contract_rows<2>(c, P, row, sums), 2;
  return contract_rows<1>(c, P, row, sums), 1;
}

inline float contract_norm(const LayerCall& c, const float* P, int64_t row) {
  const float *x = c.a + row * c.d_in, *b = c.b + row * c.d_in;
  const int64_t d = c.d_in;
  float mean = 0, square = 0, product = 0;
  if (c.kind == LAYER_NORM) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < d; ++i) mean += x[i];
    mean /= float(d);
  }
#pragma omp simd reduction(+ : square, product)
  for (int64_t i = 0; i < d; ++i) {
    const float y = x[i] - mean;
    square += y * y;
    product += y * b[i] * P[i];
  }
  return product / std::sqrt(square / float(d) + float(c.eps));
}

inline void contract_call(const LayerCall& c, int64_t n, int64_t K, double* scores) {
  const int64_t per_sample = c.rows / n;
  for (int64_t k = 0; k < K; ++k)
    for (int64_t row = 0, done = 1; row < c.rows; row += done) {
      float sums[TOGETHER] = {};
      done = 1;
      if (c.weight && c.kind == LINEAR) {
        done = contract_linear(c, c.weight + k * c.d_out * c.d_in, row, sums);
      } else if (c.weight && c.kind == EMBEDDING) {
        const int64_t at = c.indices[row];
        if (at != c.padding) sums[0] = dot(c.weight + (k * c.d_in + at) * c.d_out, c.b + row * c.d_out, c.d_out);
      } else if (c.weight) {
        sums[0] = contract_norm(c, c.weight + k * c.d_out, row);
      }
      for (int64_t r = 0; r < done; ++r) {
        const float* b = c.b + (row + r) * c.d_out;
        const float of_bias = c.bias ? dot(b, c.bias + k * c.d_out, c.d_out) : 0.f;
        scores[(row + r) / per_sample * K + k] += double(sums[r]) + double(of_bias);
      }
    }
}
