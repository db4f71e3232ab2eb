// The absorbed form of MLA by AMX tiles: up to 16 heads of a token meet the latents of a block at once. Cache entries are
// bfloat16 and serve as they lie; queries and softmax weights are cut into two bfloat16 parts, x = high + low to 2^-17 of
// x, so that a sum of two products is as good as one of float32.

constexpr int64_t kAmxHeads = 16;

inline void split_bf16(const float* x, int64_t n, uint16_t* high, uint16_t* low) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 some = first(n - i < 16 ? n - i : 16);
        const F v{_mm512_maskz_loadu_ps(some, x + i)};
        const __m256i top = (__m256i)_mm512_cvtneps_pbh(v.v);
        _mm256_mask_storeu_epi16(high + i, some, top);
        _mm256_mask_storeu_epi16(low + i, some, (__m256i)_mm512_cvtneps_pbh((v - widen_bf16(top)).v));
    }
}

// A thread's memory for it, taken from `at` on; entries are padded to a multiple of 32 values.
struct AmxLatents {
    int64_t width, padded, tiles;            // of values, 16 columns each, an even number
    float *acc, *scores, *weights;           // [tiles][16 heads][16], [64 positions][16 heads], [16 heads][64 positions]
    uint32_t *queries[2], *values;           // high and low [padded / 32][16 pairs][16 heads]; [2][tiles][16 pairs][16]
    uint16_t *rows[2], *halves[2], *block;   // [16 heads][padded], [16 heads][64 positions], [64 positions][padded]

    static size_t nbytes(int64_t width, int64_t rank) {
        const int64_t padded = round_up(width, 32), wide = round_up(rank, 32);
        return kAmxHeads * (wide * 4 + padded * 8) + kBlock * (kAmxHeads * 12 + wide * 2 + padded * 2) + 16 * 64;
    }
    AmxLatents(void* memory, int64_t width, int64_t rank)
        : width(width), padded(round_up(width, 32)), tiles(round_up(rank, 32) / 16) {
        char* at = static_cast<char*>(memory);
        const auto take = [&](auto*& to, int64_t n) {
            to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(at);
            at += round_up(n * static_cast<int64_t>(sizeof *to), 64);
        };
        take(acc, kAmxHeads * tiles * 16), take(scores, kBlock * kAmxHeads), take(weights, kBlock * kAmxHeads);
        for (auto& q : queries) take(q, kAmxHeads * padded / 2);
        take(values, kBlock / 2 * tiles * 16);
        for (auto& r : rows) take(r, kAmxHeads * padded);
        for (auto& h : halves) take(h, kAmxHeads * kBlock);
        take(block, kBlock * padded);
    }

    // Queries [heads][width], turned round so that 32 values of every head are one operand; missing heads are zeros.
    void set_queries(const float* q, int64_t heads) {
        for (uint16_t* part : rows)
            if (heads < kAmxHeads || width < padded) std::memset(part, 0, kAmxHeads * padded * sizeof(uint16_t));
        for (int64_t h = 0; h < heads; ++h)
            split_bf16(q + h * width, width, rows[0] + h * padded, rows[1] + h * padded);
        for (int part = 0; part < 2; ++part)
            for (int64_t k = 0; k < padded / 2; k += 16)
                transpose16(reinterpret_cast<float*>(rows[part]) + k, padded / 2,
                            reinterpret_cast<float*>(queries[part]) + k * kAmxHeads, kAmxHeads);
    }

    // Scores of 64 entries with `stride` bytes from one to the next.
    void score(const uint8_t* entries, int64_t stride) {
        amx_stored();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < padded / 32; ++k, entries += 64) {
            _tile_loadd(4, queries[0] + k * 256, 64);
            _tile_loadd(5, queries[1] + k * 256, 64);
            _tile_loadd(6, entries, stride);
            _tile_loadd(7, entries + 16 * stride, stride);
            _tile_dpbf16ps(0, 6, 4);
            _tile_dpbf16ps(1, 7, 4);
            _tile_dpbf16ps(0, 6, 5);
            _tile_dpbf16ps(1, 7, 5);
            _tile_loadd(6, entries + 32 * stride, stride);
            _tile_loadd(7, entries + 48 * stride, stride);
            _tile_dpbf16ps(2, 6, 4);
            _tile_dpbf16ps(3, 7, 4);
            _tile_dpbf16ps(2, 6, 5);
            _tile_dpbf16ps(3, 7, 5);
        }
        _tile_stored(0, scores, 64);
        _tile_stored(1, scores + 256, 64);
        _tile_stored(2, scores + 512, 64);
        _tile_stored(3, scores + 768, 64);
    }

    // Scores of the first `positions` to weights, and on with the running softmax, one head a lane.
    void soften(int64_t positions, float scale, bool begin, F* largest, F* sum) {
        F top = set1(-INFINITY), total = zero();
        for (int64_t p = 0; p < positions; ++p) {
            const F s = load(scores + p * kAmxHeads) * set1(scale);
            store(scores + p * kAmxHeads, s);
            top = max(top, s);
        }
        if (!begin) top = max(*largest, top);
        for (int64_t p = 0; p < positions; ++p) {
            const F e = exp(load(scores + p * kAmxHeads) - top);
            store(scores + p * kAmxHeads, e);
            total = total + e;
        }
        std::memset(scores + positions * kAmxHeads, 0, (kBlock - positions) * kAmxHeads * sizeof(float));
        if (!begin) {
            float shrink[kAmxHeads];
            store(shrink, exp(*largest - top));
            total = fma(*sum, load(shrink), total);
            for (int64_t h = 0; h < kAmxHeads; ++h)
                for (int64_t t = 0; shrink[h] != 1.0f && t < tiles; ++t) {
                    float* row = acc + (t * kAmxHeads + h) * 16;
                    store(row, load(row) * set1(shrink[h]));
                }
        }
        *largest = top, *sum = total;
        for (int64_t p = 0; p < kBlock; p += 16) transpose16(scores + p * kAmxHeads, kAmxHeads, weights + p, kBlock);
        split_bf16(weights, kAmxHeads * kBlock, halves[0], halves[1]);
    }

    // The entries' first columns, two positions side by side as the right operand wants them. `next` entries will be wanted
    // after these: they are asked for from memory meanwhile.
    void turn_values(const uint8_t* entries, int64_t stride, const uint8_t* next) {
        alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                          8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (int64_t p = 0; p < kBlock; p += 2, entries += 2 * stride, next += 4 * width) {
            for (int64_t i = 0; i < 4 * width; i += 64) __builtin_prefetch(next + i, 0, 2);
            for (int64_t t = 0; t < tiles; t += 2) {
                const __m512i a = _mm512_loadu_si512(entries + 32 * t), b = _mm512_loadu_si512(entries + stride + 32 * t);
                uint32_t* to = values + ((p / 32 * tiles + t) * 16 + p / 2 % 16) * 16;
                _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(to + 256, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }

    // Two tiles of columns at a time: one's products wait while the other's run.
    void add_values(bool begin) {
        amx_stored();
        _tile_loadd(1, halves[0], kBlock * 2);
        _tile_loadd(2, halves[1], kBlock * 2);
        _tile_loadd(3, halves[0] + 32, kBlock * 2);
        _tile_loadd(4, halves[1] + 32, kBlock * 2);
        for (int64_t t = 0; t < tiles; t += 2) {
            float* sums = acc + t * 256;
            const uint32_t *early = values + t * 256, *late = early + tiles * 256;
            if (begin) {
                _tile_zero(0);
                _tile_zero(5);
            } else {
                _tile_loadd(0, sums, 64);
                _tile_loadd(5, sums + 256, 64);
            }
            _tile_loadd(6, early, 64);
            _tile_loadd(7, early + 256, 64);
            _tile_dpbf16ps(0, 1, 6);
            _tile_dpbf16ps(5, 1, 7);
            _tile_dpbf16ps(0, 2, 6);
            _tile_dpbf16ps(5, 2, 7);
            _tile_loadd(6, late, 64);
            _tile_loadd(7, late + 256, 64);
            _tile_dpbf16ps(0, 3, 6);
            _tile_dpbf16ps(5, 3, 7);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(5, 4, 7);
            _tile_stored(0, sums, 64);
            _tile_stored(5, sums + 256, 64);
        }
    }
};

// Queries [heads][width] of a token whose context ends before `context` meet the blocks [first, last) of it; out [heads]
// with `ld` floats (a multiple of 16) from one to the next.
inline void amx_attend(AmxLatents& m, const float* q, int64_t heads, const uint16_t* cache, const Sequence& s, float scale,
                       int64_t first, int64_t last, int64_t context, Running* state, float* out, int64_t ld) {
    amx_begin();
    m.set_queries(q, heads);
    F largest = zero(), sum = zero();
    for (int64_t block = first; block < last && block * kBlock < context; ++block) {
        const int64_t left = context - block * kBlock, positions = left < kBlock ? left : kBlock;
        const uint16_t* entries = cache + s.blocks[block] * kBlock * m.width;
        if (positions < kBlock || m.width != m.padded) {
            std::memset(m.block, 0, kBlock * m.padded * sizeof(uint16_t));
            for (int64_t p = 0; p < positions; ++p)
                std::memcpy(m.block + p * m.padded, entries + p * m.width, m.width * sizeof(uint16_t));
            entries = m.block;
        }
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(entries);
        const int64_t after = block + 1 < last && (block + 1) * kBlock < context ? block + 1 : block;
        m.turn_values(bytes, m.padded * 2, reinterpret_cast<const uint8_t*>(cache + s.blocks[after] * kBlock * m.width));  // first: it reads in the order of memory
        m.score(bytes, m.padded * 2);
        m.soften(positions, scale, block == first, &largest, &sum);
        m.add_values(block == first);
    }
    amx_end();
    float most[kAmxHeads], total[kAmxHeads];
    store(most, largest), store(total, sum);
    for (int64_t h = 0; h < heads; ++h) {
        state[h] = {most[h], total[h]};
        for (int64_t i = 0; i < ld; i += 16) store(out + h * ld + i, load(m.acc + (i + h) * 16));
    }
}
