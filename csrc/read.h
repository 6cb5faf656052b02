// Reads Python tensors into plain fields: some nanoseconds each, since a model has hundreds of them and every step reads all.
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

// Whether tensors are read in place, which the torch that this was compiled for allows, or all of them through the exchange; for
// tests. Returns what is now the case.
bool read_in_place(bool wanted);

}  // namespace adam_ghost
