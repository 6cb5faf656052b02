// The CPU kernels: one pass over memory, all parameters' elements shared out to the threads at once.
// Sums are formed per chunk of fixed size and added in order: the result does not depend on the number of threads.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "calls.h"
#include "job.h"

namespace adam_ghost {

// What a layer's call is contracted by: rows of it, at most, and a tile of P, which stays in the second-level cache while they pass.
constexpr int64_t CHUNK_ROWS = 128, TILE_OUT = 256, TILE_IN = 128;

#define AG_ROWS 6
namespace baseline {
#include "cpu_tiles.h"
#include "cpu_calls.h"
}

#if defined(__x86_64__) && defined(__GNUC__)
#define AG_X86 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
namespace avx2 {
#include "cpu_tiles.h"
#include "cpu_calls.h"
}
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#undef AG_ROWS
#define AG_ROWS 8
namespace avx512 {
#include "cpu_tiles.h"
#include "cpu_calls.h"
}
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "cpu_tiles.h"
#include "cpu_calls.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#undef AG_ROWS
#define AG_ROWS 8
namespace avx512 {
#include "cpu_tiles.h"
#include "cpu_calls.h"
}
#pragma GCC pop_options
#if __GNUC__ >= 10
#define AG_HALF 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16,prefer-vector-width=512")
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // in GCC 12's own intrinsics
namespace avx512_bf16 {
#include "cpu_half.h"
}
#pragma GCC diagnostic pop
#pragma GCC pop_options
#endif
#endif
#endif

namespace {

template <class S>
struct StepKernels {
  decltype(&baseline::correct_range<S>) correct;
  decltype(&baseline::move_range<S>) move;
};

struct Kernels {
  StepKernels<Step> adam;
  StepKernels<Fraction> fraction;
  decltype(&baseline::sum_v_range) sum_v;
  decltype(&baseline::adjoint_range) adjoint;
  decltype(&baseline::gradient_sums_range) gradient_sums;
  decltype(&baseline::contract_call) contract_call;
  const char* name;
  decltype(&baseline::contract_linear) contract_half = nullptr;  // where the processor multiplies pairs of bfloat16

  const StepKernels<Step>& of(const Step*) const { return adam; }
  const StepKernels<Fraction>& of(const Fraction*) const { return fraction; }
};

#define AG_KERNELS(of)                                                                                            \
  {                                                                                                               \
    {of::correct_range<Step>, of::move_range<Step>}, {of::correct_range<Fraction>, of::move_range<Fraction>},     \
        of::sum_v_range, of::adjoint_range, of::gradient_sums_range, of::contract_call, #of                       \
  }

Kernels choose() {
#ifdef AG_X86
  __builtin_cpu_init();
  const char* cap = std::getenv("ADAM_GHOST_CPU_CAPABILITY");
  const bool any = cap == nullptr;
  const auto asked = [&](const char* name) { return any || std::strcmp(cap, name) == 0; };
  if (asked("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    Kernels chosen = AG_KERNELS(avx512);
#ifdef AG_HALF
    if (__builtin_cpu_supports("avx512bf16")) chosen.contract_half = avx512_bf16::contract_linear_half;
#endif
    return chosen;
  }
  if ((asked("avx512") || asked("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return AG_KERNELS(avx2);
#endif
  return AG_KERNELS(baseline);
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

constexpr int64_t CHUNK = 16384;      // elements: all its arrays fit the second-level cache
constexpr int64_t CHUNK_COST = 64;    // what starting a chunk costs, in elements
constexpr int64_t PRODUCTS = 32;      // that take as long as an element of the above
constexpr int64_t SERIAL_COST = 32768;  // less work than this is done before other threads have woken

struct Chunk {
  int64_t of, begin, cost_before;  // of: the number of a parameter, or of a call
};

std::vector<Chunk> split(const std::vector<Param>& params, int64_t& cost) {
  std::vector<Chunk> chunks;
  chunks.reserve(params.size());
  cost = 0;
  for (size_t i = 0; i < params.size(); ++i)
    for (int64_t begin = 0; begin < params[i].numel; begin += CHUNK) {
      chunks.push_back({int64_t(i), begin, cost});
      cost += std::min(CHUNK, params[i].numel - begin) + CHUNK_COST;
    }
  return chunks;
}

// Calls work(first chunk, last chunk) so that every thread gets about the same number of elements.
template <class Work>
void share_out(const std::vector<Chunk>& chunks, int64_t cost, const Work& work) {
  uint32_t threads = 1;
  if (cost > SERIAL_COST) torch_get_num_threads(&threads);
  if (threads <= 1) return work(0, chunks.size());
  const auto first_at = [&](int64_t before) {
    return size_t(std::lower_bound(chunks.begin(), chunks.end(), before,
                                   [](const Chunk& c, int64_t x) { return c.cost_before < x; }) - chunks.begin());
  };
  const auto run = [&](int64_t begin, int64_t end) {
    const auto part = [&](int64_t i) { return i == threads ? chunks.size() : first_at(cost / threads * i); };
    work(part(begin), part(end));
  };
  using Run = decltype(run);
  torch_parallel_for(0, threads, 1, [](int64_t begin, int64_t end, void* f) { (*static_cast<const Run*>(f))(begin, end); },
                     const_cast<void*>(static_cast<const void*>(&run)));
}

// The chunks' sums added up for each parameter, in order.
void add_up(const std::vector<Chunk>& chunks, const std::vector<double>& partial, size_t params, int64_t width, double* sums) {
  std::fill_n(sums, params * width, 0.0);
  for (size_t i = 0; i < chunks.size(); ++i)
    for (int64_t j = 0; j < width; ++j) sums[chunks[i].of * width + j] += partial[i * width + j];
}

template <class Row>
using StepOf = decltype(derive(Row{}, SECANT));

template <class Row>
std::vector<StepOf<Row>> derive_rows(const std::vector<Param>& params, const Row* rows, int rule) {
  int64_t count = 0;
  for (const Param& p : params) count = std::max(count, p.row + 1);
  std::vector<StepOf<Row>> steps(count);
  for (int64_t i = 0; i < count; ++i) steps[i] = derive(rows[i], rule);
  return steps;
}

// Calls work(parameter, its step, first element, last element) for all chunks.
template <class Row, class Work>
void in_chunks(const std::vector<Param>& params, const Row* rows, const Work& work) {
  const auto steps = derive_rows(params, rows, SECANT);
  int64_t cost;
  const std::vector<Chunk> chunks = split(params, cost);
  share_out(chunks, cost, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      const Param& p = params[chunks[i].of];
      work(p, steps[p.row], chunks[i].begin, std::min(chunks[i].begin + CHUNK, p.numel));
    }
  });
}

}  // namespace

const char* cpu_capability() { return kernels().name; }
bool contracts_half() { return kernels().contract_half; }

template <class Row>
void variance_correction_cpu(const std::vector<Param>& params, const Row* rows, int rule, int64_t K, double* sums) {
  const int64_t width = sum_count(K);
  const auto steps = derive_rows(params, rows, rule);
  int64_t cost;
  const std::vector<Chunk> chunks = split(params, cost);
  std::vector<double> partial(chunks.size() * width, 0.0), of_chunk(chunks.size(), 0.0), mean_v(params.size(), 0.0);
  if (std::any_of(params.begin(), params.end(), [](const Param& p) { return p.foreseen; })) {
    share_out(chunks, cost, [&](size_t first, size_t last) {
      for (size_t i = first; i < last; ++i) {
        const Param& p = params[chunks[i].of];
        of_chunk[i] = kernels().sum_v(p, chunks[i].begin, std::min(chunks[i].begin + CHUNK, p.numel));
      }
    });
    for (size_t i = 0; i < chunks.size(); ++i) mean_v[chunks[i].of] += of_chunk[i] / double(params[chunks[i].of].numel);
  }
  share_out(chunks, cost, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      const Param& p = params[chunks[i].of];
      const int64_t begin = chunks[i].begin, end = std::min(begin + CHUNK, p.numel);
      float least = 0;
      if constexpr (std::is_same_v<Row, StepRow>) least = least_foreseen(steps[p.row], mean_v[chunks[i].of]);
      kernels().of(steps.data()).correct(p, steps[p.row], K, begin, end, least, &partial[i * width]);
    }
  });
  add_up(chunks, partial, params.size(), width, sums);
}

void gradient_sums_cpu(const std::vector<Param>& params, int64_t K, double* sums) {
  const int64_t width = gradient_sum_count(K);
  int64_t cost;
  const std::vector<Chunk> chunks = split(params, cost);
  std::vector<double> partial(chunks.size() * width, 0.0);
  share_out(chunks, cost, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      const Param& p = params[chunks[i].of];
      kernels().gradient_sums(p, K, chunks[i].begin, std::min(chunks[i].begin + CHUNK, p.numel), &partial[i * width]);
    }
  });
  add_up(chunks, partial, params.size(), width, sums);
}

template <class Row>
void weight_points_cpu(const std::vector<Param>& params, const Row* rows) {
  in_chunks(params, rows, [](const Param& p, const auto& s, int64_t begin, int64_t end) { kernels().of(&s).move(p, s, begin, end); });
}

template void variance_correction_cpu(const std::vector<Param>&, const StepRow*, int, int64_t, double*);
template void variance_correction_cpu(const std::vector<Param>&, const FractionRow*, int, int64_t, double*);
template void weight_points_cpu(const std::vector<Param>&, const StepRow*);
template void weight_points_cpu(const std::vector<Param>&, const FractionRow*);

void adjoint_cpu(const std::vector<Param>& params, const StepRow* rows, int64_t K) {
  in_chunks(params, rows, [K](const Param& p, const Step& s, int64_t begin, int64_t end) {
    kernels().adjoint(p, s, K, begin, end);
  });
}

void contract_calls_cpu(const std::vector<LayerCall>& calls, int64_t n, int64_t K, double* scores) {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  // a row's sums depend on no other row: chunks need not be the same whatever the threads
  const auto per_chunk = [&](const LayerCall& c) { return std::clamp<int64_t>((c.rows / threads + 15) / 16 * 16, 16, CHUNK_ROWS); };
  int64_t cost = 0, rows = 0;
  std::vector<Chunk> chunks;
  std::vector<int64_t> before;  // of each call: the rows of those before it
  for (size_t i = 0; i < calls.size(); ++i) {
    const LayerCall& c = calls[i];
    const int64_t products = K * c.d_out * (c.weight && c.kind == LINEAR ? c.d_in : 1);
    for (int64_t begin = 0; begin < c.rows; begin += per_chunk(c)) {
      chunks.push_back({int64_t(i), begin, cost});
      cost += std::min(per_chunk(c), c.rows - begin) * products / PRODUCTS + CHUNK_COST;
    }
    before.push_back(rows);
    rows += c.rows;
  }
  std::vector<float> found(rows * K);
  share_out(chunks, cost, [&](size_t first, size_t last) {
    for (size_t i = first; i < last; ++i) {
      LayerCall c = calls[chunks[i].of];
      const int64_t begin = chunks[i].begin, end = std::min(begin + per_chunk(c), c.rows);
      float* sums = &found[(before[chunks[i].of] + begin) * K];
      if (c.half) {
        for (int64_t k = 0; k < K; ++k) kernels().contract_half(c, c.weight + k * c.d_out * c.d_in, begin, end, K, sums + k);
        c.weight = nullptr;  // the bias is left
      }
      kernels().contract_call(c, begin, end, K, sums);
    }
  });
  const float* x = found.data();
  for (const LayerCall& c : calls)
    for (int64_t sample = 0; sample < n; ++sample)
      for (int64_t row = 0; row < c.rows / n; ++row)
        for (int64_t k = 0; k < K; ++k) scores[sample * K + k] += double(*x++);
}

}  // namespace adam_ghost
