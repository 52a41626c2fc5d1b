// Rings of stages in shared memory, between the warps that stream and those that compute (prompt.cu).
#pragma once

#include "values.cuh"

constexpr int kLines = kUnitColumns / 64;  // of activations in a unit

// A ring of stages that one warp fills and those that compute empty.
struct Ring {
  uint8_t* data;
  uint64_t *full, *empty;
  int stages, stage_bytes;
};

// Where a warp is in a ring: counted, because a division costs as much as unpacking a column.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void next(const Ring& ring) {
    if (++stage == ring.stages) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ uint8_t* data(const Ring& ring) const { return ring.data + stage * ring.stage_bytes; }
  __device__ __forceinline__ void wait_full(const Ring& ring) const { mbarrier_wait(&ring.full[stage], parity); }
  // Of two rings alike.
  __device__ __forceinline__ void wait_full(const Ring& first, const Ring& second) const {
    mbarrier_wait(shared_address(&first.full[stage]), shared_address(&second.full[stage]), parity);
  }
  __device__ __forceinline__ void wait_empty(const Ring& ring) const { mbarrier_wait(&ring.empty[stage], parity ^ 1); }
};

// A tile of a matrix.
struct Place {
  const Segment* matrix;  // null: there is no such tile
  int tile;
};

__device__ __forceinline__ Place place_of_tile(const Pieces& pieces, int tile) {
  for (int i = 0; i < pieces.count; ++i) {
    if (tile < pieces.segments[i].num_tiles) return {&pieces.segments[i], tile};
    tile -= pieces.segments[i].num_tiles;
  }
  return {nullptr, 0};
}
