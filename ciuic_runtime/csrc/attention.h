// Attention over the blocked cache. One routine reduces over absolute blocks of 64 positions with a running softmax;
// the forms (grouped-query, MLA absorbed, MLA expanded) differ in where a block's keys and values come from.

constexpr int64_t kBlock = kBlockTokens;
constexpr int64_t kAllBlocks = INT64_MAX;
constexpr int64_t kSpanBlocks = 4;  // of a long context that one thread takes on
constexpr int64_t kMostSpans = 32;

// A context is cut by its own length alone, so that its bits depend on nothing else.
inline int64_t span_blocks(int64_t context) {
    const int64_t blocks = (context + kBlock - 1) / kBlock, least = (blocks + kMostSpans - 1) / kMostSpans;
    return least < kSpanBlocks ? kSpanBlocks : least;
}
inline int64_t spans_of(int64_t context) {
    const int64_t length = span_blocks(context) * kBlock;
    return (context + length - 1) / length;
}

// A block of keys turned round [key_width][64] and of values [64][values_ld], as float32. Results are `value_ld` wide,
// which is the values' width rounded up to 16.
struct KeyValues {
    float *keys, *values;
    int64_t key_width, value_ld, values_ld;
};

// 16 rows of 16 to 16 columns of 16.
inline void transpose16(const float* in, int64_t ld, float* out, int64_t ld_out) {
#if defined(__AVX512F__)
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(in + i * ld);
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        _mm512_storeu_ps(out + i * ld_out, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_ps(out + (i + 4) * ld_out, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88));
        _mm512_storeu_ps(out + (i + 8) * ld_out, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
        _mm512_storeu_ps(out + (i + 12) * ld_out, _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd));
    }
#else
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 16; ++j) out[j * ld_out + i] = in[i * ld + j];
#endif
}

// Rows [positions][width] with `ld` floats from row to row, to keys [width][64].
inline void turn_keys(const float* rows, int64_t ld, int64_t positions, int64_t width, float* keys) {
    float edge[16 * 16];
    for (int64_t p = 0; p < kBlock; p += 16)
        for (int64_t d = 0; d < width; d += 16) {
            if (p + 16 <= positions && d + 16 <= width) {
                transpose16(rows + p * ld + d, ld, keys + d * kBlock + p, kBlock);
                continue;
            }
            for (int i = 0; i < 16; ++i)
                for (int j = 0; j < 16; ++j)
                    edge[i * 16 + j] = p + i < positions && d + j < width ? rows[(p + i) * ld + d + j] : 0.0f;
            for (int j = 0; j < 16 && d + j < width; ++j)
                for (int i = 0; i < 16; ++i) keys[(d + j) * kBlock + p + i] = edge[i * 16 + j];
        }
}

inline void widen_row(const uint16_t* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store(to + i, load_bf16(from + i));
    if (i < n) store_n(to + i, load_bf16_n(from + i, n - i), n - i);
}

// Columns [offset, offset + take) of a block's cache entries, widened to float32, `ld` floats from one to
// the next.
inline void latents_of(const uint16_t* cache, int64_t width, const Sequence& s, int64_t block, int64_t positions,
                       int64_t take, int64_t offset, float* to, int64_t ld) {
    const uint16_t* from = cache + s.blocks[block] * kBlock * width + offset;
    for (int64_t p = 0; p < positions; ++p) widen_row(from + p * width, take, to + p * ld);
}

// out[kRows][16 kWide] (ld floats from row to row) = a [kRows][depth] times b [depth][16 kWide], in order of depth; added
// to what is there where `add`.
template <int kRows, int kWide>
inline void small_product(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* out, int64_t ld,
                          bool add) {
    F acc[kRows][kWide];
    for (int r = 0; r < kRows; ++r)
        for (int w = 0; w < kWide; ++w) acc[r][w] = add ? load(out + r * ld + 16 * w) : zero();
    for (int64_t k = 0; k < depth; ++k) {
        F bv[kWide];
        for (int w = 0; w < kWide; ++w) bv[w] = load(b + k * ldb + 16 * w);
        for (int r = 0; r < kRows; ++r) {
            const F av = set1(a[r * lda + k]);
            for (int w = 0; w < kWide; ++w) acc[r][w] = fma(av, bv[w], acc[r][w]);
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int w = 0; w < kWide; ++w) store(out + r * ld + 16 * w, acc[r][w]);
}

template <int kRows>
inline void small_products(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* out, int64_t ld,
                           int64_t width, bool add) {
    int64_t w = 0;
    for (; w + 64 <= width; w += 64) small_product<kRows, 4>(a, lda, b + w, ldb, depth, out + w, ld, add);
    for (; w < width; w += 16) small_product<kRows, 1>(a, lda, b + w, ldb, depth, out + w, ld, add);
}

// The running softmax of a query row: largest score so far, sum of e^(score - largest), weighted values.
struct Running {
    float largest, sum;
};

// kRows queries meet one block of which the first valid[r] keys count for row r (at least one) and the first `depth`
// values are read: those that do not count are multiplied by zero.
template <int kRows>
inline void attend_block(const float* q, int64_t ldq, const KeyValues& kv, const int64_t* valid, int64_t depth,
                         float scale, bool begin, Running* state, float* out) {
    float p[kRows][kBlock];
    small_products<kRows>(q, ldq, kv.keys, kBlock, kv.key_width, p[0], kBlock, kBlock, false);
    const F lanes = load(kLaneNumbers);
    for (int r = 0; r < kRows; ++r) {
        F s[4], top = set1(-INFINITY);
        for (int i = 0; i < 4; ++i) {
            s[i] = load(p[r] + 16 * i) * set1(scale);
            const F here = lanes + set1(static_cast<float>(16 * i) - static_cast<float>(valid[r]));  // < 0: counts
            if (valid[r] < 16 * i + 16) s[i] = select_negative(here, s[i], set1(-INFINITY));
            top = max(top, s[i]);
        }
        const float before = state[r].largest, block_top = hmax(top);
        const float largest = begin || !(before > block_top) ? block_top : before;
        F sum = zero();
        for (int i = 0; i < 4; ++i) {
            F e = exp(s[i] - set1(largest));
            const F here = lanes + set1(static_cast<float>(16 * i) - static_cast<float>(valid[r]));
            if (valid[r] < 16 * i + 16) e = select_negative(here, e, zero());
            store(p[r] + 16 * i, e);
            sum = sum + e;
        }
        float* o = out + r * kv.value_ld;
        if (begin) {
            std::memset(o, 0, kv.value_ld * sizeof(float));
            state[r].sum = hsum(sum);
        } else {
            float shrink;
            store_n(&shrink, exp(set1(before - largest)), 1);
            if (largest != before)
                for (int64_t i = 0; i < kv.value_ld; i += 16) store(o + i, load(o + i) * set1(shrink));
            state[r].sum = largest != before ? state[r].sum * shrink + hsum(sum) : state[r].sum + hsum(sum);
        }
        state[r].largest = largest;
    }
    small_products<kRows>(p[0], kBlock, kv.values, kv.values_ld, depth, out, kv.value_ld, kv.value_ld, true);
}

inline bool all_finite(const float* values, int64_t ld, int64_t rows, int64_t width) {
    F sum = zero();  // of zeros, or of what is not a number
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; i += 16) sum = fma(load(values + r * ld + i), zero(), sum);
    return hsum(sum) == 0.0f;
}

// Queries [rows][key_width] with `ldq` floats from row to row, row r at position position_of(r), positions not falling,
// meet the blocks [first, last) of their context; fill(block, positions) puts a block's first keys and values into `kv`.
// out [rows][value_ld] and state [rows] are what softmax and values have run up to.
template <class PositionOf, class Fill>
inline void attend(const float* q, int64_t ldq, int64_t rows, const KeyValues& kv, float scale, int64_t first, int64_t last,
                   PositionOf position_of, Fill fill, Running* state, float* out) {
    const int64_t context = position_of(rows - 1) + 1;
    int64_t from = 0;  // rows before it have seen all that they may
    for (int64_t block = first; block < last && block * kBlock < context; ++block) {
        while (position_of(from) < block * kBlock) ++from;
        const int64_t left = context - block * kBlock;
        const int64_t positions = left < kBlock ? left : kBlock;
        fill(block, positions);
        const auto valid_of = [&](int64_t r) {
            const int64_t n = position_of(r) + 1 - block * kBlock;
            return n < kBlock ? n : kBlock;
        };
        // Zero times a later token's value that is not finite would spread to this row: such values are not read then.
        const bool apart = valid_of(from) < positions && !all_finite(kv.values, kv.values_ld, positions, kv.value_ld);
        int64_t r = from;
        for (; r + 4 <= rows && !apart; r += 4) {
            const int64_t valid[4] = {valid_of(r), valid_of(r + 1), valid_of(r + 2), valid_of(r + 3)};
            attend_block<4>(q + r * ldq, ldq, kv, valid, kBlock, scale, block == first, state + r, out + r * kv.value_ld);
        }
        for (; r < rows; ++r) {
            const int64_t valid[1] = {valid_of(r)}, depth = apart ? valid[0] : kBlock;
            attend_block<1>(q + r * ldq, ldq, kv, valid, depth, scale, block == first, state + r, out + r * kv.value_ld);
        }
    }
}

inline void divide_by_sum(const Running& state, float* out, int64_t width) {
    const F inverse = set1(1.0f / state.sum);
    for (int64_t i = 0; i < width; i += 16) store(out + i, load(out + i) * inverse);
}

// Adds what a later part of the context came to.
inline void merge(Running* state, float* out, const Running& next, const float* next_out, int64_t width) {
    const float largest = state->largest > next.largest ? state->largest : next.largest;
    float old_share, next_share;
    store_n(&old_share, exp(set1(state->largest - largest)), 1);
    store_n(&next_share, exp(set1(next.largest - largest)), 1);
    for (int64_t i = 0; i < width; i += 16)
        store(out + i, fma(load(next_out + i), set1(next_share), load(out + i) * set1(old_share)));
    state->sum = state->sum * old_share + next.sum * next_share;
    state->largest = largest;
}

// A head's queries of some rows of a sequence.
struct Unit {
    int64_t sequence, head, row, rows;
};
struct Units {
    Unit* unit;
    int64_t count;
};

constexpr int64_t kMostUnitRows = 512;

// Cuts a batch into units, as large as they can be with a few for every thread.
inline Units share_out(Context c, const Batch& batch, int64_t heads, bool prompts_only) {
    int64_t rows = 0;
    for (int64_t i = 0; i < batch.num_sequences; ++i) rows += batch.sequences[i].length;
    int64_t most = rows * heads / (4 * c.pool->threads());
    most = most < 64 ? 64 : most > kMostUnitRows ? kMostUnitRows : most;
    Units units{c.arena->take<Unit>(heads * (rows / most + batch.num_sequences)), 0};
    for (int64_t i = 0; i < batch.num_sequences; ++i) {
        const Sequence& s = batch.sequences[i];
        if (prompts_only && !s.prompt) continue;
        for (int64_t row = 0; row < s.length; row += most)
            for (int64_t h = 0; h < heads; ++h)
                units.unit[units.count++] = {i, h, row, s.length - row < most ? s.length - row : most};
    }
    return units;
}

// Values [width] of one row turned by its position, where they are.
inline void rotate(const Rope& rope, int64_t position, float* x) {
    const int64_t half = rope.dim / 2;
    const float *cos = rope.cos + position * half, *sin = rope.sin + position * half;
    for (int64_t i = 0; i < half; ++i) {
        float &a = rope.interleaved ? x[2 * i] : x[i], &b = rope.interleaved ? x[2 * i + 1] : x[half + i];
        const float left = a * cos[i] - b * sin[i], right = b * cos[i] + a * sin[i];
        a = left, b = right;
    }
}
