"""Ops on tensors: schemas, fakes, and the one place where an implementation is chosen.

``triton`` runs CUDA tensors (and CPU tensors under ``TRITON_INTERPRET=1``), ``cpp`` is the compiled extension where it was
built, ``reference`` is always there. The choice is by device and shape; ``impl=`` overrides it for tests and benchmarks.
"""
