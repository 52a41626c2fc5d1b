// Blocks of a cluster: barriers in each other's shared memory, and copies that go to all of them (PTX ISA 8.0 and later).
#pragma once

#include "async.cuh"

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Arrives at the barrier that lies at the same place in that block. Nothing that was written to memory becomes visible there
// with it: a release to the cluster would be a fence of the whole device, some 1,000 cycles.
__device__ __forceinline__ void cluster_arrive(uint64_t* bar, int block) {
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
      "}\n" ::"r"(shared_address(bar)),
      "r"(block)
      : "memory");
}

// bulk_copy into the same place of each block in the mask, completing on the barrier at the same place there.
template <int kMask>
__device__ __forceinline__ void bulk_copy_to_all(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(
          shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(bar)), "h"(static_cast<uint16_t>(kMask))
      : "memory");
}
