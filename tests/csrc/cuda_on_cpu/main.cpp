// The CUDA kernels, run on the CPU, against the CPU kernels: directions, weights, adjoints to the bit, sums to double's rounding.
// Buffers end exactly where their tensors do, so that an address sanitizer sees an access beyond.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>

#include "cuda.h"

extern "C" {
int32_t torch_get_num_threads(uint32_t* n) { return *n = 3, 0; }
int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t, void (*f)(int64_t, int64_t, void*), void* context) {
  for (int64_t i = begin; i < end; ++i) f(i, i + 1, context);
  return 0;
}
}

using namespace adam_ghost;

struct Memory {
  std::vector<std::vector<uint8_t>> held;
  std::mt19937 random{7};

  // `offset` elements off the allocation's alignment; positive values where a second moment is drawn.
  Array draw(int64_t numel, Dtype dtype, int offset, bool square = false) {
    const size_t size = dtype == F32 ? 4 : 2;
    held.emplace_back((numel + offset) * size);
    held.back().shrink_to_fit();
    Array a{held.back().data() + offset * size, dtype};
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < numel; ++i) {
      float x = normal(random);
      x = random() % 16 == 0 ? 0 : square ? x * x : x;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (dtype == F32)
        std::memcpy(static_cast<float*>(a.data) + i, &x, 4);
      else
        static_cast<uint16_t*>(a.data)[i] = uint16_t(bits >> 16);
    }
    return a;
  }

  Planes planes(int64_t numel, int64_t K, Dtype dtype, int offset) {
    return {draw(numel * K, dtype, offset).data, K > 1 ? numel : 0, dtype};
  }

  // The same numbers in memory of their own.
  Planes copy(const Planes& from, int64_t numel, int64_t K, int offset) {
    Planes to = planes(numel, K, from.dtype, offset);
    if (numel) std::memcpy(to.data, from.data, numel * K * (from.dtype == F32 ? 4 : 2));
    return to;
  }
};

void compare(const char* what, const std::vector<Param>& a, const std::vector<Param>& b, int plane, int64_t K) {
  for (size_t i = 0; i < a.size(); ++i) {
    const Planes &x = a[i].planes[plane], &y = b[i].planes[plane];
    if (a[i].numel == 0 || !x.data) continue;
    if (std::memcmp(x.data, y.data, a[i].numel * K * (x.dtype == F32 ? 4 : 2)) == 0) continue;
    std::printf("%s of tensor %zu differs, K %d\n", what, i, int(K));
    std::exit(1);
  }
}

std::vector<Param> draw_params(Memory& memory, int rule) {
  std::vector<Param> params;
  for (int64_t i = 0; i < 120; ++i) {  // more than a launch takes; one of more than one chunk
    Param p;
    p.numel = i == 40 ? 16384 * 2 + 13 : i == 90 ? 16384 : i % 23;
    p.row = i % 4;
    const int offset = i % 3;
    p.w = memory.draw(p.numel, Dtype(i & 1), offset);
    if (i % 7) p.g = memory.draw(p.numel, Dtype(i & 1), offset);
    if (i % 5) p.m = memory.draw(p.numel, Dtype(i >> 1 & 1), offset);
    if (i % 5) p.v = memory.draw(p.numel, Dtype(i >> 1 & 1), offset, true);
    p.foreseen = rule % 2 && i % 3 == 0 && p.m.data;
    if (i % 6) p.v_max = memory.draw(p.numel, Dtype(i >> 1 & 1), offset, true);
    params.push_back(p);
  }
  return params;
}

Dtype dtype_of(size_t i) { return Dtype(i >> 2 & 1); }

template <class Fill>
std::vector<Param> filled(const std::vector<Param>& params, const Fill& fill) {
  std::vector<Param> made = params;
  for (size_t i = 0; i < made.size(); ++i) fill(made[i], i);
  return made;
}

template <class Row>
Launch<Row> launch_with(const Row* rows, bool on_device) {
  return {0, nullptr, on_device ? nullptr : rows, on_device ? rows : nullptr, 4};
}

// Directions and weights; returns the number of sums compared.
template <class Row>
int check_steps(const Row* rows, const std::vector<Param>& params, int rule, int64_t K, Memory& memory) {
  const Launch<Row> l = launch_with(rows, (rule + K) % 2);
  const int64_t width = sum_count(K);
  std::vector<double> expected(params.size() * width, NAN), sums(expected);
  std::vector<double> workspace(workspace_bytes_cuda(params, l, width) / 8 + 1, NAN);
  const auto cpu = filled(params, [&](Param& p, size_t i) {
    p.planes[VAL] = memory.planes(p.numel, K, Dtype(i & 1), i % 3);
    p.planes[OUT] = memory.planes(p.numel, K, dtype_of(i), 0);
  });
  const auto cuda = filled(params, [&](Param& p, size_t i) {
    p.planes[VAL] = cpu[i].planes[VAL];
    p.planes[OUT] = memory.planes(p.numel, K, dtype_of(i), i % 4);
  });
  variance_correction_cpu(cpu, rows, rule, K, expected.data());
  if (variance_correction_cuda(l, cuda, rule, K, workspace.data(), sums.data())) std::exit(2);
  compare("P", cpu, cuda, OUT, K);
  for (size_t j = 0; j < sums.size(); ++j)
    if (!(std::fabs(sums[j] - expected[j]) <= 1e-9 * std::fabs(expected[j]) + 1e-12)) {
      std::printf("rule %d, K %d, sum %zu: %g instead of %g\n", rule, int(K), j, sums[j], expected[j]);
      std::exit(1);
    }

  const auto points = [&](Param& p, size_t i) {
    for (int plane : {EMPTY, MID}) p.planes[plane] = memory.planes(p.numel, 1, dtype_of(i), i % 3);
  };
  const auto moved_cpu = filled(params, points), moved_cuda = filled(params, points);
  weight_points_cpu(moved_cpu, rows);
  if (weight_points_cuda(l, moved_cuda, workspace.data())) std::exit(2);
  compare("w(empty)", moved_cpu, moved_cuda, EMPTY, 1);
  compare("w_mid", moved_cpu, moved_cuda, MID, 1);
  return int(sums.size());
}

void check_adjoint(const StepRow* rows, const std::vector<Param>& params, int rule, int64_t K, Memory& memory) {
  const Launch<StepRow> l = launch_with(rows, (rule + K) % 2);
  std::vector<double> workspace(workspace_bytes_cuda(params, l, 0) / 8 + 1, NAN);
  const auto cpu = filled(params, [&](Param& p, size_t i) {
    for (int plane = 0; plane < PLANES; ++plane)
      if (plane != LAMBDA_V_MAX || i % 4 != 2) p.planes[plane] = memory.planes(p.numel, K, dtype_of(i + plane), i % 3);
  });
  const auto cuda = filled(params, [&](Param& p, size_t i) {
    for (int plane = 0; plane < PLANES; ++plane)
      if (plane != LAMBDA_G && cpu[i].planes[plane].data) p.planes[plane] = memory.copy(cpu[i].planes[plane], p.numel, K, i % 4);
    p.planes[LAMBDA_G] = memory.planes(p.numel, K, dtype_of(i + LAMBDA_G), i % 4);
  });
  adjoint_cpu(cpu, rows, K);
  if (adjoint_cuda(l, cuda, K, workspace.data())) std::exit(2);
  const char* names[PLANES] = {"lambda_w", "lambda_m", "lambda_v", "lambda_v_max", "lambda_g"};
  for (int plane = 0; plane < PLANES; ++plane) compare(names[plane], cpu, cuda, plane, K);
}

// Norms of gradients and their products with K directions; returns the number of sums compared.
int check_gradient_sums(const StepRow* rows, const std::vector<Param>& params, int64_t K, Memory& memory) {
  const Launch<StepRow> l = launch_with(rows, K % 2);
  const int64_t width = gradient_sum_count(K);
  const auto gradients = filled(params, [&](Param& p, size_t i) {
    if (K) p.planes[ALONG] = memory.planes(p.numel, K, dtype_of(i), i % 4);
    if (!p.g.data) p.g = memory.draw(p.numel, F32, 1);
  });
  std::vector<double> expected(params.size() * width, NAN), sums(expected);
  std::vector<double> workspace(workspace_bytes_cuda(params, l, width) / 8 + 1, NAN);
  gradient_sums_cpu(gradients, K, expected.data());
  if (gradient_sums_cuda(l, gradients, K, workspace.data(), sums.data())) std::exit(2);
  for (size_t j = 0; j < sums.size(); ++j)
    if (!(std::fabs(sums[j] - expected[j]) <= 1e-9 * std::fabs(expected[j]) + 1e-12)) {
      std::printf("K %d, sum %zu of gradients: %g instead of %g\n", int(K), j, sums[j], expected[j]);
      std::exit(1);
    }
  return int(sums.size());
}

int main() {
  const StepRow adam[] = {{3, 1e-3, 0.9, 0.999, 1e-8, 0, 0, 0, 0},   {1, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0, 1, 0},
                          {500, 3e-4, 0.8, 0.99, 1e-6, 0.1, 1, 0, 1}, {7, 1e-3, 0.9, 0.99, 1e-8, 0.2, 0, 1, 1}};
  const FractionRow others[] = {
      {ROOT, 1e-2, 0, 0.1, 0.8, 0.2, 0.9, 0.1, 0, 0, 1.5, 1e-8, 0.3, 0.7, 0, 0, 1e-3},  // a first moment, decay
      {ROOT, 1e-2, 1, 0, 0, 1, 0.9, 0.1, 0, 0.1, 1, 1e-3, 0, 1, 9e-3, 1, 0},            // centered, a third state
      {LARGEST, 1e-2, 1, 0.2, 0.8, 0.2, 0.7, 0, 0, 0, 1, 1e-8, 0, 2, 0, 0, 0},
      {SIGN, 1e-2, 0, 0, 0.5, 0.5, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 1e-3}};
  int checks = 0;
  for (int64_t K : {int64_t(1), int64_t(2), int64_t(5)})
    for (int rule = SECANT; rule <= SGD; ++rule) {
      Memory memory;
      std::vector<Param> params = draw_params(memory, rule);
      checks += check_steps(adam, params, rule, K, memory);
      check_adjoint(adam, params, rule, K, memory);
      for (const int64_t along : {K, int64_t(0)}) checks += check_gradient_sums(adam, params, along, memory);
      if (rule == FROZEN) continue;
      for (Param& p : params) p.foreseen = false;
      checks += check_steps(others, params, rule, K, memory);
    }
  std::printf("%d sums equal, on %s\n", checks, cpu_capability());
}
