// Reads Python tensors into plain fields: a tenth of a microsecond each, since a model has hundreds and every step reads all.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/dlpack.h>

namespace adam_ghost {

// The framework's own exchange: one binary for every torch that has it. Also gives streams and memory.
extern const DLPackExchangeAPI* exchange;

// At import. False: a Python error is set.
bool prepare_reading();

// Fills `out`, whose shape and strides point into the tensor. False: not a plain tensor (a subclass, sparse, meta and the like).
bool read_tensor(PyObject* object, DLTensor& out);

}  // namespace adam_ghost
