// The contractions of layer calls, row by row. cpu.cpp includes this as it does cpu_tiles.h: no include guard, no includes.
// A row's products and sums are float32 in an order that depends on the layer's shape alone.

inline float dot(const float* __restrict x, const float* __restrict y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

constexpr int LANES = 16, TOGETHER = AG_ROWS;  // of a block of the product: its columns and its rows, which fit the registers
constexpr int64_t PACKS = 32;  // rows from which on a tile is copied for them, so that it lies in the order in which it is read

// A tile of P: rows `out` to `out_end`, columns `in` to `in_end`, of which block j of LANES has its row o at of(j) + (o - out) * stride.
struct Tile {
  int64_t out, out_end, in, in_end;
  const float* data;
  int64_t stride, block;
};

// along[r][:] += (b @ P) * a of R rows, in block j of the tile's columns; LANES of them where FULL.
template <int R, bool FULL>
void contract_block(const LayerCall& c, const Tile& t, int64_t row, int64_t from, int width, float (*along)[LANES]) {
  const int columns = FULL ? LANES : width;
  float z[R][LANES] = {};  // b @ P
  const float* b = c.b + row * c.d_out + t.out;
  const float* p = t.data + (from - t.in) / LANES * t.block;
  for (int64_t o = 0; o < t.out_end - t.out; ++o, p += t.stride) {
    for (int r = 0; r < R; ++r) {
      const float x = b[r * c.d_out + o];
#pragma omp simd
      for (int d = 0; d < columns; ++d) z[r][d] += x * p[d];
    }
  }
  for (int r = 0; r < R; ++r) {
    const float* a = c.a + (row + r) * c.d_in + from;
#pragma omp simd
    for (int d = 0; d < columns; ++d) along[r][d] += z[r][d] * a[d];
  }
}

// sums[r * K] += (b @ P) . a of R rows, in the tile.
template <int R>
void contract_block_of_rows(const LayerCall& c, const Tile& t, int64_t row, int64_t K, float* sums) {
  float along[R][LANES] = {};
  int64_t from = t.in;
  for (; from + LANES <= t.in_end; from += LANES) contract_block<R, true>(c, t, row, from, LANES, along);
  if (from < t.in_end) contract_block<R, false>(c, t, row, from, int(t.in_end - from), along);
  for (int r = 0; r < R; ++r) {
    float sum = 0;
    for (int d = 0; d < LANES; ++d) sum += along[r][d];
    sums[r * K] += sum;
  }
}

inline Tile pack(Tile t, float* packed) {
  float* to = packed;
  for (int64_t from = t.in; from < t.in_end; from += LANES) {
    const int64_t width = std::min<int64_t>(LANES, t.in_end - from);
    const float* p = t.data + (from - t.in);
    for (int64_t o = t.out; o < t.out_end; ++o, p += t.stride, to += LANES) std::copy_n(p, width, to);
  }
  return {t.out, t.out_end, t.in, t.in_end, packed, LANES, (t.out_end - t.out) * LANES};
}

// sums[(row - first) * K] += the scores of the weight of a linear layer, of rows `first` to `last`.
inline void contract_linear(const LayerCall& c, const float* P, int64_t first, int64_t last, int64_t K, float* sums) {
  alignas(64) float packed[TILE_OUT * TILE_IN];
  for (int64_t out = 0; out < c.d_out; out += TILE_OUT)
    for (int64_t in = 0; in < c.d_in; in += TILE_IN) {
      Tile t{out, std::min(out + TILE_OUT, c.d_out), in, std::min(in + TILE_IN, c.d_in), P + out * c.d_in + in, c.d_in, LANES};
      if (last - first >= PACKS) t = pack(t, packed);
      int64_t row = first;
      const auto take = [&](auto R) {
        for (; row + R <= last; row += R) contract_block_of_rows<R>(c, t, row, K, sums + (row - first) * K);
      };
      take(std::integral_constant<int, TOGETHER>());
      take(std::integral_constant<int, 4>());
      take(std::integral_constant<int, 1>());
    }
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

// sums [rows, K] of the call's rows from `first` on, zeros before.
inline void contract_call(const LayerCall& c, int64_t first, int64_t last, int64_t K, float* sums) {
  for (int64_t k = 0; k < K; ++k) {
    if (c.weight && c.kind == LINEAR) contract_linear(c, c.weight + k * c.d_out * c.d_in, first, last, K, sums + k);
    for (int64_t row = first; row < last; ++row) {
      const float* b = c.b + row * c.d_out;
      float& sum = sums[(row - first) * K + k];
      if (c.weight && c.kind == EMBEDDING) {
        const int64_t at = c.indices[row];
        if (at != c.padding) sum += dot(c.weight + (k * c.d_in + at) * c.d_out, b, c.d_out);
      } else if (c.weight && c.kind != LINEAR) {
        sum += contract_norm(c, c.weight + k * c.d_out, row);
      }
      if (c.bias) sum += dot(b, c.bias + k * c.d_out, c.d_out);
    }
  }
}
