// The CUDA kernels, run on the CPU, against the CPU kernels: directions and weights to the bit, sums to double's rounding.
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
};

void compare(const char* what, const Array& a, const Array& b, int64_t numel) {
  if (numel == 0 || std::memcmp(a.data, b.data, numel * (a.dtype == F32 ? 4 : 2)) == 0) return;
  std::printf("%s differs\n", what);
  std::exit(1);
}

int main() {
  const StepRow rows[] = {{3, 1e-3, 0.9, 0.999, 1e-8, 0, 0, 0, 0},   {1, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0, 1, 0},
                          {500, 3e-4, 0.8, 0.99, 1e-6, 0.1, 1, 0, 1}, {7, 1e-3, 0.9, 0.99, 1e-8, 0.2, 0, 1, 1}};
  int checks = 0;
  for (int64_t K : {int64_t(1), int64_t(2), int64_t(5)})
    for (int rule = SECANT; rule <= SGD; ++rule) {
        const bool on_device = (rule + K) % 2;
        Memory memory;
        std::vector<Param> params, others;
        for (int64_t i = 0; i < 120; ++i) {  // more than a launch takes; one of more than one chunk
          Param p;
          p.numel = i == 40 ? 16384 * 2 + 13 : i == 90 ? 16384 : i % 23;
          p.row = i % 4;
          const int offset = i % 3;
          const auto dtype = [&](int bit) { return Dtype((i >> bit) & 1); };
          p.w = memory.draw(p.numel, dtype(0), offset);
          if (i % 7) p.g = memory.draw(p.numel, dtype(0), offset);
          if (i % 5) p.m = memory.draw(p.numel, dtype(1), offset);
          if (i % 5) p.v = memory.draw(p.numel, dtype(1), offset, true);
          if (i % 6) p.v_max = memory.draw(p.numel, dtype(1), offset, true);
          p.val_stride = p.out_stride = K > 1 ? p.numel : 0;
          p.val = memory.draw(p.numel * K, dtype(0), offset);
          Param q = p;
          p.out = memory.draw(p.numel * K, dtype(2), 0);
          q.out = memory.draw(p.numel * K, dtype(2), i % 4);
          p.empty = memory.draw(p.numel, dtype(0), 0), q.empty = memory.draw(p.numel, dtype(0), 0);
          p.mid = memory.draw(p.numel, dtype(0), 0), q.mid = memory.draw(p.numel, dtype(0), offset);
          params.push_back(p);
          others.push_back(q);
        }
        const int64_t width = sum_count(K);
        std::vector<double> expected(params.size() * width, NAN), sums(expected);
        const Launch l{0, nullptr, on_device ? nullptr : rows, on_device ? rows : nullptr, 4};
        std::vector<double> workspace(workspace_bytes_cuda(others, l, K) / 8 + 1, NAN);
        variance_correction_cpu(params, rows, rule, K, expected.data());
        weight_points_cpu(params, rows);
        if (variance_correction_cuda(l, others, rule, K, workspace.data(), sums.data())) return 2;
        if (weight_points_cuda(l, others, workspace.data())) return 2;
        for (size_t i = 0; i < params.size(); ++i) {
          compare("P", params[i].out, others[i].out, params[i].numel * K);
          compare("w(empty)", params[i].empty, others[i].empty, params[i].numel);
          compare("w_mid", params[i].mid, others[i].mid, params[i].numel);
          for (int64_t j = i * width; j < int64_t(i + 1) * width; ++j, ++checks)
            if (!(std::fabs(sums[j] - expected[j]) <= 1e-9 * std::fabs(expected[j]) + 1e-12)) {
              std::printf("rule %d, K %d, tensor %zu, sum %d: %g instead of %g\n", rule, int(K), i, int(j % width), sums[j], expected[j]);
              return 1;
            }
        }
      }
  std::printf("%d sums equal, on %s\n", checks, cpu_capability());
}
