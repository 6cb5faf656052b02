// The Python binding: reads lists of tensors into plain pointers, checks them, and runs the kernels on the caller's stream.
// What the kernels do not take is answered by a status before anything is written; adam_op.py explains or falls back.
#include <deque>
#include <new>

#include "calls.h"
#include "cuda.h"
#include "read.h"

namespace {

using namespace adam_ghost;

// In the order of adam_op.py's answers.
enum Status : int { DONE, NOT_PLAIN, DTYPE, LAYOUT, SHAPE, DEVICE, PYTHON_ERROR };

struct Refused {
  Status status;
};

void require(bool holds, Status otherwise) {
  if (!holds) throw Refused{otherwise};
}

DLTensor view(PyObject* object) {
  DLTensor x;
  require(read_tensor(object, x), NOT_PLAIN);
  return x;
}

Dtype dtype_of(const DLTensor& x) {
  if (x.dtype.code == kDLFloat && x.dtype.bits == 32) return F32;
  require(x.dtype.code == kDLBfloat && x.dtype.bits == 16, DTYPE);
  return BF16;
}

bool row_major(const int64_t* shape, const int64_t* strides, int ndim) {
  int64_t expected = 1;
  for (int i = ndim - 1; i >= 0; --i) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

// Whether the elements fill one stretch of memory without overlap, in whatever order of the dimensions.
bool dense(const int64_t* shape, const int64_t* strides, int ndim, int64_t numel) {
  int64_t span = 1;
  for (int round = 0; round < ndim; ++round)
    for (int i = 0; i < ndim; ++i)
      if (shape[i] != 1 && strides[i] == span) {
        span *= shape[i];
        break;
      }
  return span == numel;
}

// The parameter that the other tensors are compared with.
struct Model {
  DLTensor x;
  int64_t numel;
  bool row_major;

  explicit Model(PyObject* param) : x(view(param)), numel(1) {
    for (int i = 0; i < x.ndim; ++i) numel *= x.shape[i];
    row_major = ::row_major(x.shape, x.strides, x.ndim);
    require(row_major || numel == 0 || dense(x.shape, x.strides, x.ndim, numel), LAYOUT);
  }

  // `lead` dimensions come before the parameter's own, whose elements must lie in the parameter's order.
  void check(const DLTensor& y, int lead) const {
    require(y.device.device_type == x.device.device_type && y.device.device_id == x.device.device_id, DEVICE);
    require(y.ndim == x.ndim + lead, SHAPE);
    const int64_t *shape = y.shape + lead, *strides = y.strides + lead;
    bool same_strides = true;
    for (int i = 0; i < x.ndim; ++i) {
      require(shape[i] == x.shape[i], SHAPE);
      same_strides &= shape[i] == 1 || strides[i] == x.strides[i];
    }
    require(numel == 0 || same_strides || (row_major && ::row_major(shape, strides, x.ndim)), LAYOUT);
  }

  Array array(PyObject* object) const {
    if (object == Py_None) return {};
    const DLTensor y = view(object);
    check(y, 0);
    return {y.data, dtype_of(y)};
  }
};

// A list with one entry per parameter; an empty one stands for Nones.
struct List {
  PyObject* list;

  List(PyObject* object, Py_ssize_t size) : list(object) {
    require(PyList_Check(object), SHAPE);
    const Py_ssize_t held = PyList_Size(object);
    require(held == size || held == 0, SHAPE);
    if (held == 0) list = nullptr;
  }
  PyObject* operator[](Py_ssize_t i) const { return list ? PyList_GetItem(list, i) : Py_None; }
};

struct Job {
  std::vector<Param> params;
  std::vector<Model> models;
  int64_t fields = 0;                 // of a row of the step table, which tell what optimizer's it is
  std::vector<double> steps;          // the table where the host holds it
  const double* on_device = nullptr;  // or where it lies on the device, and how long it is
  int64_t rows_on_device = 0;
  int lead = 0;  // dimensions before a parameter's own in the op's lists
  int64_t K = 1;

  DLDevice device() const { return models.empty() ? DLDevice{kDLCPU, 0} : models[0].x.device; }
};

template <class Row>
constexpr int64_t FIELDS = sizeof(Row) / sizeof(double);
static_assert(FIELDS<StepRow> != FIELDS<FractionRow>);

// The step table [rows, fields] and each parameter's row in it.
void read_table(Job& job, PyObject* table, PyObject* rows) {
  const DLTensor t = view(table);
  job.fields = t.ndim == 2 ? t.shape[1] : 0;
  require((job.fields == FIELDS<StepRow> || job.fields == FIELDS<FractionRow>) && t.dtype.code == kDLFloat && t.dtype.bits == 64, SHAPE);
  require(row_major(t.shape, t.strides, 2), LAYOUT);
  require(PyList_Check(rows) && PyList_Size(rows) == Py_ssize_t(job.params.size()), SHAPE);
  for (size_t i = 0; i < job.params.size(); ++i) {
    job.params[i].row = PyLong_AsLongLong(PyList_GetItem(rows, i));
    require(job.params[i].row >= 0 && job.params[i].row < t.shape[0], SHAPE);
  }
  const double* data = static_cast<const double*>(t.data);
  if (t.device.device_type == kDLCPU) {
    job.steps.assign(data, data + t.shape[0] * job.fields);
  } else {
    require(t.device.device_type == job.device().device_type && t.device.device_id == job.device().device_id, DEVICE);
    job.on_device = data;
    job.rows_on_device = t.shape[0];
  }
}

// Gradients alone; no step is taken.
Job read_gradients(PyObject* gradients) {
  require(PyList_Check(gradients), SHAPE);
  const Py_ssize_t n = PyList_Size(gradients);
  Job job;
  job.params.resize(n);
  job.models.reserve(n);
  job.fields = FIELDS<StepRow>;
  job.steps.resize(job.fields);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const Model& model = job.models.emplace_back(PyList_GetItem(gradients, i));
    job.params[i].numel = model.numel;
    job.params[i].g = {model.x.data, dtype_of(model.x)};
    require(model.x.device.device_type == job.device().device_type && model.x.device.device_id == job.device().device_id, DEVICE);
  }
  return job;
}

// What the ops share: parameters, Adam's state, steps.
Job read_state(PyObject* const* args, PyObject* table, PyObject* rows) {
  require(PyList_Check(args[0]), SHAPE);
  const Py_ssize_t n = PyList_Size(args[0]);
  const List g(args[1], n), m(args[2], n), v(args[3], n), v_max(args[4], n);
  Job job;
  job.params.resize(n);
  job.models.reserve(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const Model& model = job.models.emplace_back(PyList_GetItem(args[0], i));
    Param& p = job.params[i];
    p.numel = model.numel;
    p.w = {model.x.data, dtype_of(model.x)};
    p.g = model.array(g[i]);
    p.m = model.array(m[i]);
    p.v = model.array(v[i]);
    p.v_max = model.array(v_max[i]);
    require(model.x.device.device_type == job.device().device_type && model.x.device.device_id == job.device().device_id, DEVICE);
  }
  read_table(job, table, rows);
  return job;
}

// An op's own lists: tensors of the parameter's shape, or of K of them; those that `optional` has the bit of may be None.
void read_planes(Job& job, std::initializer_list<PyObject*> objects, unsigned optional) {
  std::vector<List> lists;
  for (PyObject* object : objects) lists.emplace_back(object, job.params.size());
  for (size_t i = 0; i < job.params.size(); ++i) {
    const Model& model = job.models[i];
    for (size_t j = 0; j < lists.size(); ++j) {
      if (lists[j][i] == Py_None && (optional >> j & 1)) continue;
      const DLTensor x = view(lists[j][i]);
      const int lead = x.ndim - model.x.ndim;
      if (i == 0 && j == 0) job.lead = lead, job.K = lead == 1 ? x.shape[0] : 1;
      require((lead == 0 || lead == 1) && lead == job.lead, SHAPE);
      model.check(x, lead);
      require(lead == 0 || x.shape[0] == job.K, SHAPE);
      const int64_t stride = job.K > 1 ? x.strides[0] : 0;
      require(job.K <= 1 || stride >= model.numel, LAYOUT);
      job.params[i].planes[j] = {x.data, stride, dtype_of(x)};
    }
  }
}

struct WithoutInterpreterLock {
  PyThreadState* thread = PyEval_SaveThread();
  ~WithoutInterpreterLock() { PyEval_RestoreThread(thread); }
};

#ifdef ADAM_GHOST_WITH_CUDA
// Device memory from the framework's own allocator, given back once the launches that use it are queued: memory is reused in
// the order of the stream that it was taken on.
struct Workspace {
  DLManagedTensorVersioned* held = nullptr;

  Workspace(DLDevice device, int64_t bytes) {
    if (bytes == 0) return;
    DLTensor want{nullptr, device, 1, {kDLUInt, 8, 1}, &bytes, nullptr, 0};
    const auto fail = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
    require(exchange->managed_tensor_allocator(&want, &held, nullptr, fail) == 0, PYTHON_ERROR);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (held) held->deleter(held);
  }
  void* data() const { return held ? held->dl_tensor.data : nullptr; }
};

template <class Row>
Launch<Row> launch_on(const Job& job) {
  const DLDevice device = job.device();
  const auto rows = [](const double* data) { return reinterpret_cast<const Row*>(data); };
  Launch<Row> l{device.device_id, nullptr, rows(job.steps.data()), rows(job.on_device), job.rows_on_device};
  require(exchange->current_work_stream(device.device_type, device.device_id, &l.stream) == 0, PYTHON_ERROR);
  return l;
}

void report(const char* error) {
  if (!error) return;
  PyErr_Format(PyExc_RuntimeError, "adam_ghost: CUDA error: %s", error);
  throw Refused{PYTHON_ERROR};
}
#endif

// Runs the kernel of the tensors' device. `cuda` is a template, so that a build without CUDA needs none of its functions.
template <class Row, class Cpu, class Cuda>
void run(const Job& job, int64_t sums, const Cpu& cpu, [[maybe_unused]] const Cuda& cuda) {
  if (job.device().device_type == kDLCPU) {
    const WithoutInterpreterLock unlocked;
    return cpu(reinterpret_cast<const Row*>(job.steps.data()));
  }
#ifdef ADAM_GHOST_WITH_CUDA
  require(job.device().device_type == kDLCUDA, DEVICE);
  const auto l = launch_on<Row>(job);
  const Workspace held(job.device(), workspace_bytes_cuda(job.params, l, sums));
  report(cuda(l, held.data()));
#else
  (void)sums;
  throw Refused{DEVICE};
#endif
}

// The same for an op that every optimizer's steps have.
template <class Cpu, class Cuda>
void run_any(const Job& job, int64_t sums, const Cpu& cpu, const Cuda& cuda) {
  job.fields == FIELDS<StepRow> ? run<StepRow>(job, sums, cpu, cuda) : run<FractionRow>(job, sums, cpu, cuda);
}

// Runs `body` and turns refusals into a status; C++ exceptions do not pass into the interpreter.
template <class Body>
PyObject* answer(const Body& body) {
  Status status = DONE;
  try {
    body();
  } catch (const Refused& r) {
    status = r.status;
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
  if (status == PYTHON_ERROR || PyErr_Occurred()) return nullptr;
  return PyLong_FromLong(status);
}

PyObject* variance_correction(PyObject*, PyObject* args) {
  PyObject *state[5], *val, *out, *table, *rows, *sums;
  int rule, foreseen;
  if (!PyArg_ParseTuple(args, "OOOOOOOOOipO", &state[0], &state[1], &state[2], &state[3], &state[4], &val, &out, &table, &rows,
                        &rule, &foreseen, &sums))
    return nullptr;
  return answer([&] {
    Job job = read_state(state, table, rows);
    read_planes(job, {val, out}, 0);
    const DLTensor s = view(sums);
    require(s.ndim == 2 && s.shape[0] == int64_t(job.params.size()) && s.shape[1] == sum_count(job.K) && s.dtype.bits == 64 &&
                row_major(s.shape, s.strides, 2) && rule >= SECANT && rule <= SGD, SHAPE);
    double* to = static_cast<double*>(s.data);
    require(job.fields == FIELDS<StepRow> || (!foreseen && rule != FROZEN), SHAPE);
    for (Param& p : job.params) p.foreseen = foreseen && p.m.data && p.v.data;
    run_any(job, sum_count(job.K), [&](const auto* rows) { variance_correction_cpu(job.params, rows, rule, job.K, to); },
        [&](const auto& l, void* workspace) { return variance_correction_cuda(l, job.params, rule, job.K, workspace, to); });
  });
}

PyObject* gradient_sums(PyObject*, PyObject* args) {
  PyObject *gradients, *along, *sums;
  if (!PyArg_ParseTuple(args, "OOO", &gradients, &along, &sums)) return nullptr;
  return answer([&] {
    Job job = read_gradients(gradients);
    const bool any = PyList_Check(along) && PyList_Size(along) > 0;
    if (any) read_planes(job, {along}, 0);
    const int64_t K = any ? job.K : 0;
    const DLTensor s = view(sums);
    require(s.ndim == 2 && s.shape[0] == int64_t(job.params.size()) && s.shape[1] == gradient_sum_count(K) && s.dtype.bits == 64 &&
                row_major(s.shape, s.strides, 2), SHAPE);
    double* to = static_cast<double*>(s.data);
    run<StepRow>(job, gradient_sum_count(K), [&](const StepRow*) { gradient_sums_cpu(job.params, K, to); },
        [&](const auto& l, void* workspace) { return gradient_sums_cuda(l, job.params, K, workspace, to); });
  });
}

PyObject* weight_points(PyObject*, PyObject* args) {
  PyObject *state[5], *empty, *mid, *table, *rows;
  if (!PyArg_ParseTuple(args, "OOOOOOOOO", &state[0], &state[1], &state[2], &state[3], &state[4], &empty, &mid, &table, &rows))
    return nullptr;
  return answer([&] {
    Job job = read_state(state, table, rows);
    read_planes(job, {empty, mid}, 1u << EMPTY | 1u << MID);
    require(job.lead == 0, SHAPE);
    run_any(job, 0, [&](const auto* rows) { weight_points_cpu(job.params, rows); },
        [&](const auto& l, void* workspace) { return weight_points_cuda(l, job.params, workspace); });
  });
}

PyObject* adjoint(PyObject*, PyObject* args) {
  PyObject *state[5], *lambda[PLANES], *table, *rows;
  if (!PyArg_ParseTuple(args, "OOOOOOOOOOOO", &state[0], &state[1], &state[2], &state[3], &state[4], &lambda[LAMBDA_W],
                        &lambda[LAMBDA_M], &lambda[LAMBDA_V], &lambda[LAMBDA_V_MAX], &lambda[LAMBDA_G], &table, &rows))
    return nullptr;
  return answer([&] {
    Job job = read_state(state, table, rows);
    read_planes(job, {lambda[0], lambda[1], lambda[2], lambda[3], lambda[4]}, 1u << LAMBDA_V_MAX);
    for (const Param& p : job.params)
      for (int i = 0; i < PLANES; ++i)
        for (int j = 0; j < i; ++j) require(p.numel == 0 || !p.planes[i].data || p.planes[i].data != p.planes[j].data, SHAPE);
    require(job.fields == FIELDS<StepRow>, SHAPE);
    run<StepRow>(job, 0, [&](const StepRow* rows) { adjoint_cpu(job.params, rows, job.K); },
        [&](const auto& l, void* workspace) { return adjoint_cuda(l, job.params, job.K, workspace); });
  });
}

int64_t size(const DLTensor& x) {
  int64_t numel = 1;
  for (int i = 0; i < x.ndim; ++i) numel *= x.shape[i];
  return numel;
}

// Tensors of one type on the CPU in row-major order; copies of those that lie otherwise live as long as this.
template <class T, DLDataTypeCode CODE>
struct RowMajor {
  std::deque<std::vector<T>> copies;

  const T* operator()(const DLTensor& x) {
    require(x.device.device_type == kDLCPU, DEVICE);
    require(x.dtype.code == CODE && x.dtype.bits == 8 * sizeof(T), DTYPE);
    if (row_major(x.shape, x.strides, x.ndim)) return static_cast<const T*>(x.data);
    std::vector<T>& copy = copies.emplace_back(size(x));
    std::vector<int64_t> at(x.ndim, 0);
    int64_t from = 0;
    for (T& value : copy) {
      value = static_cast<const T*>(x.data)[from];
      for (int i = x.ndim - 1; i >= 0; --i) {
        from += x.strides[i];
        if (++at[i] < x.shape[i]) break;
        from -= at[i] * x.strides[i];
        at[i] = 0;
      }
    }
    return copy.data();
  }

};

struct Held {
  RowMajor<float, kDLFloat> floats;
  RowMajor<int64_t, kDLInt> indices;
};

// A call as together.py tells it: (kind, input, output gradient, P of the weight or None, P of the bias or None, eps, padding).
LayerCall read_call(PyObject* told, int64_t n, int64_t K, int64_t largest, int64_t products, int64_t half_from, Held& held) {
  require(PyTuple_Check(told) && PyTuple_Size(told) == 7, SHAPE);
  const auto item = [&](Py_ssize_t i) { return PyTuple_GetItem(told, i); };
  LayerCall c;
  c.kind = int(PyLong_AsLong(item(0)));
  c.eps = PyFloat_AsDouble(item(5));
  c.padding = PyLong_AsLongLong(item(6));
  const DLTensor a = view(item(1)), b = view(item(2));
  require(b.ndim >= 1 && b.shape[0] % n == 0, SHAPE);
  c.d_out = b.shape[b.ndim - 1];
  require(c.d_out > 0, SHAPE);
  c.rows = size(b) / c.d_out;
  require(c.rows % n == 0, SHAPE);
  const bool embedding = c.kind == EMBEDDING;
  require(a.ndim >= 1 && a.shape[0] == b.shape[0] && (embedding || a.ndim == b.ndim), SHAPE);
  if (!embedding) c.d_in = a.shape[a.ndim - 1];
  require(size(a) == c.rows * (embedding ? 1 : c.d_in), SHAPE);
  if (item(3) != Py_None) {
    const DLTensor P = view(item(3));
    const bool norm = c.kind == LAYER_NORM || c.kind == RMS_NORM;
    require(P.ndim == (norm ? 2 : 3) && P.shape[0] == K, SHAPE);
    if (embedding) c.d_in = P.shape[1];
    if (embedding) require(P.shape[2] == c.d_out, SHAPE);
    if (norm) require(P.shape[1] == c.d_out && c.d_in == c.d_out, SHAPE);
    if (c.kind == LINEAR) require(P.shape[1] == c.d_out && P.shape[2] == c.d_in && c.d_in > 0, SHAPE);
    require(c.kind != LINEAR || (c.d_out * c.d_in <= largest && c.rows * c.d_out * c.d_in <= products / K), SHAPE);
    c.weight = held.floats(P);
  }
  if (item(4) != Py_None) {
    const DLTensor P = view(item(4));
    require(P.ndim == 2 && P.shape[0] == K && P.shape[1] == c.d_out, SHAPE);
    c.bias = held.floats(P);
  }
  c.half = c.weight && c.kind == LINEAR && contracts_half() && c.rows * c.d_in * c.d_out >= half_from;
  c.b = held.floats(b);
  if (!embedding) return c.a = held.floats(a), c;
  c.indices = held.indices(a);
  for (int64_t i = 0; c.weight && i < c.rows; ++i) require(c.indices[i] >= 0 && c.indices[i] < c.d_in, SHAPE);
  return c;
}

// The numbers of those calls that are left: of other dtypes, shapes or devices, of a linear layer's weight of more than `largest`
// elements, or of more than `products` multiplications. From `half_from` multiplications on operands are rounded to bfloat16.
PyObject* contract_calls(PyObject*, PyObject* args) {
  PyObject *told, *scores;
  long long largest, products, half_from;
  if (!PyArg_ParseTuple(args, "O!OLLL", &PyList_Type, &told, &scores, &largest, &products, &half_from)) return nullptr;
  PyObject* left = PyList_New(0);
  if (!left) return nullptr;
  PyObject* status = answer([&] {
    const DLTensor s = view(scores);
    require(s.device.device_type == kDLCPU && s.ndim == 2 && s.dtype.code == kDLFloat && s.dtype.bits == 64 && s.shape[0] > 0 &&
                s.shape[1] > 0 && row_major(s.shape, s.strides, 2), SHAPE);
    Held held;
    std::vector<LayerCall> calls;
    for (Py_ssize_t i = 0; i < PyList_Size(told); ++i) {
      try {
        calls.push_back(read_call(PyList_GetItem(told, i), s.shape[0], s.shape[1], largest, products, half_from, held));
      } catch (const Refused&) {
        PyObject* number = PyLong_FromSsize_t(i);
        if (number) PyList_Append(left, number);
        Py_XDECREF(number);
      }
    }
    const WithoutInterpreterLock unlocked;
    contract_calls_cpu(calls, s.shape[0], s.shape[1], static_cast<double*>(s.data));
  });
  const bool done = status && PyLong_AsLong(status) == DONE;
  Py_XDECREF(status);
  if (done) return left;
  Py_DECREF(left);
  if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "scores: expected float64 [n, K] on the CPU, of at least one element");
  return nullptr;
}

PyObject* built(PyObject*, PyObject*) {
#ifdef ADAM_GHOST_WITH_CUDA
  const char* cuda = cuda_targets();
#else
  const char* cuda = "";
#endif
  return Py_BuildValue("{s:s,s:s,s:s}", "cpu", cpu_capability(), "cuda", cuda, "cpu_bfloat16", contracts_half() ? "avx512_bf16" : "");
}

PyMethodDef methods[] = {{"variance_correction", variance_correction, METH_VARARGS, nullptr},
                         {"gradient_sums", gradient_sums, METH_VARARGS, nullptr},
                         {"weight_points", weight_points, METH_VARARGS, nullptr},
                         {"adjoint", adjoint, METH_VARARGS, nullptr},
                         {"contract_calls", contract_calls, METH_VARARGS, nullptr},
                         {"built", built, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return prepare_reading() ? PyModule_Create(&module) : nullptr; }
