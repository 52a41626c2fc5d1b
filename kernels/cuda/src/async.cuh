// Barriers in shared memory, bulk copies, the grid barrier, and loads that bypass L1 (PTX ISA 8.0 and later).
#pragma once

#include <cstdint>

// The same value, which the compiler then keeps in a register: short of these, it would rather compute addresses again in
// every turn of a loop.
__device__ __forceinline__ uint32_t kept(uint32_t v) {
  asm("" : "+r"(v));
  return v;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void mbarrier_init(uint64_t* bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}

// Lanes that arrive for a warp. One is enough once the others have met it, but compute-sanitizer's racecheck sees only what
// those lanes did that arrive themselves: for it every lane does (kernels/cuda/build.py).
#ifdef PEREGRINE_RACECHECK
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

// A warp: what its lanes did is done. The barrier expects kWarpArrivals of it.
__device__ __forceinline__ void warp_arrive(uint64_t* bar, int lane) {
  __syncwarp();
  if (lane < kWarpArrivals) mbarrier_arrive(bar);
}

// bar: address in shared memory.
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(bar),
      "r"(parity)
      : "memory");
}

// Both at once: asking takes a while.
__device__ __forceinline__ void mbarrier_wait(uint32_t first, uint32_t second, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred one, done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 one, [%0], %2;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
      "and.pred done, done, one;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(first),
      "r"(second), "r"(parity)
      : "memory");
}

__device__ __forceinline__ void mbarrier_wait(uint64_t* bar, uint32_t parity) { mbarrier_wait(shared_address(bar), parity); }

// Waits some 200 ns at most; whether the phase is complete.
__device__ __forceinline__ bool mbarrier_try(uint64_t* bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2, 200;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(done)
      : "r"(shared_address(bar)), "r"(parity)
      : "memory");
  return done;
}

// One thread: global -> shared; completes on `bar`. Addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(bar))
               : "memory");
}

// The same for weights, which are read once a step: they leave L2 first.
__device__ __forceinline__ void stream_copy(void* to, const void* from, uint32_t bytes, uint64_t* bar) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], "
      "policy;\n"
      "}\n" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(bar))
      : "memory");
}

// What ordinary accesses did before is seen by bulk copies after, and the other way round.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Global -> L2. Addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_prefetch(const void* p, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}

__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ __forceinline__ void copy16_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void copy4_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

__device__ __forceinline__ void fence_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

__device__ __forceinline__ void add_relaxed(uint32_t* p, uint32_t v) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Loads from shared memory by address: a generic pointer costs more. Not moved across barriers (volatile).
__device__ __forceinline__ uint4 shared16(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
  return v;
}

__device__ __forceinline__ uint2 shared8(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
  return v;
}

__device__ __forceinline__ float shared4(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at));
  return v;
}

constexpr long long kDeadlineCycles = 8'000'000'000ll;  // some 4 s: a lost block ends the launch with an error
constexpr uint32_t kMostTries = 1 << 23;  // of a read, a microsecond each

// One thread waits until all blocks have arrived `target` times in all.
__device__ __forceinline__ void grid_wait(const uint32_t* counter, uint32_t target) {
  const long long start = clock64();
  while (static_cast<int32_t>(load_relaxed(counter) - target) < 0)
    if (clock64() - start > kDeadlineCycles) __trap();
}

struct Floats8 {
  float v[8];
};

// Written by other blocks during this launch: L1 might hold what was there before.
__device__ __forceinline__ Floats8 load8(const float* p) {
  const float4 a = __ldcg(reinterpret_cast<const float4*>(p)), b = __ldcg(reinterpret_cast<const float4*>(p) + 1);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

// Values that travel between blocks within a launch carry a mark in their lowest bit, which turns at every writing of
// the buffer (an idea of NCCL's LL protocol). Who finds the old mark reads again. So the writer needs no fence, which
// would wait for all that its multiprocessor has under way, the stream of weights included. Reader and writer agree on
// a mark; the reader clears it, so that results do not depend on it.
constexpr uint32_t kUnmarked = 2;  // a plain value, from before the launch

// Where a column of a marked buffer lies: of 256 columns the first four of every eight come first, so that the loads
// of a warp, eight columns a lane, are contiguous.
__device__ __forceinline__ int place_of(int column) {
  return (column & ~255) + ((column >> 3) & 31) * 4 + ((column >> 2) & 1) * 128 + (column & 3);
}

// Eight columns from place_of(a multiple of 8) on.
__device__ __forceinline__ Floats8 load_marked8(const float* p) {
  Floats8 r;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(r.v[4 * i]), "=f"(r.v[4 * i + 1]), "=f"(r.v[4 * i + 2]), "=f"(r.v[4 * i + 3])
                 : "l"(p + 128 * i)
                 : "memory");
  return r;
}

// What load_marked8 began: reads again until all eight carry the mark.
__device__ __forceinline__ Floats8 settle(Floats8 r, const float* p, uint32_t mark) {
  if (mark == kUnmarked) return r;
  for (uint32_t tries = 0;; ++tries) {
    uint32_t wrong = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) wrong |= __float_as_uint(r.v[i]) ^ mark;
    if ((wrong & 1) == 0) break;
    if (tries > kMostTries) __trap();
    r = load_marked8(p);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) r.v[i] = __uint_as_float(__float_as_uint(r.v[i]) & ~1u);
  return r;
}

__device__ __forceinline__ Floats8 read_marked8(const float* p, uint32_t mark) { return settle(load_marked8(p), p, mark); }

__device__ __forceinline__ float marked(float v, uint32_t mark) {
  return __uint_as_float((__float_as_uint(v) & ~1u) | mark);
}

__device__ __forceinline__ void store_marked(float* p, float v, uint32_t mark) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(p), "f"(marked(v, mark)) : "memory");
}

__device__ __forceinline__ void store_marked8(float* p, const Floats8& x, uint32_t mark) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p + 128 * i), "f"(marked(x.v[4 * i], mark)),
                 "f"(marked(x.v[4 * i + 1], mark)), "f"(marked(x.v[4 * i + 2], mark)), "f"(marked(x.v[4 * i + 3], mark))
                 : "memory");
}

template <int kFrom = 16, int kTo = 1>
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
  for (int i = kFrom; i >= kTo; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
  return v;
}

template <int kFrom = 16, int kTo = 1>
__device__ __forceinline__ float lanes_max(float v) {
#pragma unroll
  for (int i = kFrom; i >= kTo; i >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
  return v;
}

// What the kernels before in the stream wrote is there; the next kernel may start up to its own wait.
__device__ __forceinline__ void wait_for_kernel_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
