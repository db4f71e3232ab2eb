// What the kernels of every instruction set offer, and the data they work on. Each set is the same source compiled with
// other flags into a namespace of its own (kernels_isa.cpp); `Kernels` is its table of entry points.
//
// All results are row-invariant: a row's bits depend on that row's inputs alone, not on how many rows share the call,
// on the number of threads, or on the order in which they finish.
#pragma once

#include <cstddef>
#include <cstdint>

#include "thread_pool.h"

namespace ciuic {

// The layouts of models/layout.py.
enum class Layout : int { w4g128_t16, w8g128_t16, bf16_rows, f32_rows };

constexpr int64_t kGroup = 128;    // columns that share a scale
constexpr int64_t kTileRows = 16;
constexpr int64_t kBlockTokens = 64;  // of the KV cache; attention reduces over blocks at absolute positions

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// One matrix [rows, columns], or `count` of them one after the other. `data` is null where there is none.
struct Matrix {
    Layout layout = Layout::f32_rows;
    int64_t count = 1, rows = 0, columns = 0;
    const uint8_t* data = nullptr;

    int64_t groups() const { return (columns + kGroup - 1) / kGroup; }
    bool tiled() const { return layout == Layout::w4g128_t16 || layout == Layout::w8g128_t16; }
    int64_t weight_bytes() const { return groups() * kGroup * kTileRows / (layout == Layout::w4g128_t16 ? 2 : 1); }
    int64_t tile_bytes() const { return weight_bytes() + round_up(groups() * kTileRows * 2, 64); }
    int64_t row_bytes() const { return columns * (layout == Layout::bf16_rows ? 2 : 4); }
    int64_t nbytes() const { return tiled() ? (rows + kTileRows - 1) / kTileRows * tile_bytes() : rows * row_bytes(); }
    Matrix at(int64_t i) const {
        Matrix one = *this;
        one.count = 1;
        one.data += i * nbytes();
        return one;
    }
};

// Memory that a call carves its temporaries from; it keeps what it has grown to, so a repeated call allocates nothing.
class Arena {
  public:
    Arena() = default;
    ~Arena();
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    void reset();  // everything handed out is void
    void* take(size_t nbytes);
    template <class T>
    T* take(int64_t n) { return static_cast<T*>(take(static_cast<size_t>(n) * sizeof(T))); }
    size_t nbytes() const { return total_; }

  private:
    struct Piece;
    Piece* first_ = nullptr;
    size_t used_ = 0, total_ = 0;
};

struct Context {
    ThreadPool* pool;
    Arena* arena;
};

// The new tokens of one sequence: rows [start, start + length), at positions from `position` on.
struct Sequence {
    int64_t start, length, position;
    const int32_t* blocks;  // block table
    bool prompt;            // expanded attention; else absorbed
};

// A batch: `rows` tokens of `num_sequences` sequences.
struct Batch {
    int64_t rows, num_sequences;
    const int64_t* positions;  // [rows]
    const int64_t* slots;      // [rows]: block x 64 + offset of each token's cache entry
    const Sequence* sequences;
};

// Rotation tables by position: [positions, dim / 2] each.
struct Rope {
    const float *cos = nullptr, *sin = nullptr;
    int64_t dim = 0;
    bool interleaved = false;
};

struct MlpWeights {
    Matrix gate, up, down;
    const float *gate_bias = nullptr, *up_bias = nullptr, *down_bias = nullptr;
};

struct MlaWeights {
    int64_t heads, nope, rope, value, kv_rank;
    Matrix q, q_a, q_b, kv_a, k_b, k_b_absorbed, v_b, o;  // either q, or q_a and q_b
    const float *q_a_norm, *kv_a_norm, *q_a_bias, *kv_a_bias, *o_bias;
    float norm_eps, scale;
};

struct GqaWeights {
    int64_t heads, kv_heads, dim;
    Matrix q, k, v, o;
    const float *q_bias, *k_bias, *v_bias, *o_bias;
    float scale;
};

struct RouteParams {
    int64_t experts, per_token, groups, groups_per_token;
    bool sigmoid;         // else softmax
    bool group_top2;      // a group counts by the sum of its best two (V3), else by its best (V2)
    bool limited;         // only experts of the best groups are eligible
    bool normalise;
    float scaling;
};

// Rows are float32 [rows, width] unless said otherwise. `residual` may be null, and may be the output itself.
struct Kernels {
    const char* name;
    void (*linear)(Context, const Matrix&, const float* bias, const float* x, int64_t rows, const float* residual,
                   float* out);
    void (*mlp)(Context, const MlpWeights&, const float* x, int64_t rows, const float* residual, float* out);
    // ids, weights [rows, per_token]; `weight` [experts, hidden], `bias` null or [experts].
    void (*route)(Context, const RouteParams&, const Matrix& weight, const float* bias, const float* x, int64_t rows,
                  int64_t* ids, float* weights);
    // The rows [rows x per_token, hidden] of those experts whose addresses [experts, 3] (gate, up, down) are not null.
    void (*experts)(Context, const MlpWeights& shape, const int64_t* addresses, int64_t num_experts, const float* x,
                    const int64_t* ids, int64_t rows, int64_t per_token, float* out);
    // Each row's weighted expert rows in the router's order, then what is added: up to two float32 [rows, hidden].
    void (*combine)(Context, const float* expert_rows, const float* weights, int64_t rows, int64_t per_token,
                    int64_t hidden, const float* added0, const float* added1, float* out);
    // Attention with residual; `cache` bf16 [slots, kv_rank + rope].
    void (*mla)(Context, const MlaWeights&, const Rope&, const Batch&, const float* x, const float* residual,
                uint16_t* cache, float* out);
    // `cache` bf16 [slots, 2, kv_heads, dim].
    void (*gqa)(Context, const GqaWeights&, const Rope&, const Batch&, const float* x, const float* residual,
                uint16_t* cache, float* out);
    void (*rms_norm)(Context, const float* x, const float* weight, int64_t rows, int64_t width, float eps, float* out);
    void (*embed)(Context, const uint16_t* table, const int64_t* ids, int64_t rows, int64_t width, float* out);
};

// Null where this build or this processor lacks the set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();

}  // namespace ciuic
