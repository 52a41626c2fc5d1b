// What one launch computes: a list of phases. Mirrored field by field in kernels/cuda/program.py.
#pragma once

#include <cstdint>

constexpr int kTileRows = 16;
constexpr int kUnitColumns = 256;
constexpr int kWarps = 8;  // that consume; each takes one unit of a stage of the ring, 2048 columns of a tile
constexpr int kThreads = 32 * (kWarps + 2);  // and a producer and an epilogue warp
constexpr int kSlabUnits = 16;  // float sums are closed every 4096 columns, whatever the batch
constexpr int kMaxStages = 32;
constexpr int kMaxTokens = 16;
constexpr int kDirectTokens = 2;  // at most so many are quantized by every block for itself
constexpr int kMaxDirectUnits = 256;

enum PhaseKind : int32_t { kStore = 0, kGated = 1, kAttention = 2, kPrepare = 3 };
enum Source : int32_t { kPlain = 0, kNorm = 1, kPrepared = 2 };
enum Activation : int32_t { kSilu = 0, kGeluTanh = 1 };

// Which mark (async.cuh) the values of a buffer carry that one phase writes and another one reads. A buffer's rows are
// float32 in units of 256 columns (place_of); all of them that take part in a launch are written at every writing. Bits:
// 0: number of the writing within a launch is odd; 1: so is that of all writings of a launch; 2: buffer is marked.
using Marks = int32_t;

// A matrix [n, 256 * units] in fragment order: tiles of 16 rows, each `units` * unit_bytes contiguous.
struct Segment {
  const uint8_t* data;
  const float* row_factor;  // [16 * num_tiles]
  const float* bias;        // [n], may be null
  int32_t n, num_tiles, unit_bytes, format;
};

// out[t, :] = W x[t]: segments one after the other (kStore), or act(W0 x) * (W1 x) tile by tile (kGated).
//
// Few tokens: every block quantizes x for itself. More: a kPrepare phase does it once, all blocks together, and the
// next phase copies the codes (kPrepared).
struct MatmulPhase {
  int32_t kind, source, units, num_segments;
  int32_t rotation;  // which block takes the first tile
  int32_t activation;
  int32_t k;  // columns of x that are there; the rest of the last unit counts as zero
  float eps;
  Marks x_marks, delta_marks, stream_marks, out_marks;
  int32_t copy;  // which of the two prepared activations
  Segment segments[3];
  const float* x;           // kPlain: [tokens, k]. kNorm: the residual stream before `delta`
  const float* norm;        // [k]
  const float* delta;       // to add to the stream first; may be null
  const float* delta_norm;  // [k], RMSNorm of delta before that; may be null
  float* stream;            // where the stream with delta goes (another buffer than x); may be null
  float* out;               // [tokens, out_stride]
  int64_t out_stride;
};

// out = attention of this step's queries over the paged cache, this step's keys and values included; appends them.
struct AttentionPhase {
  int32_t kind, num_heads, num_kv_heads, head_dim;
  int32_t window;  // keys further back are not seen; 0: all are
  float scale, eps;
  int32_t qkv_stride;
  int32_t heads_per_kv, groups;  // groups of at most eight query heads that share a key-value head
  Marks qkv_marks, out_marks;
  const float* qkv;  // marked [tokens, qkv_stride]: q, k, v heads
  const float *cos, *sin;      // [positions, head_dim / 2]
  const float *q_norm, *k_norm;  // [head_dim], may be null
  void *k_cache, *v_cache;     // bfloat16 [blocks, kv_heads, 16, head_dim], or as kernels/kv_cache.py says
  float* out;                  // marked [tokens, out_stride]
  int64_t out_stride;
};

union alignas(16) Phase {
  MatmulPhase matmul;
  AttentionPhase attention;
  uint64_t words[32];
};
static_assert(sizeof(Phase) == 256);

struct Step {
  const Phase* phases;
  int32_t num_phases, num_tokens;
  uint32_t* arrivals;  // [3]: grid barrier and blocks that are through, zero between launches; bit t: token t has
                       // taken part in an odd number of launches
  const int32_t* positions;   // [tokens]; negative: the row is padding
  const int32_t* sequences;   // [tokens]: row of block_table
  const int32_t* first_rows;  // [tokens]: row of the same sequence's first token in this step
  const int32_t* block_table;
  int64_t block_table_stride;
  float* sums;       // [blocks, max items * 2, 16 * tokens]: row sums between passes over x
  int64_t sums_stride;  // floats a block
  float* split_out;  // [slots, 8, columns of an item]: attention of a split
  float* split_lse;  // [slots, 8, 2]: its maximum and sum
  uint32_t* split_count;  // [tokens * kv_heads * head groups * halves]; zero between launches
  uint8_t* prepared;        // [2, prepared_stride]: Activations of the widest x
  float* prepared_squares;  // [2, squares_stride]: [units][tokens]
  int64_t prepared_stride, squares_stride;
  int32_t ring_bytes, x_bytes, factor_bytes, slabs_that_fit;
  int32_t stragglers;  // a phase that reads marked values begins while so many blocks are still at the phase before
};
