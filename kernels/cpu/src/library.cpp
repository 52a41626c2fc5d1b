// The C face of the native CPU ops: one call for each fused block. Structs are mirrored in
// kernels/cpu/__init__.py. Calls from several threads are serialized.

#include <cmath>
#include <mutex>
#include <vector>

#include "attention.h"
#include "gemm.h"
#include "threads.h"

namespace {

std::mutex library_lock;

ThreadPool& pool() {
  static ThreadPool* instance = new ThreadPool;  // never destroyed: workers may outlive static destructors
  return *instance;
}

struct Workspace {
  QuantizedRows quantized;
  std::vector<float> wide, narrow;

  static float* grow(std::vector<float>& buffer, int64_t size) {
    if (buffer.size() < static_cast<size_t>(size)) buffer.resize(size);
    return buffer.data();
  }
};

Workspace& workspace() {
  static Workspace* instance = new Workspace;
  return *instance;
}

float inverse_rms(const float* x, int n, float eps) {
  vf squares{};
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf v = load<vf>(x + i);
    squares += v * v;
  }
  float total = sum(squares);
  for (; i < n; ++i) total += x[i] * x[i];
  return 1.0f / std::sqrt(total / n + eps);
}

// Rows in parallel; one or two are not worth a handover.
template <class Fn>
void for_rows(int64_t m, Fn&& fn) {
  const int64_t per_chunk = std::clamp<int64_t>(m / (pool().size() * 4), 2, 8);
  pool().run((m + per_chunk - 1) / per_chunk, [&](int64_t chunk) {
    for (int64_t row = chunk * per_chunk; row < std::min(m, (chunk + 1) * per_chunk); ++row) fn(row);
  });
}

void norm_quantize(const float* x, const float* norm, float eps, int64_t m, int k, QuantizedRows& out) {
  out.resize(m, k);
  for_rows(m, [&](int64_t row) {
    static thread_local std::vector<float> scratch;
    float* y = Workspace::grow(scratch, k);
    const float* in = x + row * k;
    const float r = inverse_rms(in, k, eps);
    for (int i = 0; i < k; ++i) y[i] = in[i] * r * norm[i];
    out.quantize_row(row, y);
  });
}

// The first `rows` of 16 lanes go to out (+ bias, added to what is there if kAdd).
template <bool kAdd>
inline void put(float* out, vf value, const float* bias, int64_t row, int rows) {
  if (rows == kTileRows) {
    if (bias) value += load<vf>(bias + row);
    if (kAdd) value += load<vf>(out + row);
    store(out + row, value);
    return;
  }
  for (int i = 0; i < rows; ++i) {
    const float v = value[i] + (bias ? bias[row + i] : 0.0f);
    out[row + i] = kAdd ? out[row + i] + v : v;
  }
}

// x [m, n] += w times the quantized rows, through RMSNorm `post_norm` where there is one.
void project_and_add(const Weight& w, const float* bias, const float* post_norm, float eps, const QuantizedRows& rows,
                     int64_t m, std::vector<float>& buffer, float* x) {
  const int64_t n = w.n;
  if (!post_norm) {
    gemm(pool(), w, rows, m,
         [&](int64_t token, int64_t row, vf v, int valid) { put<true>(x + token * n, v, bias, row, valid); });
    return;
  }
  float* out = Workspace::grow(buffer, m * n);
  gemm(pool(), w, rows, m,
       [&](int64_t token, int64_t row, vf v, int valid) { put<false>(out + token * n, v, bias, row, valid); });
  for_rows(m, [&](int64_t row) {
    const float* y = out + row * n;
    const float r = inverse_rms(y, n, eps);
    for (int i = 0; i < n; ++i) x[row * n + i] += y[i] * r * post_norm[i];
  });
}

void normalize_head(float* x, const float* norm, int dim, float eps) {
  const float r = inverse_rms(x, dim, eps);
  for (int i = 0; i < dim; ++i) x[i] = x[i] * r * norm[i];
}

void rotate(float* x, const float* cos, const float* sin, int dim) {
  const int half = dim / 2;
  for (int i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cos[i] - b * sin[i];
    x[i + half] = b * cos[i] + a * sin[i];
  }
}

struct AttentionBlock {
  Weight qkv, o;
  const float *norm, *qkv_bias, *o_bias, *q_norm, *k_norm, *post_norm, *cos, *sin;
  AttentionShape shape;
  float eps;
};

struct FfnBlock {
  Weight gate_up, down;
  const float *norm, *gate_up_bias, *down_bias, *post_norm;
  float eps;
  int32_t is_gelu;  // tanh form; else silu
};

struct Layer {
  const AttentionBlock* attention;
  const FfnBlock* ffn;
  float *k_cache, *v_cache;
};

void attention_block(const AttentionBlock* w, const Step* step, float* x, float* k_cache, float* v_cache) {
  const AttentionShape& s = w->shape;
  const int64_t m = step->num_tokens;
  const int dim = s.head_dim, hidden = w->qkv.k, width = w->qkv.n;
  Workspace& ws = workspace();
  norm_quantize(x, w->norm, w->eps, m, hidden, ws.quantized);
  float* qkv = Workspace::grow(ws.wide, m * width);
  gemm(pool(), w->qkv, ws.quantized, m,
       [&](int64_t token, int64_t row, vf v, int valid) { put<false>(qkv + token * width, v, w->qkv_bias, row, valid); });

  for_rows(m, [&](int64_t token) {
    float* row = qkv + token * width;
    const int32_t pos = step->positions[token], slot = step->slot_mapping[token];
    const float *cos = w->cos + static_cast<int64_t>(pos) * (dim / 2), *sin = w->sin + static_cast<int64_t>(pos) * (dim / 2);
    for (int h = 0; h < s.num_heads + s.num_kv_heads; ++h) {
      const float* norm = h < s.num_heads ? w->q_norm : w->k_norm;
      if (norm) normalize_head(row + h * dim, norm, dim, w->eps);
      rotate(row + h * dim, cos, sin, dim);
    }
    const int64_t base = static_cast<int64_t>(slot / kBlock) * s.num_kv_heads * dim * kBlock;
    const int offset = slot % kBlock;
    for (int h = 0; h < s.num_kv_heads; ++h) {
      const float *key = row + (s.num_heads + h) * dim, *value = key + s.num_kv_heads * dim;
      float* k = k_cache + base + static_cast<int64_t>(h) * dim * kBlock;
      float* v = v_cache + base + static_cast<int64_t>(h) * dim * kBlock;
      for (int d = 0; d < dim; ++d) k[d * kBlock + offset] = key[d];
      std::memcpy(v + offset * dim, value, dim * sizeof(float));
    }
  });

  const int out_width = s.num_heads * dim;
  float* out = Workspace::grow(ws.narrow, m * out_width);
  paged_attention(pool(), s, *step, qkv, width, k_cache, v_cache, out);
  ws.quantized.resize(m, out_width);
  for_rows(m, [&](int64_t row) { ws.quantized.quantize_row(row, out + row * out_width); });
  project_and_add(w->o, w->o_bias, w->post_norm, w->eps, ws.quantized, m, ws.wide, x);
}

void ffn_block(const FfnBlock* w, float* x, int64_t m) {
  const int hidden = w->gate_up.k, width = w->gate_up.n, ffn = w->down.k;
  Workspace& ws = workspace();
  norm_quantize(x, w->norm, w->eps, m, hidden, ws.quantized);
  float* gate_up = Workspace::grow(ws.wide, m * width);
  gemm(pool(), w->gate_up, ws.quantized, m, [&](int64_t token, int64_t row, vf v, int valid) { put<false>(gate_up + token * width, v, w->gate_up_bias, row, valid); });
  ws.quantized.resize(m, ffn);
  for_rows(m, [&](int64_t row) {
    float* gate = gate_up + row * width;
    const float* up = gate + ffn;
    for (int i = 0; i < ffn; i += kLanes) {
      const vf g = load<vf>(gate + i);
      // Both are g * sigmoid(z): silu with z = g, gelu's tanh form with z = sqrt(8 / pi) (g + 0.044715 g^3).
      const vf z = w->is_gelu ? g * 1.5957691f * (g * g * 0.044715f + 1.0f) : g;
      const vf e = exp_negative(z < 0 ? z : -z);  // always of a negative number
      const vf sigmoid = (z < 0 ? e : splat(1.0f)) / (e + 1.0f);
      store(gate + i, g * sigmoid * load<vf>(up + i));
    }
    ws.quantized.quantize_row(row, gate);
  });
  project_and_add(w->down, w->down_bias, w->post_norm, w->eps, ws.quantized, m, ws.narrow, x);
}

}  // namespace

extern "C" {

void pg_set_threads(int num_threads) {
  std::lock_guard guard(library_lock);
  pool().resize(num_threads);
}

const char* pg_isa() {
#if defined(__AVX512VNNI__)
  return "avx512vnni";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "generic";
#endif
}

void pg_linear(const Weight* w, const float* x, int64_t m, const float* bias, float* out) {
  std::lock_guard guard(library_lock);
  QuantizedRows& quantized = workspace().quantized;
  quantized.resize(m, w->k);
  for_rows(m, [&](int64_t row) { quantized.quantize_row(row, x + row * w->k); });
  gemm(pool(), *w, quantized, m,
       [&](int64_t token, int64_t row, vf v, int valid) { put<false>(out + token * w->n, v, bias, row, valid); });
}

void pg_paged_attention(const AttentionShape* shape, const Step* step, const float* q, int64_t q_stride,
                        const float* k_cache, const float* v_cache, float* out) {
  std::lock_guard guard(library_lock);
  paged_attention(pool(), *shape, *step, q, q_stride, k_cache, v_cache, out);
}

void pg_attention_block(const AttentionBlock* w, const Step* step, float* x, float* k_cache, float* v_cache) {
  std::lock_guard guard(library_lock);
  attention_block(w, step, x, k_cache, v_cache);
}

void pg_ffn_block(const FfnBlock* w, float* x, int64_t m) {
  std::lock_guard guard(library_lock);
  ffn_block(w, x, m);
}

void pg_layers(const Layer* layers, int32_t num_layers, const Step* step, float* x) {
  std::lock_guard guard(library_lock);
  for (const Layer* l = layers; l < layers + num_layers; ++l) {
    attention_block(l->attention, step, x, l->k_cache, l->v_cache);
    ffn_block(l->ffn, x, step->num_tokens);
  }
}

void pg_logits(const Weight* head, const float* norm, float eps, const float* x, int64_t m, float* out) {
  std::lock_guard guard(library_lock);
  QuantizedRows& quantized = workspace().quantized;
  norm_quantize(x, norm, eps, m, head->k, quantized);
  gemm(pool(), *head, quantized, m,
       [&](int64_t token, int64_t row, vf v, int valid) { put<false>(out + token * head->n, v, nullptr, row, valid); });
}

// Dequantized rows: out [m, k] for row numbers ids [m].
void pg_embed(const Matrix* table, const int64_t* ids, int64_t m, float* out) {
  const int tile_bytes = kTileRows * kGroup * table->bits / 8;
  for (int64_t i = 0; i < m; ++i) {
    const int lane = static_cast<int>(ids[i] % kTileRows);
    const uint8_t* block = table->data + ids[i] / kTileRows * table->block_bytes();
    const GroupParams params(*table, block);
    float* row = out + i * table->k;
    vf scale, offset;
    for (int column = 0; column < table->k; column += kGroup, block += tile_bytes) {
      if (column % table->group_size == 0) params.load_group(column / table->group_size, scale, offset);
      vb quads[8];
      switch (table->bits) {
        case 2: load_codes<2>(block, quads); break;
        case 3: load_codes<3>(block, quads); break;
        case 4: load_codes<4>(block, quads); break;
        case 5: load_codes<5>(block, quads); break;
        case 6: load_codes<6>(block, quads); break;
        default: load_codes<8>(block, quads); break;
      }
      for (int c = 0; c < kGroup; ++c)
        row[column + c] = scale[lane] * static_cast<float>(quads[c / 4][4 * lane + c % 4]) + offset[lane];
    }
  }
}

}  // extern "C"
