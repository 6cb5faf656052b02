// Contractions of linear layers' calls with b and P rounded to bfloat16, a and all sums in float32. Included by cpu.cpp, in a
// namespace whose functions may use the processor's products of bfloat16 pairs.

using Pairs = __m512bh;  // of each lane: two neighbours

inline __m512i rounded(const float* x, __mmask16 valid) {  // [16] bfloat16, each in the low half of a lane
  return _mm512_cvtepu16_epi32(__m256i(_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(valid, x))));
}

inline __mmask16 first_of(int64_t n) { return n >= 16 ? 0xffff : __mmask16((1u << std::max<int64_t>(n, 0)) - 1); }

// along[r][:] += (b @ P) * a of R rows and LANES columns; b [R] rows of pairs, `pairs` of them, P [pairs, LANES] pairs.
template <int R>
void contract_pairs(const LayerCall& c, const uint32_t* b, const __m512i* P, int64_t pairs, int64_t row, int64_t from, __m512* along) {
  __m512 z[R];
  for (int r = 0; r < R; ++r) z[r] = _mm512_setzero_ps();
  for (int64_t o = 0; o < pairs; ++o)
    for (int r = 0; r < R; ++r)
      z[r] = _mm512_dpbf16_ps(z[r], Pairs(_mm512_set1_epi32(int(b[r * (TILE_OUT / 2) + o]))), Pairs(P[o]));
  const __mmask16 valid = first_of(c.d_in - from);
  for (int r = 0; r < R; ++r)
    along[r] = _mm512_fmadd_ps(z[r], _mm512_maskz_loadu_ps(valid, c.a + (row + r) * c.d_in + from), along[r]);
}

template <int R>
void contract_row_pairs(const LayerCall& c, const uint32_t* b, const __m512i* P, int64_t pairs, int64_t row, int64_t in,
                        int64_t in_end, int64_t K, float* sums) {
  __m512 along[R];
  for (int r = 0; r < R; ++r) along[r] = _mm512_setzero_ps();
  for (int64_t from = in; from < in_end; from += 16, P += pairs) contract_pairs<R>(c, b, P, pairs, row, from, along);
  for (int r = 0; r < R; ++r) sums[r * K] += _mm512_reduce_add_ps(along[r]);
}

// sums[(row - begin) * K] += the scores of the weight of a linear layer, of rows `begin` to `end`, at most CHUNK_ROWS.
inline void contract_linear_half(const LayerCall& c, const float* P, int64_t begin, int64_t end, int64_t K, float* sums) {
  alignas(64) uint32_t b[CHUNK_ROWS * TILE_OUT / 2];
  alignas(64) __m512i packed[TILE_OUT / 2 * TILE_IN / 16];
  for (int64_t out = 0; out < c.d_out; out += TILE_OUT) {
    const int64_t width = std::min(TILE_OUT, c.d_out - out), pairs = (width + 1) / 2;
    for (int64_t row = begin; row < end; ++row)
      for (int64_t o = 0; o < width; o += 16) {
        const __m256bh x = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first_of(width - o), c.b + row * c.d_out + out + o));
        _mm256_store_si256(reinterpret_cast<__m256i*>(b + (row - begin) * (TILE_OUT / 2) + o / 2), __m256i(x));
      }
    for (int64_t in = 0; in < c.d_in; in += TILE_IN) {
      const int64_t in_end = std::min(in + TILE_IN, c.d_in);
      __m512i* pack = packed;
      for (int64_t from = in; from < in_end; from += 16)
        for (int64_t o = 0; o < width; o += 2) {
          const float* p = P + (out + o) * c.d_in + from;
          const __mmask16 valid = first_of(c.d_in - from);
          const __m512i low = rounded(p, valid), high = o + 1 < width ? rounded(p + c.d_in, valid) : _mm512_setzero_si512();
          *pack++ = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
      for (int64_t row = begin; row < end;) {
        const uint32_t* pairs_of_row = b + (row - begin) * (TILE_OUT / 2);
        float* to = sums + (row - begin) * K;
        if (row + 8 <= end) {
          contract_row_pairs<8>(c, pairs_of_row, packed, pairs, row, in, in_end, K, to), row += 8;
        } else {
          contract_row_pairs<1>(c, pairs_of_row, packed, pairs, row, in, in_end, K, to), row += 1;
        }
      }
    }
  }
}
