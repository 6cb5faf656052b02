// The CUDA kernels: up to SLOTS tensors a launch, one block per chunk of one tensor, tensors and scalars passed by value.
// Every block writes its own sums; a second launch adds them up in a fixed order, so results are the same to the bit every time.
// Nothing is read back and nothing is allocated: a call can be captured into a graph.
#include <cuda_launch.h>  // csrc/, or a test's

#include <algorithm>
#include <type_traits>

#include "cuda.h"

#ifndef ADAM_GHOST_TARGETS
#define ADAM_GHOST_TARGETS "unknown"
#endif

namespace adam_ghost {
namespace {

constexpr int VECTOR = 8;                     // elements: one 16-byte access in bfloat16, two in float32
constexpr int64_t CHUNK = 16384;              // elements of a block
constexpr int SLOTS = 100;
constexpr int TARGETS = 4;                    // targets of a block; more are spread over the grid

template <class S>  // an optimizer's step: Step or Fraction
struct Slot {
  Param p;
  S step;                 // unused where the steps lie on the device
  int64_t first_chunk;    // of this tensor among all chunks of the call
  int64_t index;          // of this tensor in the call
  bool aligned;           // all its arrays allow 16-byte accesses
};

template <class S>
struct Batch {
  Slot<S> slot[SLOTS];
  uint32_t first_block[SLOTS + 1];
  int count;
  const S* on_device;
};
static_assert(sizeof(Batch<Step>) + 64 <= 32764 && sizeof(Batch<Fraction>) + 64 <= 32764, "a kernel's arguments end here");

struct alignas(16) Bytes16 {
  uint32_t x[4];
};

__device__ __forceinline__ float from_bits(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ uint32_t round_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);  // to nearest, ties to even
  return (x == x ? rounded : bits | 0x400000u) >> 16;
}

// VECTOR elements from `i` on; those at or past `n` are zero. An absent array is zero everywhere.
__device__ __forceinline__ void load(const Array& a, int64_t i, int64_t n, bool whole, float (&x)[VECTOR]) {
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) x[j] = 0.f;
  if (!a.data) return;
  if (a.dtype == F32) {
    const float* from = static_cast<const float*>(a.data) + i;
    if (whole) {
      const Bytes16 low = reinterpret_cast<const Bytes16*>(from)[0], high = reinterpret_cast<const Bytes16*>(from)[1];
#pragma unroll
      for (int j = 0; j < 4; ++j) x[j] = from_bits(low.x[j]), x[j + 4] = from_bits(high.x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j)
        if (i + j < n) x[j] = from[j];
    }
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(a.data) + i;
    if (whole) {
      const Bytes16 all = *reinterpret_cast<const Bytes16*>(from);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[2 * j] = from_bits(all.x[j] << 16), x[2 * j + 1] = from_bits(all.x[j] & 0xffff0000u);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j)
        if (i + j < n) x[j] = from_bits(uint32_t(from[j]) << 16);
    }
  }
}

// One access. A plain store is split into words beside code that stores words.
__device__ __forceinline__ void write16(void* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  __stcg(static_cast<uint4*>(to), make_uint4(a, b, c, d));
}

// Writes `x`, and leaves in it what was written: rounded where the array is bfloat16.
__device__ __forceinline__ void store(const Array& a, int64_t i, int64_t n, bool whole, float (&x)[VECTOR]) {
  if (a.dtype == F32) {
    float* to = static_cast<float*>(a.data) + i;
    if (whole) {
      uint32_t bits[VECTOR];
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) bits[j] = __float_as_uint(x[j]);
      write16(to, bits[0], bits[1], bits[2], bits[3]);
      write16(to + 4, bits[4], bits[5], bits[6], bits[7]);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j)
        if (i + j < n) to[j] = x[j];
    }
  } else {
    uint16_t* to = static_cast<uint16_t*>(a.data) + i;
    uint32_t rounded[VECTOR];
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) rounded[j] = round_bf16(x[j]), x[j] = from_bits(rounded[j] << 16);
    if (whole) {
      write16(to, rounded[0] | rounded[1] << 16, rounded[2] | rounded[3] << 16, rounded[4] | rounded[5] << 16,
              rounded[6] | rounded[7] << 16);
    } else {
#pragma unroll
      for (int j = 0; j < VECTOR; ++j)
        if (i + j < n) to[j] = uint16_t(rounded[j]);
    }
  }
}

template <class S>
__device__ __forceinline__ int slot_of(const Batch<S>& b, uint32_t block) {
  int low = 0, high = b.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (b.first_block[middle] <= block ? low : high) = middle;
  }
  return low;
}

// The sums over every thread's `x`, in the first thread, always in the same order.
template <int COUNT>
__device__ __forceinline__ void block_sum(double (&x)[COUNT]) {
  __shared__ double shared[COUNT][THREADS];
#pragma unroll
  for (int j = 0; j < COUNT; ++j) shared[j][threadIdx.x] = x[j];
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) {
#pragma unroll
      for (int j = 0; j < COUNT; ++j) shared[j][threadIdx.x] += shared[j][threadIdx.x + half];
    }
  }
#pragma unroll
  for (int j = 0; j < COUNT; ++j) x[j] = shared[j][0];
}

// One chunk against targets first_k .. first_k + KB - 1.
template <int KB, class S, class Form>
__device__ __forceinline__ void correct_chunk(const Slot<S>& slot, const S& s, const Form form, int64_t begin, int64_t first_k,
                                              int64_t K, const double* mean_v, double* sums) {
  const Param& p = slot.p;
  double total[2 * KB] = {};  // reached, history of each target
  const int64_t end = begin + CHUNK < p.numel ? begin + CHUNK : p.numel;
  const bool weights = reads_weights(s);
  float least = 0.f;
  if constexpr (std::is_same_v<S, Step>)
    if (p.foreseen) least = least_foreseen(s, mean_v[slot.index]);
  for (int64_t i = begin + int64_t(threadIdx.x) * VECTOR; i < end; i += THREADS * VECTOR) {
    const bool whole = slot.aligned && i + VECTOR <= p.numel;
    float w[VECTOR] = {}, g[VECTOR], m[VECTOR], v[VECTOR], v_max[VECTOR] = {}, scale[VECTOR], moved[VECTOR], x[VECTOR];
    if (weights) load(p.w, i, p.numel, whole, w);
    load(p.g, i, p.numel, whole, g);
    load(p.m, i, p.numel, whole, m);
    load(p.v, i, p.numel, whole, v);
    if (Form::THIRD) load(p.v_max, i, p.numel, whole, v_max);
    if constexpr (std::is_same_v<S, Step>)
      if (p.foreseen) {
#pragma unroll
        for (int j = 0; j < VECTOR; ++j) g[j] = foresee(s, m[j], v[j], least);
      }
    if (KB == 1) load(p.planes[VAL][first_k], i, p.numel, whole, x);  // on its way while the others are worked on
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const Linearized y = form({w[j], g[j], m[j], v[j], v_max[j]});
      scale[j] = y.scale;
      moved[j] = y.moved;
    }
#pragma unroll
    for (int k = 0; k < KB; ++k) {
      if (first_k + k >= K) break;
      if (KB > 1) load(p.planes[VAL][first_k + k], i, p.numel, whole, x);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        total[2 * k + 1] += double(x[j]) * double(moved[j]);
        x[j] *= i + j < p.numel ? scale[j] : 0.f;  // past the end the state is zero, and its scale need not be finite
      }
      store(p.planes[OUT][first_k + k], i, p.numel, whole, x);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) total[2 * k] += double(x[j]) * double(g[j]);
    }
  }
  block_sum(total);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int k = 0; k < KB; ++k)
    if (first_k + k < K) sums[first_k + k] = total[2 * k], sums[K + first_k + k] = total[2 * k + 1];
}

template <int RULE, int KB, class S>
__global__ void __launch_bounds__(THREADS, KB == 1 ? 2 : 1)
    correct(const __grid_constant__ Batch<S> batch, int64_t K, const double* mean_v, double* partial) {
  const int at = slot_of(batch, blockIdx.x);
  const Slot<S>& slot = batch.slot[at];
  const S s = batch.on_device ? batch.on_device[slot.p.row] : slot.step;
  const int64_t chunk = blockIdx.x - batch.first_block[at];
  double* sums = partial + (slot.first_chunk + chunk) * (2 * K);
  with_linearized_by<RULE>(s, [&](const auto form) {
    correct_chunk<KB>(slot, s, form, chunk * CHUNK, int64_t(blockIdx.y) * KB, K, mean_v, sums);
  });
}

// One block per tensor and kind of sum adds up the chunks'.
template <class S>
__global__ void __launch_bounds__(THREADS)
    add_up(const __grid_constant__ Batch<S> batch, int64_t width, const double* partial, double* sums) {
  const Slot<S>& slot = batch.slot[blockIdx.x];
  const int64_t chunks = (slot.p.numel + CHUNK - 1) / CHUNK;
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < chunks; i += THREADS) sum[0] += partial[(slot.first_chunk + i) * width + blockIdx.y];
  block_sum(sum);
  if (threadIdx.x == 0) sums[slot.index * width + blockIdx.y] = sum[0];
}

// One chunk's norms, and its products with directions first_k .. first_k + KB - 1.
template <int KB>
__global__ void __launch_bounds__(THREADS) sum_gradients(const __grid_constant__ Batch<Step> batch, int64_t K, double* partial) {
  const int at = slot_of(batch, blockIdx.x);
  const Slot<Step>& slot = batch.slot[at];
  const int64_t chunk = blockIdx.x - batch.first_block[at], n = slot.p.numel, begin = chunk * CHUNK;
  const int64_t end = begin + CHUNK < n ? begin + CHUNK : n, first_k = int64_t(blockIdx.y) * KB;
  double total[2 + KB] = {};
  for (int64_t i = begin + int64_t(threadIdx.x) * VECTOR; i < end; i += THREADS * VECTOR) {
    const bool whole = slot.aligned && i + VECTOR <= n;
    float g[VECTOR], along[VECTOR];
    load(slot.p.g, i, n, whole, g);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) total[0] += double(fabsf(g[j])), total[1] += double(g[j]) * double(g[j]);
#pragma unroll
    for (int k = 0; k < KB; ++k) {
      if (first_k + k >= K) break;
      load(slot.p.planes[ALONG][first_k + k], i, n, whole, along);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) total[2 + k] += double(along[j]) * double(g[j]);
    }
  }
  block_sum(total);
  if (threadIdx.x != 0) return;
  double* sums = partial + (slot.first_chunk + chunk) * (2 + K);
  if (first_k == 0) sums[0] = total[0], sums[1] = total[1];
#pragma unroll
  for (int k = 0; k < KB; ++k)
    if (first_k + k < K) sums[2 + first_k + k] = total[2 + k];
}

// Each chunk's sum of second moments, and each tensor's mean from these.
__global__ void __launch_bounds__(THREADS) sum_v(const __grid_constant__ Batch<Step> batch, double* partial) {
  const int at = slot_of(batch, blockIdx.x);
  const Slot<Step>& slot = batch.slot[at];
  const int64_t chunk = blockIdx.x - batch.first_block[at], n = slot.p.numel, begin = chunk * CHUNK;
  const int64_t end = begin + CHUNK < n ? begin + CHUNK : n;
  double sum[1] = {};
  for (int64_t i = begin + int64_t(threadIdx.x) * VECTOR; i < end; i += THREADS * VECTOR) {
    float v[VECTOR];
    load(slot.p.v, i, n, slot.aligned && i + VECTOR <= n, v);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) sum[0] += double(v[j]);
  }
  block_sum(sum);
  if (threadIdx.x == 0) partial[slot.first_chunk + chunk] = sum[0];
}

__global__ void __launch_bounds__(THREADS)
    average_v(const __grid_constant__ Batch<Step> batch, const double* partial, double* mean_v) {
  const Slot<Step>& slot = batch.slot[blockIdx.x];
  const int64_t chunks = (slot.p.numel + CHUNK - 1) / CHUNK;
  double sum[1] = {};
  for (int64_t i = threadIdx.x; i < chunks; i += THREADS) sum[0] += partial[slot.first_chunk + i];
  block_sum(sum);
  if (threadIdx.x == 0) mean_v[slot.index] = sum[0] / double(slot.p.numel);
}

template <class S, class Form>
__device__ __forceinline__ void move_chunk(const Slot<S>& slot, const Form form, int64_t begin) {
  const Param& p = slot.p;
  const int64_t end = begin + CHUNK < p.numel ? begin + CHUNK : p.numel;
  for (int64_t i = begin + int64_t(threadIdx.x) * VECTOR; i < end; i += THREADS * VECTOR) {
    const bool whole = slot.aligned && i + VECTOR <= p.numel;
    float w[VECTOR], g[VECTOR], m[VECTOR], v[VECTOR], v_max[VECTOR] = {}, empty[VECTOR], mid[VECTOR];
    load(p.w, i, p.numel, whole, w);
    load(p.g, i, p.numel, whole, g);
    load(p.m, i, p.numel, whole, m);
    load(p.v, i, p.numel, whole, v);
    if (Form::THIRD) load(p.v_max, i, p.numel, whole, v_max);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const Points y = form({w[j], g[j], m[j], v[j], v_max[j]});
      empty[j] = y.empty;
      mid[j] = y.mid;
    }
    if (p.planes[EMPTY].data) store(p.planes[EMPTY][0], i, p.numel, whole, empty);
    if (p.planes[MID].data) store(p.planes[MID][0], i, p.numel, whole, mid);
  }
}

template <class S>
__global__ void __launch_bounds__(THREADS) move_weights(const __grid_constant__ Batch<S> batch) {
  const int at = slot_of(batch, blockIdx.x);
  const Slot<S>& slot = batch.slot[at];
  const S s = batch.on_device ? batch.on_device[slot.p.row] : slot.step;
  const int64_t begin = int64_t(blockIdx.x - batch.first_block[at]) * CHUNK;
  with_points(s, [&](const auto form) { move_chunk(slot, form, begin); });
}

template <bool AMSGRAD>
__device__ __forceinline__ void pull_back_chunk(const Slot<Step>& slot, const Step& s, int64_t begin, int64_t K) {
  const Param& p = slot.p;
  const int64_t end = begin + CHUNK < p.numel ? begin + CHUNK : p.numel;
  for (int64_t i = begin + int64_t(threadIdx.x) * VECTOR; i < end; i += THREADS * VECTOR) {
    const bool whole = slot.aligned && i + VECTOR <= p.numel;
    Slopes y[VECTOR];
    {
      float w[VECTOR] = {}, g[VECTOR], m[VECTOR], v[VECTOR], v_max[VECTOR] = {};
      if (s.l2 != 0) load(p.w, i, p.numel, whole, w);
      load(p.g, i, p.numel, whole, g);
      load(p.m, i, p.numel, whole, m);
      load(p.v, i, p.numel, whole, v);
      if (AMSGRAD) load(p.v_max, i, p.numel, whole, v_max);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) y[j] = slopes<AMSGRAD>(s, {w[j], g[j], m[j], v[j], v_max[j]});
    }
    for (int64_t k = 0; k < K; ++k) {
      float w[VECTOR], m[VECTOR], v[VECTOR], v_max[VECTOR] = {}, g[VECTOR];
      load(p.planes[LAMBDA_W][k], i, p.numel, whole, w);
      load(p.planes[LAMBDA_M][k], i, p.numel, whole, m);
      load(p.planes[LAMBDA_V][k], i, p.numel, whole, v);
      if (AMSGRAD && p.planes[LAMBDA_V_MAX].data) load(p.planes[LAMBDA_V_MAX][k], i, p.numel, whole, v_max);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        const Lambdas z = pull_back<AMSGRAD>(s, y[j], {w[j], m[j], v[j], v_max[j], 0.f});
        w[j] = z.w, m[j] = z.m, v[j] = z.v, v_max[j] = z.v_max, g[j] = z.g;
      }
      store(p.planes[LAMBDA_W][k], i, p.numel, whole, w);
      store(p.planes[LAMBDA_M][k], i, p.numel, whole, m);
      store(p.planes[LAMBDA_V][k], i, p.numel, whole, v);
      if (AMSGRAD && p.planes[LAMBDA_V_MAX].data) store(p.planes[LAMBDA_V_MAX][k], i, p.numel, whole, v_max);
      store(p.planes[LAMBDA_G][k], i, p.numel, whole, g);
    }
  }
}

__global__ void __launch_bounds__(THREADS) pull_back_adjoint(const __grid_constant__ Batch<Step> batch, int64_t K) {
  const int at = slot_of(batch, blockIdx.x);
  const Slot<Step>& slot = batch.slot[at];
  const Step s = batch.on_device ? batch.on_device[slot.p.row] : slot.step;
  const int64_t begin = int64_t(blockIdx.x - batch.first_block[at]) * CHUNK;
  s.amsgrad ? pull_back_chunk<true>(slot, s, begin, K) : pull_back_chunk<false>(slot, s, begin, K);
}

template <class Row>
using StepOf = decltype(derive(Row{}, SECANT));

template <class Row>
__global__ void __launch_bounds__(THREADS) derive_on_device(const Row* rows, int64_t count, int rule, StepOf<Row>* steps) {
  for (int64_t i = threadIdx.x; i < count; i += THREADS) steps[i] = derive(rows[i], rule);
}

int64_t chunks_of(const Param& p) { return (p.numel + CHUNK - 1) / CHUNK; }

bool aligned(const Param& p) {
  uintptr_t bits = 0;
  for (const Array* a : {&p.w, &p.g, &p.m, &p.v, &p.v_max}) bits |= reinterpret_cast<uintptr_t>(a->data);
  for (const Planes& a : p.planes) bits |= reinterpret_cast<uintptr_t>(a.data) | uintptr_t(a.stride) * (a.dtype == F32 ? 4 : 2);
  return bits % 16 == 0;
}

// The tensors' device is current while this lives.
struct OnDevice {
  int before = 0;
  bool moved = false;
  cudaError_t error;

  explicit OnDevice(int device) : error(cudaGetDevice(&before)) {
    moved = error == cudaSuccess && before != device;
    if (moved) error = cudaSetDevice(device);
  }
  ~OnDevice() {  // setting a device makes a context there: only where one is left
    if (moved) cudaSetDevice(before);
  }
};

// Calls run(batch, blocks) for as many tensors as fit a launch, until all are done.
template <class Row, class Run>
const char* in_batches(const Launch<Row>& l, const std::vector<Param>& params, int rule, void* workspace, const Run& run) {
  using S = StepOf<Row>;
  const OnDevice here(l.device);
  if (here.error != cudaSuccess) return cudaGetErrorString(here.error);
  S* steps = l.on_device ? static_cast<S*>(workspace) : nullptr;
  if (steps) launch(derive_on_device<Row>, dim3(1), l.stream, l.on_device, l.rows, rule, steps);
  int64_t chunk = 0;
  Batch<S> batch;
  batch.on_device = steps;
  for (size_t i = 0; i < params.size();) {
    int64_t blocks = 0;
    for (batch.count = 0; i < params.size() && batch.count < SLOTS && blocks + chunks_of(params[i]) < (int64_t(1) << 31); ++i) {
      const Param& p = params[i];
      batch.first_block[batch.count] = uint32_t(blocks);
      batch.slot[batch.count++] = {p, steps ? S{} : derive(l.steps[p.row], rule), chunk, int64_t(i), aligned(p)};
      blocks += chunks_of(p);
      chunk += chunks_of(p);
    }
    if (batch.count == 0) return "a tensor too large for one launch";
    run(batch, blocks);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <int RULE, class S>
void launch_correct(const Batch<S>& batch, int64_t blocks, int64_t K, const double* mean_v, double* partial, void* stream) {
  if (K == 1)
    launch(correct<RULE, 1, S>, dim3(unsigned(blocks)), stream, batch, K, mean_v, partial);
  else
    launch(correct<RULE, TARGETS, S>, dim3(unsigned(blocks), unsigned((K + TARGETS - 1) / TARGETS)), stream, batch, K, mean_v, partial);
}

template <class Row>
int64_t steps_bytes(const Launch<Row>& l) {
  return l.on_device ? (l.rows * int64_t(sizeof(StepOf<Row>)) + 255) / 256 * 256 : 0;
}

}  // namespace

const char* cuda_targets() { return ADAM_GHOST_TARGETS; }

template <class Row>
int64_t workspace_bytes_cuda(const std::vector<Param>& params, const Launch<Row>& l, int64_t width) {
  int64_t chunks = 0;
  if (width)
    for (const Param& p : params) chunks += chunks_of(p);
  // sums of each chunk, and means of each tensor
  return steps_bytes(l) + (chunks * width + (width ? int64_t(params.size()) : 0)) * int64_t(sizeof(double));
}

template <class Row>
const char* variance_correction_cuda(const Launch<Row>& l, const std::vector<Param>& params, int rule, int64_t K, void* workspace,
                                     double* sums) {
  double* mean_v = reinterpret_cast<double*>(static_cast<char*>(workspace) + steps_bytes(l));
  double* partial = mean_v + params.size();
  if constexpr (std::is_same_v<Row, StepRow>) {
    if (std::any_of(params.begin(), params.end(), [](const Param& p) { return p.foreseen; })) {
      const char* error = in_batches(l, params, rule, workspace, [&](const Batch<Step>& batch, int64_t blocks) {
        if (blocks) launch(sum_v, dim3(unsigned(blocks)), l.stream, batch, partial);
        const double* made = partial;
        launch(average_v, dim3(unsigned(batch.count)), l.stream, batch, made, mean_v);
      });
      if (error) return error;
    }
  }
  const double* means = mean_v;
  return in_batches(l, params, rule, workspace, [&](const Batch<StepOf<Row>>& batch, int64_t blocks) {
    if (blocks) {
      if constexpr (std::is_same_v<Row, FractionRow>) {
        launch_correct<SECANT>(batch, blocks, K, means, partial, l.stream);  // whose steps say the rule
      } else {
        switch (rule) {
          case SECANT: launch_correct<SECANT>(batch, blocks, K, means, partial, l.stream); break;
          case TANGENT: launch_correct<TANGENT>(batch, blocks, K, means, partial, l.stream); break;
          case FROZEN: launch_correct<FROZEN>(batch, blocks, K, means, partial, l.stream); break;
          default: launch_correct<SGD>(batch, blocks, K, means, partial, l.stream);
        }
      }
    }
    const double* made = partial;
    launch(add_up<StepOf<Row>>, dim3(unsigned(batch.count), unsigned(sum_count(K))), l.stream, batch, sum_count(K), made, sums);
  });
}

const char* gradient_sums_cuda(const Launch<StepRow>& l, const std::vector<Param>& params, int64_t K, void* workspace, double* sums) {
  double* partial = reinterpret_cast<double*>(static_cast<char*>(workspace) + steps_bytes(l));
  const int64_t width = gradient_sum_count(K);
  return in_batches(l, params, SECANT, workspace, [&](const Batch<Step>& batch, int64_t blocks) {
    if (blocks && K <= 1)
      launch(sum_gradients<1>, dim3(unsigned(blocks)), l.stream, batch, K, partial);
    else if (blocks)
      launch(sum_gradients<TARGETS>, dim3(unsigned(blocks), unsigned((K + TARGETS - 1) / TARGETS)), l.stream, batch, K, partial);
    const double* made = partial;
    launch(add_up<Step>, dim3(unsigned(batch.count), unsigned(width)), l.stream, batch, width, made, sums);
  });
}

template <class Row>
const char* weight_points_cuda(const Launch<Row>& l, const std::vector<Param>& params, void* workspace) {
  return in_batches(l, params, SECANT, workspace, [&](const Batch<StepOf<Row>>& batch, int64_t blocks) {
    if (blocks) launch(move_weights<StepOf<Row>>, dim3(unsigned(blocks)), l.stream, batch);
  });
}

template int64_t workspace_bytes_cuda(const std::vector<Param>&, const Launch<StepRow>&, int64_t);
template int64_t workspace_bytes_cuda(const std::vector<Param>&, const Launch<FractionRow>&, int64_t);
template const char* variance_correction_cuda(const Launch<StepRow>&, const std::vector<Param>&, int, int64_t, void*, double*);
template const char* variance_correction_cuda(const Launch<FractionRow>&, const std::vector<Param>&, int, int64_t, void*, double*);
template const char* weight_points_cuda(const Launch<StepRow>&, const std::vector<Param>&, void*);
template const char* weight_points_cuda(const Launch<FractionRow>&, const std::vector<Param>&, void*);

const char* adjoint_cuda(const Launch<StepRow>& l, const std::vector<Param>& params, int64_t K, void* workspace) {
  return in_batches(l, params, SECANT, workspace, [&](const Batch<Step>& batch, int64_t blocks) {
    if (blocks) launch(pull_back_adjoint, dim3(unsigned(blocks)), l.stream, batch, K);
  });
}

}  // namespace adam_ghost
