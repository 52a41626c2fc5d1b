// One launch computes a list of phases (program.h): a decode step of a whole model for up to 16 tokens.
//
// A block per multiprocessor, all resident at once. In each, a producer thread streams the weights of the
// block's rows through a ring in shared memory, phase after phase, without ever waiting for other blocks:
// weight addresses are known in advance. Eight consumer warps wait at the grid barrier for the activations,
// quantize them, and multiply; an epilogue warp adds the warps' sums and writes rows. While a barrier, a
// norm or the attention runs, the ring fills up; afterwards the consumers, faster than memory, catch up.
#include <cuda_runtime.h>

#include <type_traits>

#include "activations.cuh"
#include "async.cuh"
#include "attention.cuh"
#include "early_launch.cuh"
#include "program.h"
#include "units.cuh"

#ifndef PEREGRINE_FP8_CACHE
#define PEREGRINE_FP8_CACHE 0  // step_fp8.cu compiles this file once more
#endif

namespace {

constexpr bool kFp8Cache = PEREGRINE_FP8_CACHE;

// Ring, activations, sums, row factors. The ring comes first, so that a place in it is an offset here: through a
// pointer kept in a structure the compiler would lose that it is shared memory.
extern __shared__ __align__(128) uint8_t shared[];

// Enough to keep the memory busy. What is requested beyond that only queues up, and every other access to L2 queues
// behind it (8B shape: 2.21 ms a token without a limit, 2.11 with two or three stages of 17 KB; with stages of 35 KB
// 1.98 with 64 KB, 1.96 with 72).
constexpr uint32_t kMostFlyingBytes = 72 << 10;

// While the ring is full, the memory goes on: what the ring will take next comes into L2. At most so much of it (38 MB of
// all blocks), a piece after so many cycles: no faster than memory can deliver. Not units of 2 bits, whose consumers
// are slower than memory anyway.
constexpr uint32_t kMostAheadBytes = 288 << 10, kAheadPiece = 4 << 10, kAheadCycles = 340;
constexpr uint32_t kAheadUnitBytes = 1280;

template <int kMma>
constexpr int kSumsBuffers = kMma == 4 ? 2 : 4;  // slabs that consumers may be ahead of the epilogue
template <int kMma>
constexpr int kSumsBytes = kSumsBuffers<kMma> * kWarps * kTileRows * 4 * kMma * static_cast<int>(sizeof(float));

struct Control {
  uint64_t stage_full[kMaxStages], stage_empty[kMaxStages];
  uint64_t sums_full[4], sums_empty[4];
  uint64_t phase_done, phase_written;  // by the consumers; by the epilogue
  uint32_t stage_taken[kMaxStages];  // bytes of the ring with what was left unused before them
  uint32_t stage_bytes[kMaxStages];
  uint64_t x_full;
  uint64_t rows_known;  // what the kernel before wrote is there, rows and odd_launches among it
  uint32_t odd_launches;  // see mark_of
  float squares[kMaxDirectUnits * kDirectTokens];
  float delta_scale[kMaxTokens], norm_scale[kMaxTokens];
  Rows rows;
  int flag;
  alignas(16) uint8_t zeros[512];
  alignas(16) Phase phases[3][2];  // copies of producer, consumers, epilogue: this phase and the next
};

// Which tiles of a phase a block takes, and how the columns are cut; producer, consumers and epilogue agree.
struct Plan {
  int items, first, slabs, slabs_per_pass;

  __device__ Plan(const MatmulPhase& phase, const Step& step) {
    items = phase.segments[0].num_tiles;
    if (phase.kind != kGated)
      for (int i = 1; i < phase.num_segments; ++i) items += phase.segments[i].num_tiles;
    first = (blockIdx.x + phase.rotation) % gridDim.x;
    slabs = (phase.units + kSlabUnits - 1) / kSlabUnits;
    slabs_per_pass = min(slabs, step.slabs_that_fit);
  }

  // fn(item's number in this block, part of the item, segment, tile, first row of out)
  template <class Fn>
  __device__ void for_each(const MatmulPhase& phase, Fn fn) const {
    const int parts = phase.kind == kGated ? 2 : 1;
    int number = 0;
    for (int item = first; item < items; item += gridDim.x, ++number) {
      for (int part = 0; part < parts; ++part) {  // one place that calls fn: its code is large
        int tile = item, row = 0;
        const Segment& segment = parts == 2 ? phase.segments[part] : locate(phase, tile, row);
        fn(number, part, segment, tile, row + tile * kTileRows);
      }
    }
  }

  // Of a kStore phase's item: its segment, the tile in it, the segment's first row.
  static __device__ const Segment& locate(const MatmulPhase& phase, int& tile, int& row) {
    int segment = 0;
    while (tile >= phase.segments[segment].num_tiles) {
      tile -= phase.segments[segment].num_tiles;
      row += phase.segments[segment].n;
      ++segment;
    }
    return phase.segments[segment];
  }

  __device__ int num_tiles(const MatmulPhase& phase) const {
    const int own = items > first ? (items - first + gridDim.x - 1) / gridDim.x : 0;
    return phase.kind == kGated ? 2 * own : own;
  }

  // The block's tile of this number, in the order of for_each.
  __device__ const Segment& tile_of(const MatmulPhase& phase, int number, int& tile) const {
    if (phase.kind == kGated) {
      tile = first + number / 2 * gridDim.x;
      return phase.segments[number % 2];
    }
    int row = 0;
    tile = first + number * gridDim.x;
    return locate(phase, tile, row);
  }

  __device__ int num_passes() const { return (slabs + slabs_per_pass - 1) / slabs_per_pass; }
};

__device__ bool is_matmul(const MatmulPhase& phase) { return phase.kind == kStore || phase.kind == kGated; }

// A warp's own copy of the phases: the next one is on its way while this one runs.
struct PhaseReader {
  const Step& step;
  Phase (&copies)[2];
  int lane;

  __device__ void fetch(int index) {
    if (index < step.num_phases && lane < static_cast<int>(sizeof(Phase) / 16))
      copy16_async(copies[index & 1].words + 2 * lane, step.phases[index].words + 2 * lane);
  }

  __device__ void wait() {
    wait_copies();
    __syncwarp();
  }
};

// Units of a stage of the ring: what a slab has (each warp two units between waits), unless two such stages are more
// than may be in flight, or the activations of more than 8 tokens leave little room to the ring.
__host__ __device__ constexpr int units_per_stage(int unit_bytes, bool is_wide) {
  return unit_bytes <= 2304 && !is_wide ? kSlabUnits : kWarps;
}

// Both ends of the ring place stages alike: one after the other, none around the end.
__device__ __forceinline__ uint32_t place(uint32_t& at, uint32_t bytes, uint32_t ring_bytes) {
  if (at + bytes > ring_bytes) at = 0;
  const uint32_t begin = at;
  at += bytes;
  return begin;
}

struct RingWriter {
  Control& control;
  uint32_t ring_bytes, free_bytes;
  uint32_t at = 0, head = 0, tail = 0;       // stages issued, stages known to be free again
  uint32_t landed = 0, flying_bytes = 0;     // stages known to have come; bytes of the others

  // One thread: room for a stage; the copies into it must complete on `bar`. idle(): something to do while the ring is
  // full; false when there is nothing more.
  template <class Idle>
  __device__ uint8_t* open(uint32_t bytes, uint64_t*& bar, Idle idle) {
    const uint32_t taken = bytes + (at + bytes > ring_bytes ? ring_bytes - at : 0);
    while (landed < head && (flying_bytes + bytes > kMostFlyingBytes || head - landed == kMaxStages)) {
      mbarrier_wait(&control.stage_full[landed % kMaxStages], (landed / kMaxStages) & 1);
      flying_bytes -= control.stage_bytes[landed % kMaxStages];
      ++landed;
    }
    while (free_bytes < taken || head - tail == kMaxStages) {
      uint64_t* const empty = &control.stage_empty[tail % kMaxStages];
      const uint32_t parity = (tail / kMaxStages) & 1;
      while (!mbarrier_try(empty, parity) && idle()) {}
      mbarrier_wait(empty, parity);
      free_bytes += control.stage_taken[tail % kMaxStages];
      ++tail;
    }
    control.stage_taken[head % kMaxStages] = taken;
    control.stage_bytes[head % kMaxStages] = bytes;
    flying_bytes += bytes;
    free_bytes -= taken;
    bar = &control.stage_full[head % kMaxStages];
    mbarrier_arrive_expect(bar, bytes);
    ++head;
    return shared + place(at, bytes, ring_bytes);
  }
};

struct RingReader {
  Control* control;
  uint32_t ring_bytes;
  int lane;
  uint32_t at = 0, stage = 0;

  // A warp: the next stage, once it is there.
  __device__ uint8_t* next(uint32_t bytes) {
    mbarrier_wait(&control->stage_full[stage % kMaxStages], (stage / kMaxStages) & 1);
    return shared + place(at, bytes, ring_bytes);
  }

  __device__ void release() {
    warp_arrive(&control->stage_empty[stage % kMaxStages], lane);
    ++stage;
  }
};

// The block's part of a matrix in the order of the ring: of each tile the units of one pass.
struct WeightStream {
  const MatmulPhase* phase;
  const Plan* plan;
  int first_unit, num_units;
  int number = -1, num_tiles;
  const uint8_t* data = nullptr;
  uint32_t left = 0;  // bytes of this tile from `data` on
  uint32_t unit_bytes = 0;

  __device__ WeightStream(const MatmulPhase& phase, const Plan& plan, int first_unit, int num_units)
      : phase(&phase), plan(&plan), first_unit(first_unit), num_units(num_units), num_tiles(plan.num_tiles(phase)) {
    skip(0);
  }

  __device__ bool is_done() const { return number >= num_tiles; }

  // On to the next tile after the last byte of one.
  __device__ void skip(uint32_t bytes) {
    data += bytes;
    left -= bytes;
    if (left > 0 || ++number >= num_tiles) return;
    int tile;
    const Segment& segment = plan->tile_of(*phase, number, tile);
    unit_bytes = segment.unit_bytes;
    data = segment.data + (static_cast<int64_t>(tile) * phase->units + first_unit) * unit_bytes;
    left = num_units * unit_bytes;
  }
};

__device__ void stream_weights(const MatmulPhase& phase, const Step& step, RingWriter& writer) {
  const Plan plan(phase, step);
  for (int pass = 0; pass < plan.num_passes(); ++pass) {
    const int first = pass * plan.slabs_per_pass * kSlabUnits;
    const int units = min(plan.slabs_per_pass * kSlabUnits, phase.units - first);
    WeightStream stream(phase, plan, first, units), ahead = stream;
    uint32_t ahead_bytes = 0;
    uint32_t last = 0;
    while (!stream.is_done()) {
      const uint32_t bytes = min(units_per_stage(stream.unit_bytes, step.num_tokens > 8) * stream.unit_bytes, stream.left);
      const auto idle = [&] {
        if (ahead_bytes >= kMostAheadBytes || stream.unit_bytes < kAheadUnitBytes) return false;
        if (ahead_bytes == 0) ahead = stream;
        if (ahead.is_done()) return false;
        const uint32_t now = clock();
        if (now - last < kAheadCycles) return true;
        last = now;
        const uint32_t piece = min(kAheadPiece, ahead.left);
        bulk_prefetch(ahead.data, piece);
        ahead.skip(piece);
        ahead_bytes += piece;
        return true;
      };
      uint64_t* bar;
      uint8_t* to = writer.open(bytes, bar, idle);
      stream_copy(to, stream.data, bytes, bar);
      stream.skip(bytes);
      ahead_bytes -= min(ahead_bytes, bytes);
    }
  }
}

__device__ void stream_cache(const AttentionPhase& phase, const Step& step, const Rows& rows, RingWriter& writer, int lane) {
  const int block_bytes = head_bytes<kFp8Cache>(phase.head_dim), per_stage = blocks_per_stage(phase.head_dim);
  for_each_item(phase, step, rows, [&](const Item& item) {
    const int* table = step.block_table + rows.sequences[item.token] * step.block_table_stride + item.first_block();
    const int count = item.num_blocks();
    for (int known = 0; known < count; known += 32) {
      const int id = known + lane < count ? table[known + lane] : 0;
      for (int begin = known; begin < min(known + 32, count); begin += per_stage) {
        uint64_t* bar;
        uint8_t* to = nullptr;
        const int blocks = min(per_stage, count - begin);
        if (lane == 0) to = writer.open(blocks * 2 * block_bytes, bar, [] { return false; });
        for (int i = 0; i < blocks; ++i) {
          const int64_t block = __shfl_sync(~0u, id, begin - known + i);
          if (lane != 0) continue;
          const int64_t origin = head_origin<kFp8Cache>(phase, block, item.kv_head);
          bulk_copy(to + 2 * i * block_bytes, static_cast<const uint8_t*>(phase.k_cache) + origin, block_bytes, bar);
          bulk_copy(to + (2 * i + 1) * block_bytes, static_cast<const uint8_t*>(phase.v_cache) + origin, block_bytes, bar);
        }
        __syncwarp();
      }
    }
  });
}

__device__ void produce(const Step& step, Control& control, int lane) {
  PhaseReader reader{step, control.phases[0], lane};
  reader.fetch(0);
  const uint32_t ring_bytes = step.ring_bytes;
  RingWriter writer{control, ring_bytes, ring_bytes};
  for (int index = 0; index < step.num_phases; ++index) {
    reader.wait();
    reader.fetch(index + 1);
    const Phase& phase = reader.copies[index & 1];
    if (phase.matmul.kind == kAttention) {
      wait_for_kernel_before();
      mbarrier_wait(&control.rows_known, 0);
      stream_cache(phase.attention, step, control.rows, writer, lane);
    } else if (is_matmul(phase.matmul) && lane == 0) {
      stream_weights(phase.matmul, step, writer);
    }
    __syncwarp();
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// By value: a reader that another function may change would live in memory.
__device__ RingReader attend(const AttentionPhase& phase, const Step& step, uint8_t* x_room, Control& control,
                             RingReader ring, int warp, int lane) {
  const auto run = [&](auto dim, auto columns) {
    return SplitAttention<dim(), columns(), kFp8Cache>(phase, step, control.rows, x_room, &control.flag,
                                                       control.odd_launches, warp, lane)
        .run(ring);
  };
  const bool is_wide = item_columns(phase, step) == 128;
  if (phase.head_dim == 64) return run(Constant<64>{}, Constant<64>{});
  if (phase.head_dim == 128)
    return is_wide ? run(Constant<128>{}, Constant<128>{}) : run(Constant<128>{}, Constant<64>{});
  return is_wide ? run(Constant<256>{}, Constant<128>{}) : run(Constant<256>{}, Constant<64>{});
}

// What the next phase will read and nobody writes, brought into L2 before the grid barrier; blocks share it out.
__device__ void prefetch_phase(const Phase& next, int lane) {
  const int line = blockIdx.x * 32 + lane;
  if (next.matmul.kind != kAttention && next.matmul.source == kNorm && line * 32 < next.matmul.k) {
    prefetch(next.matmul.norm + line * 32);
    if (next.matmul.delta_norm != nullptr) prefetch(next.matmul.delta_norm + line * 32);
  }
}

// Two copies in turn, so that one may be written while the product before still reads the other.
__device__ uint8_t* prepared_codes(const MatmulPhase& phase, const Step& step) {
  return step.prepared + phase.copy * step.prepared_stride;
}

__device__ float* prepared_squares(const MatmulPhase& phase, const Step& step) {
  return step.prepared_squares + phase.copy * step.squares_stride;
}

// A share of the step's activations, quantized once for all blocks.
__device__ void prepare(const MatmulPhase& phase, const Step& step, uint32_t odd_launches, int warp, int lane) {
  const int tokens = step.num_tokens;
  const Activations x(prepared_codes(phase, step), phase.units, tokens);
  float* const squares = prepared_squares(phase, step);
  const Pairs pairs(blockIdx.x * kWarps + warp, gridDim.x * kWarps, phase.units, tokens);
  if (phase.source == kNorm) {
    const auto delta_scale = [&](int token) { return measure_delta(phase, token, odd_launches, lane); };
    const auto keeps = [](int, int) { return true; };
    quantize_pairs<1, true>(phase, pairs, x, odd_launches, delta_scale, squares, lane, keeps);
  } else {
    quantize_pairs<1, false>(phase, pairs, x, odd_launches, 0, squares, lane, 0);
  }
}

// Units first .. first + count - 1 of the prepared activations into shared memory.
__device__ void copy_prepared(const MatmulPhase& phase, const Step& step, int first, int count, const Activations& x,
                              Control& control, uint32_t parity, int warp, int lane) {
  const int tokens = step.num_tokens;
  const Activations from(prepared_codes(phase, step), phase.units, tokens);
  if (warp == 0 && lane == 0) {
    proxy_fence();
    mbarrier_arrive_expect(&control.x_full, count * tokens * 544);
    bulk_copy(x.codes, from.codes + first * tokens * 512, count * tokens * 512, &control.x_full);
    bulk_copy(x.sums, from.sums + first * tokens * 8, count * tokens * 32, &control.x_full);
  }
  for (int i = warp * 32 + lane; i < count * tokens; i += kConsumers) x.scales[i] = __ldcg(from.scales + first * tokens + i);
  mbarrier_wait(&control.x_full, parity);
}

// The block's sums of a slab, by warp and row: a few buffers between consumers and epilogue.
struct SumsWriter {
  float* sums;
  Control& control;
  int warp, lane;
  uint32_t count = 0;

  template <int kMma>
  __device__ __forceinline__ void write(const float (&acc)[kMma][2]) {
    constexpr int kTokens = 4 * kMma;
    constexpr uint32_t kBuffers = kSumsBuffers<kMma>;
    const uint32_t buffer = count % kBuffers;
    mbarrier_wait(&control.sums_empty[buffer], ((count / kBuffers) & 1) ^ 1);
    float* to = sums + (buffer * kWarps + warp) * kTileRows * kTokens + lane / 4 * kTokens + lane % 4;
#pragma unroll
    for (int j = 0; j < kMma; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r) to[8 * r * kTokens + 4 * j] = acc[j][r];
    warp_arrive(&control.sums_full[buffer], lane);
    ++count;
  }
};

// One tile of 16 rows over `count` units of activations; of a stage's units each warp takes one or two.
template <class F, int kMma, bool kOne>
__device__ __forceinline__ void tile_dot(const Activations& x, int count, int tokens, uint32_t zeros,
                                         RingReader& ring, SumsWriter& sums) {
  const UnitActivations all{shared_address(x.codes), shared_address(x.sums), shared_address(x.scales)};
  constexpr int kStage = units_per_stage(F::kUnitBytes, kMma == 4);
  // add(unit's bytes, its activations), finish(sums of all that was added since)
  const auto stream = [&](auto add, auto finish) {
    for (int begin = 0; begin < count; begin += kStage) {
      const int here = min(kStage, count - begin);
      const uint32_t stage = shared_address(ring.next(here * F::kUnitBytes));
#pragma unroll 1  // two units in one piece of code are no faster
      for (int unit = sums.warp; unit < here; unit += kWarps) {
        const int pairs = (begin + unit) * tokens;
        add(stage + unit * F::kUnitBytes, UnitActivations{all.codes + pairs * 512, all.sums + pairs * 32, all.scales + pairs * 4});
      }
      ring.release();
      if ((begin + kStage) % kSlabUnits == 0 || begin + kStage >= count) {
        float slab[kMma][2];
        finish(slab);
        sums.write<kMma>(slab);
      }
    }
  };
  if constexpr (kOne && kParts<F> == 4) {
    OneToken<F> one(sums.lane);
    stream([&](uint32_t unit, const UnitActivations& ux) { one.add(unit, ux); }, [&](float (&slab)[kMma][2]) { one.take(slab[0]); });
  } else {
    float acc[kMma][2][kParts<F>] = {};
    stream([&](uint32_t unit, const UnitActivations& ux) { unit_dot<F, kMma, kOne>(unit, ux, tokens, zeros, sums.lane, acc); },
           [&](float (&slab)[kMma][2]) {
#pragma unroll
             for (int j = 0; j < kMma; ++j)
#pragma unroll
               for (int r = 0; r < 2; ++r) {
                 slab[j][r] = sum_of_parts<F>(acc[j][r]);
#pragma unroll
                 for (int i = 0; i < kParts<F>; ++i) acc[j][r][i] = 0;
               }
           });
  }
}

template <int kMma, bool kOne>
__device__ void consume(const Step& step, uint8_t* x_room, float* sums_room, Control& control, int warp, int lane) {
  const int tokens = kOne ? 1 : step.num_tokens;
  PhaseReader reader{step, control.phases[1], lane};
  if (warp == 0) {
    reader.fetch(0);
    reader.wait();
  }
  RingReader ring{&control, static_cast<uint32_t>(step.ring_bytes), lane};
  SumsWriter sums{sums_room, control, warp, lane};
  const uint32_t zeros = shared_address(control.zeros);
  const auto barrier = [] { named_barrier(kConsumerBarrier, kConsumers); };
  uint32_t copies = 0;
  for (int index = 0; index < step.num_phases; ++index) {
    if (warp == 0 && index > 0) {
      reader.wait();
      prefetch_phase(reader.copies[index & 1], lane);
      if (lane == 0) {
        const MatmulPhase& next = reader.copies[index & 1].matmul;
        const bool is_marked = !(is_matmul(next) && next.source == kPrepared);  // codes carry no marks
        mbarrier_wait(&control.phase_written, (index - 1) & 1);  // the epilogue is never more than a phase behind
        grid_wait(step.arrivals, index * gridDim.x - (is_marked ? step.stragglers : 0));
        if (!is_marked) fence_gpu();
      }
      __syncwarp();
    }
    barrier();
    const Phase& current = reader.copies[index & 1];
    if (warp == 0) reader.fetch(index + 1);  // the copy before this one is not read any more
    if (current.matmul.kind == kAttention) {
      ring = attend(current.attention, step, x_room, control, ring, warp, lane);
    } else if (current.matmul.kind == kPrepare) {
      prepare(current.matmul, step, control.odd_launches, warp, lane);
    } else {
      const MatmulPhase& phase = current.matmul;
      const Plan plan(phase, step);
      if (phase.source == kNorm && phase.delta_norm != nullptr) {
        for (int token = warp; token < tokens; token += kWarps) {
          const float scale = measure_delta(phase, token, control.odd_launches, lane);
          if (lane == 0) control.delta_scale[token] = scale;
        }
        barrier();
      }
      for (int pass = 0; pass < plan.num_passes(); ++pass) {
        const int first = pass * plan.slabs_per_pass * kSlabUnits;
        const int count = min(plan.slabs_per_pass * kSlabUnits, phase.units - first);
        const Activations x(x_room, count, tokens);
        if (pass > 0) barrier();  // nobody reads the last pass's codes now
        if (phase.source == kPrepared) {
          if (pass == 0 && phase.norm != nullptr) {
            for (int token = warp; token < tokens; token += kWarps) {
              const float scale = norm_scale<false>(phase, prepared_squares(phase, step), token, tokens, lane);
              if (lane == 0) control.norm_scale[token] = scale;
            }
          }
          copy_prepared(phase, step, first, count, x, control, copies++ & 1, warp, lane);
        } else {
          const auto keeps = [&](int unit, int token) {  // every block computes the stream, one writes a piece
            return (unit * kDirectTokens + token) % gridDim.x == blockIdx.x;
          };
          const auto delta_scale = [&](int token) { return control.delta_scale[token]; };
          const Pairs pairs(warp, kWarps, phase.units, tokens);
          const uint32_t odd_launches = control.odd_launches;
          if (phase.source == kNorm)
            quantize_pairs<2, true>(phase, pairs, x, odd_launches, delta_scale, control.squares, lane, keeps);
          else if (phase.units * tokens <= 2 * kWarps)
            quantize_pairs<2, false>(phase, pairs, x, odd_launches, delta_scale, control.squares, lane, keeps);
          else
            quantize_pairs<4, false>(phase, pairs, x, odd_launches, delta_scale, control.squares, lane, keeps);
        }
        barrier();
        plan.for_each(phase, [&](int, int, const Segment& segment, int, int) {
          with_format(segment.format, [&](auto format) {
            tile_dot<decltype(format), kMma, kOne>(x, count, tokens, zeros, ring, sums);
          });
        });
      }
    }
    warp_arrive(&control.phase_done, lane);
  }
}

// Row factors of all tiles that this block takes in a phase: on their way before anybody asks for them.
__device__ void fetch_factors(const MatmulPhase& phase, const Plan& plan, float* factors, int lane) {
  const int parts = phase.kind == kGated ? 2 : 1;
  for (int entry = lane / 4;; entry += 8) {
    int tile = plan.first + entry / parts * gridDim.x, row = 0;
    if (tile >= plan.items) break;
    const Segment& segment = parts == 2 ? phase.segments[entry % 2] : Plan::locate(phase, tile, row);
    copy16_async(factors + entry * kTileRows + 4 * (lane % 4), segment.row_factor + tile * kTileRows + 4 * (lane % 4));
  }
}

template <int kMma>
__device__ void finish(const Step& step, const float* sums, float* factors, Control& control, int lane) {
  constexpr int kTokens = 4 * kMma, kValues = kTileRows * kTokens / 32;
  const int tokens = step.num_tokens;
  PhaseReader reader{step, control.phases[2], lane};
  reader.fetch(0);
  uint32_t dumps = 0;
  const uint32_t odd_launches = control.odd_launches;
  float* between = step.sums + blockIdx.x * step.sums_stride;
  for (int index = 0; index < step.num_phases; ++index) {
    reader.wait();
    const MatmulPhase& phase = reader.copies[index & 1].matmul;
    reader.fetch(index + 1);
    if (is_matmul(phase)) {
      const Plan plan(phase, step);
      fetch_factors(phase, plan, factors, lane);
      wait_copies();
      __syncwarp();
      const int passes = plan.num_passes();
      for (int pass = 0; pass < passes; ++pass) {
        const int slabs = min(plan.slabs_per_pass, plan.slabs - pass * plan.slabs_per_pass);
        // Of a lane: always the same token, and rows kStep apart.
        constexpr int kStep = 32 / kTokens;
        const int token = lane % kTokens, first_of_lane = lane / kTokens;
        const bool is_token = token < tokens;
        const uint32_t mark = mark_of(phase.out_marks, odd_launches, token);
        float* const out = phase.out + token * phase.out_stride;
        float gate[kValues], token_scale = 1.0f;
        bool is_first = true;
        plan.for_each(phase, [&](int number, int part, const Segment& segment, int tile, int first_row) {
          float value[kValues];
          float* kept = between + (2 * number + part) * kTileRows * kTokens;
#pragma unroll
          for (int i = 0; i < kValues; ++i) value[i] = pass > 0 ? kept[lane + 32 * i] : 0.0f;
          for (int slab = 0; slab < slabs; ++slab) {
            const uint32_t buffer = dumps % kSumsBuffers<kMma>;
            mbarrier_wait(&control.sums_full[buffer], (dumps / kSumsBuffers<kMma>) & 1);
            constexpr int kPart = kTileRows * kTokens;
            const float* from = sums + buffer * kWarps * kPart + lane;
#pragma unroll
            for (int i = 0; i < kValues; ++i) {
              float slab_sum = 0;
#pragma unroll
              for (int w = 0; w < kWarps; ++w) slab_sum += from[w * kPart + 32 * i];
              value[i] += slab_sum;
            }
            warp_arrive(&control.sums_empty[buffer], lane);
            ++dumps;
          }
          if (pass + 1 < passes) {
#pragma unroll
            for (int i = 0; i < kValues; ++i) kept[lane + 32 * i] = value[i];
            return;
          }
          if (is_first) {  // sums have come, so the squares are there as well
            is_first = false;
            if (phase.norm != nullptr && phase.source == kPrepared) {
              token_scale = control.norm_scale[token];
            } else if (phase.norm != nullptr) {
              for (int t = 0; t < tokens; ++t) {
                const float scale = norm_scale<true>(phase, control.squares, t, tokens, lane);
                if (token == t) token_scale = scale;
              }
            }
          }
          const int place = place_of(first_row) + place_of(first_of_lane);  // additive: they have no bit in common
          const float* factor = factors + (phase.kind == kGated ? 2 * number + part : number) * kTileRows;
#pragma unroll
          for (int i = 0; i < kValues; ++i) {
            const int row = first_of_lane + kStep * i;
            const bool is_there = tile * kTileRows + row < segment.n && is_token;
            const float bias = segment.bias != nullptr && is_there ? segment.bias[tile * kTileRows + row] : 0.0f;
            const float result = value[i] * factor[row] * token_scale + bias;
            if (phase.kind == kGated && part == 0) {
              gate[i] = activate(result, phase.activation);
            } else if (is_there) {
              const float v = phase.kind == kGated ? gate[i] * result : result;
              if (phase.out_marks == 0) out[first_row + row] = v;
              else store_marked(out + place + place_of(kStep * i), v, mark);
            }
          }
        });
      }
    }
    mbarrier_wait(&control.phase_done, index & 1);
    __syncwarp();
    if (lane == 0 && index + 1 < step.num_phases) {
      // Marked values need no fence: who reads them sees whether they have come.
      if (phase.kind == kPrepare) fence_gpu();
      add_relaxed(step.arrivals, 1);
    }
    if (index + 1 < step.num_phases) warp_arrive(&control.phase_written, lane);
  }
}

template <int kMma, bool kOne>
__global__ void __launch_bounds__(kThreads, 1) run_step(const __grid_constant__ Step step) {
  __shared__ Control control;
  uint8_t* x_room = shared + step.ring_bytes;
  float* sums = reinterpret_cast<float*>(x_room + step.x_bytes);
  float* factors = sums + kSumsBytes<kMma> / sizeof(float);
  // Opaque to the compiler, which would read the special register again in every loop.
  uint32_t thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  const int warp = thread / 32, lane = thread % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kMaxStages; ++i) {
      mbarrier_init(&control.stage_full[i], 1);
      mbarrier_init(&control.stage_empty[i], kWarps * kWarpArrivals);
    }
    for (int i = 0; i < 4; ++i) {
      mbarrier_init(&control.sums_full[i], kWarps * kWarpArrivals);
      mbarrier_init(&control.sums_empty[i], kWarpArrivals);
    }
    mbarrier_init(&control.phase_done, kWarps * kWarpArrivals);
    mbarrier_init(&control.phase_written, kWarpArrivals);
    mbarrier_init(&control.x_full, 1);
    mbarrier_init(&control.rows_known, kWarpArrivals);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (threadIdx.x < sizeof(control.zeros) / 16) reinterpret_cast<uint4*>(control.zeros)[threadIdx.x] = uint4{};
  __syncthreads();
  let_next_kernel_start();
  if (warp == kWarps) {  // weights stream in while the kernel before ends; all else may be what it writes
    produce(step, control, lane);
  } else {
    wait_for_kernel_before();
    if (warp == 0) {
      if (lane == 0) control.odd_launches = step.arrivals[2];
      if (lane < step.num_tokens) {
        control.rows.positions[lane] = step.positions[lane];
        control.rows.sequences[lane] = step.sequences[lane];
        control.rows.first_rows[lane] = step.first_rows[lane];
      }
      warp_arrive(&control.rows_known, lane);
    }
    mbarrier_wait(&control.rows_known, 0);
    if (warp < kWarps) consume<kMma, kOne>(step, x_room, sums, control, warp, lane);
    else finish<kMma>(step, sums, factors, control, lane);
  }
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(step.arrivals + 1, 1u) == gridDim.x - 1) {
    step.arrivals[0] = step.arrivals[1] = 0;  // all are through: ready for the next launch
    step.arrivals[2] = control.odd_launches ^ ((1u << step.num_tokens) - 1);
  }
}

// Blocks wait for each other, so all of them must be resident at once. A cooperative launch would see to it as well, but
// starts later, and never while the kernel before ends.
template <int kMma, bool kOne>
cudaError_t launch(const Step& step, int blocks, cudaStream_t stream) {
  const int bytes = step.ring_bytes + step.x_bytes + kSumsBytes<kMma> + step.factor_bytes;
  if (const auto error = cudaFuncSetAttribute(run_step<kMma, kOne>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes))
    return error;
  int device, processors, resident;
  if (const auto error = cudaGetDevice(&device)) return error;
  if (const auto error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) return error;
  if (const auto error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, run_step<kMma, kOne>, kThreads, bytes))
    return error;
  if (blocks > processors * resident) return cudaErrorCooperativeLaunchTooLarge;
  return launch_early(run_step<kMma, kOne>, dim3(blocks), kThreads, bytes, step, stream);
}

cudaError_t launch_step(const Step& step, int mma, int blocks, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (mma) {
    case 1: return step.num_tokens == 1 ? launch<1, true>(step, blocks, s) : launch<1, false>(step, blocks, s);
    case 2: return launch<2, false>(step, blocks, s);
    case 4: return launch<4, false>(step, blocks, s);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

extern "C" {

#if PEREGRINE_FP8_CACHE

// The same as peregrine_step, where the cache is e4m3.
int peregrine_step_fp8(const Step* step, int mma, int blocks, void* stream) { return launch_step(*step, mma, blocks, stream); }

#else

// Shared memory that a block of `mma` * 4 tokens can share out between ring and activations.
int peregrine_step_room(int device, int mma, int* bytes) {
  int most = 0;
  const auto error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = most - static_cast<int>(sizeof(Control)) - (mma == 1 ? kSumsBytes<1> : mma == 2 ? kSumsBytes<2> : kSumsBytes<4>) - 128;
  return error;
}

int peregrine_step(const Step* step, int mma, int blocks, void* stream) { return launch_step(*step, mma, blocks, stream); }

const char* peregrine_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#endif
}
