// The rate at which memory can be read: what decoding is measured against.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

// Every block streams its share; the result keeps the loads from being dropped.
__global__ void __launch_bounds__(512) read_all(const uint4* data, int64_t count, uint32_t* result) {
  uint32_t sum = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (; i + 7 * stride < count; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  for (; i < count; i += stride) sum ^= data[i].x;
  if (sum == 0x12345678u) *result = sum;
}

}  // namespace

extern "C" int peregrine_read(const void* data, int64_t bytes, void* result, int blocks, void* stream) {
  read_all<<<blocks, 512, 0, static_cast<cudaStream_t>(stream)>>>(static_cast<const uint4*>(data), bytes / 16,
                                                                 static_cast<uint32_t*>(result));
  return cudaGetLastError();
}
