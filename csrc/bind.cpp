// The Python binding: reads lists of tensors into plain pointers, checks them, and runs the kernels on the caller's stream.
// What the kernels do not take is answered by a status before anything is written; adam_op.py explains or falls back.
#include <new>

#include "job.h"
#include "read.h"
#ifdef ADAM_GHOST_WITH_CUDA
#include "cuda.h"
#endif

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
  std::vector<StepRow> steps;        // the step table where the host holds it
  const StepRow* on_device = nullptr;  // or where it lies on the device, and how long it is
  int64_t rows_on_device = 0;
  int64_t K = 1;

  DLDevice device() const { return models.empty() ? DLDevice{kDLCPU, 0} : models[0].x.device; }
};

constexpr int FIELDS = sizeof(StepRow) / sizeof(double);

// The step table [rows, FIELDS] and each parameter's row in it.
void read_table(Job& job, PyObject* table, PyObject* rows) {
  const DLTensor t = view(table);
  require(t.ndim == 2 && t.shape[1] == FIELDS && t.dtype.code == kDLFloat && t.dtype.bits == 64, SHAPE);
  require(row_major(t.shape, t.strides, 2), LAYOUT);
  require(PyList_Check(rows) && PyList_Size(rows) == Py_ssize_t(job.params.size()), SHAPE);
  for (size_t i = 0; i < job.params.size(); ++i) {
    job.params[i].row = PyLong_AsLongLong(PyList_GetItem(rows, i));
    require(job.params[i].row >= 0 && job.params[i].row < t.shape[0], SHAPE);
  }
  const StepRow* data = static_cast<const StepRow*>(t.data);
  if (t.device.device_type == kDLCPU) {
    job.steps.assign(data, data + t.shape[0]);
  } else {
    require(t.device.device_type == job.device().device_type && t.device.device_id == job.device().device_id, DEVICE);
    job.on_device = data;
    job.rows_on_device = t.shape[0];
  }
}

// What both ops share: parameters, Adam's state, steps.
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

// A tensor is read once, also where it stands in two lists: reading costs more than all the rest for a small one.
void read_direction(Job& job, PyObject* vals, PyObject* outs) {
  const Py_ssize_t n = job.params.size();
  const List val(vals, n), out(outs, n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const Model& model = job.models[i];
    Param& p = job.params[i];
    const DLTensor x = view(val[i]), y = out[i] == val[i] ? x : view(out[i]);
    const int lead = x.ndim - model.x.ndim;
    require(lead == 0 || lead == 1, SHAPE);
    const int64_t K = lead == 1 ? x.shape[0] : 1;
    if (i == 0) job.K = K;
    model.check(x, lead);
    model.check(y, lead);
    require(K == job.K && (lead == 0 || y.shape[0] == K), SHAPE);
    p.val = {x.data, dtype_of(x)};
    p.out = {y.data, dtype_of(y)};
    p.val_stride = lead ? x.strides[0] : 0;
    p.out_stride = lead ? y.strides[0] : 0;
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

Launch launch_on(const Job& job) {
  const DLDevice device = job.device();
  Launch l{device.device_id, nullptr, job.steps.data(), job.on_device, job.rows_on_device};
  require(exchange->current_work_stream(device.device_type, device.device_id, &l.stream) == 0, PYTHON_ERROR);
  return l;
}

void report(const char* error) {
  if (!error) return;
  PyErr_Format(PyExc_RuntimeError, "adam_ghost: CUDA error: %s", error);
  throw Refused{PYTHON_ERROR};
}
#endif

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
  int rule;
  if (!PyArg_ParseTuple(args, "OOOOOOOOOiO", &state[0], &state[1], &state[2], &state[3], &state[4], &val, &out, &table, &rows, &rule,
                        &sums))
    return nullptr;
  return answer([&] {
    Job job = read_state(state, table, rows);
    read_direction(job, val, out);
    const DLTensor s = view(sums);
    require(s.ndim == 2 && s.shape[0] == int64_t(job.params.size()) && s.shape[1] == sum_count(job.K) && s.dtype.bits == 64 &&
                row_major(s.shape, s.strides, 2) && rule >= SECANT && rule <= SGD, SHAPE);
    if (job.device().device_type == kDLCPU) {
      const WithoutInterpreterLock unlocked;
      return variance_correction_cpu(job.params, job.steps.data(), rule, job.K, static_cast<double*>(s.data));
    }
#ifdef ADAM_GHOST_WITH_CUDA
    require(job.device().device_type == kDLCUDA, DEVICE);
    const Launch l = launch_on(job);
    const Workspace held(job.device(), workspace_bytes_cuda(job.params, l, job.K));
    report(variance_correction_cuda(l, job.params, rule, job.K, held.data(), static_cast<double*>(s.data)));
#else
    throw Refused{DEVICE};
#endif
  });
}

PyObject* weight_points(PyObject*, PyObject* args) {
  PyObject *state[5], *empties, *mids, *table, *rows;
  if (!PyArg_ParseTuple(args, "OOOOOOOOO", &state[0], &state[1], &state[2], &state[3], &state[4], &empties, &mids, &table, &rows))
    return nullptr;
  return answer([&] {
    Job job = read_state(state, table, rows);
    const Py_ssize_t n = job.params.size();
    const List empty(empties, n), mid(mids, n);
    for (Py_ssize_t i = 0; i < n; ++i) {
      const Model& model = job.models[i];
      job.params[i].empty = model.array(empty[i]);
      job.params[i].mid = model.array(mid[i]);
    }
    if (job.device().device_type == kDLCPU) {
      const WithoutInterpreterLock unlocked;
      return weight_points_cpu(job.params, job.steps.data());
    }
#ifdef ADAM_GHOST_WITH_CUDA
    require(job.device().device_type == kDLCUDA, DEVICE);
    const Launch l = launch_on(job);
    const Workspace held(job.device(), workspace_bytes_cuda(job.params, l, 0));
    report(weight_points_cuda(l, job.params, held.data()));
#else
    throw Refused{DEVICE};
#endif
  });
}

PyObject* built(PyObject*, PyObject*) {
#ifdef ADAM_GHOST_WITH_CUDA
  const char* cuda = cuda_targets();
#else
  const char* cuda = "";
#endif
  return Py_BuildValue("{s:s,s:s}", "cpu", cpu_capability(), "cuda", cuda);
}

PyMethodDef methods[] = {{"variance_correction", variance_correction, METH_VARARGS, nullptr},
                         {"weight_points", weight_points, METH_VARARGS, nullptr},
                         {"built", built, METH_NOARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return prepare_reading() ? PyModule_Create(&module) : nullptr; }
