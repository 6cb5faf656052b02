// One kernel launch as a plain call. A test replaces this header by one that runs a block's threads on the CPU.
#pragma once
#include <cuda_runtime.h>

namespace adam_ghost {

constexpr int THREADS = 256;  // of every block

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, void* stream, const Arguments&... arguments) {
  kernel<<<grid, THREADS, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
}

}  // namespace adam_ghost
