// Attention by AMX tiles: 16 queries at a time (the heads of a token, or the rows of a head) meet the 64 positions of a
// block. What is float32 is cut into two bfloat16 parts, x = high + low to 2^-17 of x, so that sums of two or three
// products are as good as one of float32; cache entries are bfloat16 and serve as they lie.

constexpr int64_t kAmxLanes = 16;

inline void split_bf16(const float* x, int64_t n, uint16_t* high, uint16_t* low) {
    for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 some = first(n - i < 16 ? n - i : 16);
        const F v{_mm512_maskz_loadu_ps(some, x + i)};
        const __m256i top = (__m256i)_mm512_cvtneps_pbh(v.v);
        _mm256_mask_storeu_epi16(high + i, some, top);
        _mm256_mask_storeu_epi16(low + i, some, (__m256i)_mm512_cvtneps_pbh((v - widen_bf16(top)).v));
    }
}

// Sixteen queries, and what softmax and values have run up to for each: scores' largest, sum of weights, weighted values.
struct AmxQueries {
    uint32_t* parts[2];  // high and low: [padded / 32][16 pairs of values][16 queries]
    float* acc;          // [tiles][16 queries][16 columns]
    F largest, sum;

    // What these have run up to, in the other's memory, for these queries.
    AmxQueries copied_to(const AmxQueries& other, int64_t tiles) const {
        std::memcpy(other.acc, acc, kAmxLanes * tiles * 64);
        return {{parts[0], parts[1]}, other.acc, largest, sum};
    }
};

// The positions of a block: rows of at least 64 keys and values, `stride` bytes from one to the next; the low parts are
// null where there are none.
struct AmxKeyValues {
    const uint8_t *keys[2], *values[2];
    int64_t key_stride, value_stride;
};

// A thread's memory and ways to use it, for keys `width` and values `value_width` wide.
class AmxAttention {
  public:
    const int64_t width, padded, tiles;  // keys padded to 32 values; values in tiles of 16 columns, an even number

    static size_t nbytes(int64_t width, int64_t value_width) {
        const int64_t padded = round_up(width, 32), tiles = round_up(value_width, 32) / 16;
        return kAmxLanes * padded * 4 + kBlock * kAmxLanes * 12 + 2 * kBlock * tiles * 32 + 7 * 64;
    }
    static size_t queries_nbytes(int64_t width, int64_t value_width) {
        return kAmxLanes * (round_up(width, 32) * 4 + round_up(value_width, 32) * 4);
    }

    AmxAttention(char* memory, int64_t width, int64_t value_width)
        : width(width), padded(round_up(width, 32)), tiles(round_up(value_width, 32) / 16), at_(memory) {
        take(scores_, kBlock * kAmxLanes);
        take(weights_, kBlock * kAmxLanes);
        for (auto& r : rows_) take(r, kAmxLanes * padded);
        for (auto& h : halves_) take(h, kAmxLanes * kBlock);
        for (auto& v : values_) take(v, kBlock / 2 * tiles * 16);
    }

    // Room for 16 queries at `memory`, which is moved on.
    AmxQueries take_queries(char*& memory) const {
        AmxQueries q;
        for (auto& part : q.parts) part = reinterpret_cast<uint32_t*>(memory), memory += kAmxLanes * padded * 2;
        q.acc = reinterpret_cast<float*>(memory), memory += kAmxLanes * tiles * 64;
        q.largest = q.sum = zero();
        return q;
    }

    // `count` queries [width] with `ld` floats from one to the next, turned round so that 32 values of every one are an
    // operand; missing ones are zeros.
    void set_queries(const float* q, int64_t ld, int64_t count, const AmxQueries& to) {
        for (uint16_t* part : rows_)
            if (count < kAmxLanes || width < padded) std::memset(part, 0, kAmxLanes * padded * sizeof(uint16_t));
        for (int64_t i = 0; i < count; ++i) split_bf16(q + i * ld, width, rows_[0] + i * padded, rows_[1] + i * padded);
        for (int part = 0; part < 2; ++part)
            for (int64_t k = 0; k < padded / 2; k += 16)
                transpose16(reinterpret_cast<float*>(rows_[part]) + k, padded / 2,
                            reinterpret_cast<float*>(to.parts[part]) + k * kAmxLanes, kAmxLanes);
    }

    // The block's values, two positions side by side as the right operand wants them. `next_nbytes` bytes at `next` will
    // be wanted after this block: they are asked for from memory meanwhile.
    void set_values(const AmxKeyValues& kv, const uint8_t* next, int64_t next_nbytes) {
        turn_values(kv.values[0], kv.value_stride, values_[0], next, next_nbytes);
        if (kv.values[1]) turn_values(kv.values[1], kv.value_stride, values_[1], nullptr, 0);
    }

    // Queries meet the block set before. Query i may see the first valid[i] of its `positions`; all see the first `seen`.
    void attend(AmxQueries& q, const AmxKeyValues& kv, float scale, bool begin, int64_t positions, int64_t seen, F valid) {
        score(q, kv);
        soften(q, scale, begin, positions, seen, valid);
        add_values(q, begin, kv.values[1]);
    }

    // One query's results, from one set of queries to another.
    void copy_lane(AmxQueries& to, const AmxQueries& from, int64_t i) const {
        const __mmask16 lane = static_cast<__mmask16>(1u << i);
        to.largest.v = _mm512_mask_mov_ps(to.largest.v, lane, from.largest.v);
        to.sum.v = _mm512_mask_mov_ps(to.sum.v, lane, from.sum.v);
        for (int64_t t = 0; t < tiles; ++t) store(to.acc + (t * kAmxLanes + i) * 16, load(from.acc + (t * kAmxLanes + i) * 16));
    }

    // `count` of query i's weighted values from column `begin` on (multiples of 16), divided by the sum of weights or not.
    static void result(const AmxQueries& q, int64_t i, int64_t begin, int64_t count, bool divided, float* out) {
        float sums[kAmxLanes];
        store(sums, q.sum);
        const F factor = set1(divided ? 1.0f / sums[i] : 1.0f);
        for (int64_t c = 0; c < count; c += 16) store(out + c, load(q.acc + (begin + c + i) * 16) * factor);
    }

  private:
    template <class T>
    void take(T*& to, int64_t n) {
        to = reinterpret_cast<T*>(at_);
        at_ += round_up(n * static_cast<int64_t>(sizeof(T)), 64);
    }

    void turn_values(const uint8_t* rows, int64_t stride, uint32_t* to, const uint8_t* next, int64_t next_nbytes) const {
        alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                          8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        const int64_t ahead = next_nbytes / (kBlock / 2);
        for (int64_t p = 0; p < kBlock; p += 2, rows += 2 * stride, next += ahead) {
            for (int64_t i = 0; i < ahead; i += 64) __builtin_prefetch(next + i, 0, 2);
            for (int64_t t = 0; t < tiles; t += 2) {
                const __m512i a = _mm512_loadu_si512(rows + 32 * t), b = _mm512_loadu_si512(rows + stride + 32 * t);
                uint32_t* pairs = to + ((p / 32 * tiles + t) * 16 + p / 2 % 16) * 16;
                _mm512_store_si512(pairs, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(pairs + 256, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }

    // [64 positions][16 queries]; of a position's parts and a query's all products but low with low.
    void score(const AmxQueries& q, const AmxKeyValues& kv) {
        amx_stored();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        const int64_t stride = kv.key_stride;
        for (int part = 0; part < (kv.keys[1] ? 2 : 1); ++part) {
            const uint8_t* keys = kv.keys[part];
            for (int64_t k = 0; k < padded / 32; ++k, keys += 64) {
                _tile_loadd(4, q.parts[0] + k * 256, 64);
                _tile_loadd(6, keys, stride);
                _tile_loadd(7, keys + 16 * stride, stride);
                _tile_dpbf16ps(0, 6, 4);
                _tile_dpbf16ps(1, 7, 4);
                if (part == 0) {
                    _tile_loadd(5, q.parts[1] + k * 256, 64);
                    _tile_dpbf16ps(0, 6, 5);
                    _tile_dpbf16ps(1, 7, 5);
                }
                _tile_loadd(6, keys + 32 * stride, stride);
                _tile_loadd(7, keys + 48 * stride, stride);
                _tile_dpbf16ps(2, 6, 4);
                _tile_dpbf16ps(3, 7, 4);
                if (part == 0) {
                    _tile_dpbf16ps(2, 6, 5);
                    _tile_dpbf16ps(3, 7, 5);
                }
            }
        }
        _tile_stored(0, scores_, 64);
        _tile_stored(1, scores_ + 256, 64);
        _tile_stored(2, scores_ + 512, 64);
        _tile_stored(3, scores_ + 768, 64);
    }

    // Scores to weights, and on with the running softmax, one query a lane.
    void soften(AmxQueries& q, float scale, bool begin, int64_t positions, int64_t seen, F valid) {
        F top = set1(-INFINITY), total = zero();
        for (int64_t p = 0; p < positions; ++p) {
            F s = load(scores_ + p * kAmxLanes) * set1(scale);
            if (p >= seen) s = select_negative(set1(static_cast<float>(p)) - valid, s, set1(-INFINITY));
            store(scores_ + p * kAmxLanes, s);
            top = max(top, s);
        }
        if (!begin) top = max(q.largest, top);
        for (int64_t p = 0; p < positions; ++p) {
            F e = exp(load(scores_ + p * kAmxLanes) - top);
            if (p >= seen) e = select_negative(set1(static_cast<float>(p)) - valid, e, zero());
            store(scores_ + p * kAmxLanes, e);
            total = total + e;
        }
        std::memset(scores_ + positions * kAmxLanes, 0, (kBlock - positions) * kAmxLanes * sizeof(float));
        if (!begin) {
            float shrink[kAmxLanes];
            store(shrink, exp(q.largest - top));
            total = fma(q.sum, load(shrink), total);
            for (int64_t i = 0; i < kAmxLanes; ++i)
                for (int64_t t = 0; shrink[i] != 1.0f && t < tiles; ++t) {
                    float* row = q.acc + (t * kAmxLanes + i) * 16;
                    store(row, load(row) * set1(shrink[i]));
                }
        }
        q.largest = top, q.sum = total;
        for (int64_t p = 0; p < kBlock; p += 16) transpose16(scores_ + p * kAmxLanes, kAmxLanes, weights_ + p, kBlock);
        split_bf16(weights_, kAmxLanes * kBlock, halves_[0], halves_[1]);
    }

    // Two tiles of columns at a time: one's products wait while the other's run.
    void add_values(const AmxQueries& q, bool begin, bool low_values) {
        amx_stored();
        _tile_loadd(1, halves_[0], kBlock * 2);
        _tile_loadd(2, halves_[1], kBlock * 2);
        _tile_loadd(3, halves_[0] + 32, kBlock * 2);
        _tile_loadd(4, halves_[1] + 32, kBlock * 2);
        for (int64_t t = 0; t < tiles; t += 2) {
            float* sums = q.acc + t * 256;
            const uint32_t *early = values_[0] + t * 256, *late = early + tiles * 256;
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
            if (low_values) {
                early = values_[1] + t * 256, late = early + tiles * 256;
                _tile_loadd(6, early, 64);
                _tile_loadd(7, early + 256, 64);
                _tile_dpbf16ps(0, 1, 6);
                _tile_dpbf16ps(5, 1, 7);
                _tile_loadd(6, late, 64);
                _tile_loadd(7, late + 256, 64);
                _tile_dpbf16ps(0, 3, 6);
                _tile_dpbf16ps(5, 3, 7);
            }
            _tile_stored(0, sums, 64);
            _tile_stored(5, sums + 256, 64);
        }
    }

    char* at_;
    float *scores_, *weights_;   // [64 positions][16 queries], [16 queries][64 positions]
    uint16_t *rows_[2], *halves_[2];  // [16 queries][padded], [16 queries][64 positions]
    uint32_t* values_[2];        // [2][tiles][16 pairs of positions][16 columns]
};
