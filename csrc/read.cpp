#include "read.h"

namespace adam_ghost {

const DLPackExchangeAPI* exchange = nullptr;

namespace {

PyTypeObject *tensor_type = nullptr, *parameter_type = nullptr;

// The exchange shows what lies in memory, even if the tensor is the negative of it.
bool negated(PyObject* object) {
  static PyObject* is_neg = PyUnicode_InternFromString("is_neg");
  PyObject* answer = PyObject_CallMethodObjArgs(object, is_neg, nullptr);
  const bool result = answer != Py_False;
  Py_XDECREF(answer);
  return result;
}

PyObject* get(const char* module_name, const char* name) {
  PyObject* owner = PyImport_ImportModule(module_name);
  PyObject* value = owner ? PyObject_GetAttrString(owner, name) : nullptr;
  Py_XDECREF(owner);
  return value;
}

}  // namespace

bool prepare_reading() {
  tensor_type = reinterpret_cast<PyTypeObject*>(get("torch", "Tensor"));
  parameter_type = tensor_type ? reinterpret_cast<PyTypeObject*>(get("torch.nn", "Parameter")) : nullptr;
  if (!parameter_type) return false;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(tensor_type), "__dlpack_c_exchange_api__");
  if (!capsule) return false;
  exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  Py_DECREF(capsule);
  if (!exchange) return false;
  if (exchange->header.version.major != DLPACK_MAJOR_VERSION || !exchange->dltensor_from_py_object_no_sync) {
    PyErr_Format(PyExc_ImportError, "this torch speaks DLPack %d, the extension was built for %d",
                 int(exchange->header.version.major), DLPACK_MAJOR_VERSION);
    return false;
  }
  return true;
}

bool read_tensor(PyObject* object, DLTensor& out) {
  // a subclass may not hold the memory that it shows (fake tensors, DTensor), and goes through the dispatcher
  if (Py_TYPE(object) != tensor_type && Py_TYPE(object) != parameter_type) return false;
  if (negated(object) || exchange->dltensor_from_py_object_no_sync(object, &out) != 0) {
    PyErr_Clear();
    return false;
  }
  out.data = static_cast<char*>(out.data) + out.byte_offset;
  return true;
}

}  // namespace adam_ghost
