// The Python binding: reads lists of tensors into plain pointers, checks them, and runs the kernels on the caller's stream.
// Tensors are read through DLPack's C exchange API: some nanoseconds each, no C++ of the framework, one binary for every torch
// that has it. What the kernels do not take is answered by a status before anything is written; ops.py explains or falls back.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

#include <new>

#include "job.h"
#ifdef ADAM_GHOST_WITH_CUDA
#include "cuda.h"
#endif

namespace {

using namespace adam_ghost;

// In the order of ops.py's answers.
enum Status : int { DONE, NOT_PLAIN, DTYPE, LAYOUT, SHAPE, DEVICE, PYTHON_ERROR };

struct Refused {
  Status status;
};

const DLPackExchangeAPI* exchange = nullptr;
PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

void require(bool holds, Status otherwise) {
  if (!holds) throw Refused{otherwise};
}

// Plain tensors only: a subclass may not hold the memory that it shows (fake tensors, DTensor), and goes through the dispatcher.
DLTensor view(PyObject* object) {
  require(Py_TYPE(object) == tensor_type || Py_TYPE(object) == parameter_type, NOT_PLAIN);
  DLTensor x;
  if (exchange->dltensor_from_py_object_no_sync(object, &x) != 0) {  // sparse, meta and the like
    PyErr_Clear();
    throw Refused{NOT_PLAIN};
  }
  x.data = static_cast<char*>(x.data) + x.byte_offset;
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
  int64_t K = 1;
  DLDevice device{kDLCPU, 0};
  const StepRow* rows = nullptr;
  bool rows_on_device = false;
};

// State shared by both ops: parameters, moments, the step table and each parameter's row in it (empty: row 0).
Job read_state(PyObject* const* args, PyObject* table, PyObject* rows) {
  require(PyList_Check(args[0]), SHAPE);
  const Py_ssize_t n = PyList_Size(args[0]);
  const List w(args[0], n), g(args[1], n), m(args[2], n), v(args[3], n), v_max(args[4], n), row(rows, n);
  Job job;
  const DLTensor t = view(table);
  require(t.ndim == 2 && t.shape[1] == int64_t(sizeof(StepRow) / sizeof(double)) && t.dtype.bits == 64, SHAPE);
  require(row_major(t.shape, t.strides, 2), LAYOUT);
  job.rows = static_cast<const StepRow*>(t.data);
  job.params.resize(n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const Model model(w[i]);
    Param& p = job.params[i];
    p.numel = model.numel;
    p.w = {model.x.data, dtype_of(model.x)};
    p.g = model.array(g[i]);
    p.m = model.array(m[i]);
    p.v = model.array(v[i]);
    p.v_max = model.array(v_max[i]);
    if (row[i] != Py_None) p.row = PyLong_AsLongLong(row[i]);
    require(p.row >= 0 && p.row < t.shape[0], SHAPE);
    if (i == 0) job.device = model.x.device;
    require(model.x.device.device_type == job.device.device_type && model.x.device.device_id == job.device.device_id, DEVICE);
  }
  job.rows_on_device = t.device.device_type != kDLCPU;
  require(!job.rows_on_device || (t.device.device_type == job.device.device_type && t.device.device_id == job.device.device_id),
          DEVICE);
  return job;
}

void read_direction(Job& job, PyObject* params, PyObject* const* args) {
  const Py_ssize_t n = job.params.size();
  const List w(params, n), val(args[0], n), dot(args[1], n), out(args[2], n);
  for (Py_ssize_t i = 0; i < n; ++i) {
    const Model model(w[i]);
    Param& p = job.params[i];
    const DLTensor x = view(val[i]), y = view(out[i]);
    const int lead = x.ndim - model.x.ndim;
    const int64_t K = lead == 1 ? x.shape[0] : 1;
    if (i == 0) job.K = K;
    require((lead == 0 || lead == 1) && K == job.K && (lead == 0 || y.ndim < 1 || y.shape[0] == K), SHAPE);
    model.check(x, lead);
    model.check(y, lead);
    p.val = {x.data, dtype_of(x)};
    p.out = {y.data, dtype_of(y)};
    p.val_stride = lead ? x.strides[0] : 0;
    p.out_stride = lead ? y.strides[0] : 0;
    p.dot = model.array(dot[i]);
  }
}

struct WithoutInterpreterLock {
  PyThreadState* thread = PyEval_SaveThread();
  ~WithoutInterpreterLock() { PyEval_RestoreThread(thread); }
};

#ifdef ADAM_GHOST_WITH_CUDA
// Device memory from the framework's own allocator, given back when the launches that use it are queued on the same stream.
struct Workspace {
  DLManagedTensorVersioned* held = nullptr;

  Workspace(DLDevice device, int64_t doubles) {
    DLTensor want{nullptr, device, 1, {kDLFloat, 64, 1}, &doubles, nullptr, 0};
    const auto fail = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
    require(exchange->managed_tensor_allocator(&want, &held, nullptr, fail) == 0, PYTHON_ERROR);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (held) held->deleter(held);
  }
  double* data() const { return static_cast<double*>(held->dl_tensor.data); }
};

Launch launch_on(const Job& job) {
  Launch l{job.device.device_id, nullptr, job.rows, job.rows_on_device};
  require(exchange->current_work_stream(job.device.device_type, job.device.device_id, &l.stream) == 0, PYTHON_ERROR);
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
  PyObject *state[5], *direction[3], *table, *rows, *sums;
  int rule;
  if (!PyArg_ParseTuple(args, "OOOOOOOOOOiO", &state[0], &state[1], &state[2], &state[3], &state[4], &direction[0], &direction[1],
                        &direction[2], &table, &rows, &rule, &sums))
    return nullptr;
  return answer([&] {
    Job job = read_state(state, table, rows);
    read_direction(job, state[0], direction);
    const DLTensor s = view(sums);
    require(s.ndim == 2 && s.shape[0] == int64_t(job.params.size()) && s.shape[1] == sum_count(job.K) && s.dtype.bits == 64 &&
                row_major(s.shape, s.strides, 2) && rule >= SECANT && rule <= SGD, SHAPE);
    if (job.device.device_type == kDLCPU) {
      const WithoutInterpreterLock unlocked;
      return variance_correction_cpu(job.params, job.rows, rule, job.K, static_cast<double*>(s.data));
    }
#ifdef ADAM_GHOST_WITH_CUDA
    require(job.device.device_type == kDLCUDA, DEVICE);
    const Workspace partial(job.device, partial_count_cuda(job.params, job.K));
    report(variance_correction_cuda(launch_on(job), job.params, rule, job.K, partial.data(), static_cast<double*>(s.data)));
#else
    throw Refused{DEVICE};
#endif
  });
}

PyObject* weight_points(PyObject*, PyObject* args) {
  PyObject *state[5], *table, *rows, *empties, *mids;
  if (!PyArg_ParseTuple(args, "OOOOOOOOO", &state[0], &state[1], &state[2], &state[3], &state[4], &empties, &mids, &table, &rows))
    return nullptr;
  return answer([&] {
    Job job = read_state(state, table, rows);
    const Py_ssize_t n = job.params.size();
    const List w(state[0], n), empty(empties, n), mid(mids, n);
    for (Py_ssize_t i = 0; i < n; ++i) {
      const Model model(w[i]);
      job.params[i].empty = model.array(empty[i]);
      job.params[i].mid = model.array(mid[i]);
    }
    if (job.device.device_type == kDLCPU) {
      const WithoutInterpreterLock unlocked;
      return weight_points_cpu(job.params, job.rows);
    }
#ifdef ADAM_GHOST_WITH_CUDA
    require(job.device.device_type == kDLCUDA, DEVICE);
    report(weight_points_cuda(launch_on(job), job.params));
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

PyTypeObject* find_type(const char* module_name, const char* name) {
  PyObject* owner = PyImport_ImportModule(module_name);
  PyObject* type = owner ? PyObject_GetAttrString(owner, name) : nullptr;
  Py_XDECREF(owner);
  return reinterpret_cast<PyTypeObject*>(type);
}

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  tensor_type = find_type("torch", "Tensor");
  parameter_type = tensor_type ? find_type("torch.nn", "Parameter") : nullptr;
  if (!parameter_type) return nullptr;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(tensor_type), "__dlpack_c_exchange_api__");
  if (!capsule) return nullptr;
  exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!exchange) return nullptr;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync) {
    PyErr_Format(PyExc_ImportError, "this torch speaks DLPack %d, the extension was built for %d",
                 int(exchange->header.version.major), DLPACK_MAJOR_VERSION);
    return nullptr;
  }
  return PyModule_Create(&module);
}
