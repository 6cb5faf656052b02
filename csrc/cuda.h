// The CUDA side as the binding sees it: no CUDA header, no tensor. Errors come back as text, null for success.
#pragma once
#include "job.h"

namespace adam_ghost {

template <class Row>  // StepRow or FractionRow
struct Launch {
  int device;
  void* stream;           // the caller's current stream
  const Row* steps;       // the step table on the host, or null
  const Row* on_device;   // the same on the device, read there
  int64_t rows;
};

// Bytes of device memory that a call needs on its stream, for `width` sums of each parameter.
template <class Row>
int64_t workspace_bytes_cuda(const std::vector<Param>&, const Launch<Row>&, int64_t width);
template <class Row>
const char* variance_correction_cuda(const Launch<Row>&, const std::vector<Param>&, int rule, int64_t K, void* workspace, double* sums);
template <class Row>
const char* weight_points_cuda(const Launch<Row>&, const std::vector<Param>&, void* workspace);
const char* adjoint_cuda(const Launch<StepRow>&, const std::vector<Param>&, int64_t K, void* workspace);
const char* gradient_sums_cuda(const Launch<StepRow>&, const std::vector<Param>&, int64_t K, void* workspace, double* sums);
const char* cuda_targets();

}  // namespace adam_ghost
