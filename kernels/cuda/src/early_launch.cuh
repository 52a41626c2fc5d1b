// Launches that begin while the kernel before them ends, and wait for it themselves (async.cuh: wait_for_kernel_before).
#pragma once

#include <cuda_runtime.h>

// The caller has allowed the kernel its shared_bytes.
template <class Parameters>
cudaError_t launch_early(void (*kernel)(Parameters), dim3 grid, int threads, int shared_bytes, const Parameters& parameters,
                         cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, parameters);
}
