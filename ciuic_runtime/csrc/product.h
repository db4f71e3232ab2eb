// out[rows, n0..n1) = activations x matrix: the one place where weights meet activations.
//
// Tiles: within a group the dot products are exact integers; groups are added in order as
// acc = fma(sum, weight scale x activation scale, acc). Every path below does exactly that, so it does not matter which
// of them computes a row, nor how many rows are with it.

constexpr int64_t kQuads = kGroup / 4;  // of four columns: 64 stored bytes each

// What the zero of the weights adds to a row's sums: the activations' sum times 8 or 128.
inline const int32_t* zero_sums(bool nibbles, const Rows& x) { return nibbles ? x.sums8 : x.sums128; }

// Step 1 of every path: 16 rows' integer sums over one group, the weights' zero taken off.
template <bool kNibbles>
inline I group_sum(const uint8_t* w, const int8_t* x, int32_t zero_sum) {
    I a = izero(), b = izero(), c = izero(), d = izero();
    if (kNibbles) {
        for (int j = 0; j < kQuads / 4; ++j) {
            const Bytes w0 = load_bytes(w + 128 * j), w1 = load_bytes(w + 128 * j + 64);
            a = dot4(a, low_nibbles(w0), x + 16 * j);
            b = dot4(b, high_nibbles(w0), x + 16 * j + 4);
            c = dot4(c, low_nibbles(w1), x + 16 * j + 8);
            d = dot4(d, high_nibbles(w1), x + 16 * j + 12);
        }
    } else if (kDot4ExactForBytes) {
        for (int j = 0; j < kQuads / 4; ++j) {
            a = dot4(a, load_bytes(w + 256 * j), x + 16 * j);
            b = dot4(b, load_bytes(w + 256 * j + 64), x + 16 * j + 4);
            c = dot4(c, load_bytes(w + 256 * j + 128), x + 16 * j + 8);
            d = dot4(d, load_bytes(w + 256 * j + 192), x + 16 * j + 12);
        }
    } else {
        for (int j = 0; j < kQuads / 2; ++j) {
            a = dot4_centred(a, load_bytes(w + 128 * j), x + 8 * j);
            b = dot4_centred(b, load_bytes(w + 128 * j + 64), x + 8 * j + 4);
        }
        return a + b;
    }
    return (a + b) + (c + d) - iset1(zero_sum);
}

constexpr int64_t kStreamAhead = 8192;  // bytes asked for, into the second cache, before they are wanted

// Path 1, few rows: weights go from memory straight through the registers, once for all kRows of them.
template <bool kNibbles, int kRows>
inline void stream_tile(const Matrix& w, int64_t tile, const Rows& x, F* out) {
    const uint8_t* q = w.data + tile * w.tile_bytes();
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(q + w.weight_bytes());
    constexpr int64_t kBytes = kGroup * kTileRows / (kNibbles ? 2 : 1);
    const int32_t* zeros = zero_sums(kNibbles, x);
    F acc[kRows];
    for (F& a : acc) a = zero();
    for (int64_t g = 0, groups = w.groups(); g < groups; ++g, q += kBytes) {
        for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(q + i + kStreamAhead, 0, 2);
        const F ws = load_f16(scales + g * kTileRows);
        for (int r = 0; r < kRows; ++r) {
            const int64_t at = g * x.stride + r;
            const I sum = group_sum<kNibbles>(q, x.group(g, r), zeros[at]);
            acc[r] = fma(to_float(sum), ws * set1(x.scales[at]), acc[r]);
        }
    }
    for (int r = 0; r < kRows; ++r) out[r] = acc[r];
}

inline void write_columns(float* out, F value, int64_t columns) {
    if (columns >= kTileRows) store(out, value);
    else store_n(out, value, columns);
}

template <int kRows>
inline void stream_tiles(const Matrix& w, const Rows& x, int64_t n0, int64_t n1, float* out, int64_t ld) {
    for (int64_t n = n0; n < n1; n += kTileRows) {
        F value[kRows];
        if (w.layout == Layout::w4g128_t16) stream_tile<true, kRows>(w, n / kTileRows, x, value);
        else stream_tile<false, kRows>(w, n / kTileRows, x, value);
        for (int r = 0; r < kRows; ++r) write_columns(out + r * ld + n - n0, value[r], n1 - n);
    }
}

// Path 2, more rows (AMX has a path of its own): a group of a tile is unpacked to bytes once and used for all rows. 2048 bytes, quad after quad.
inline void unpack_group(const uint8_t* q, uint8_t* bytes) {
    for (int j = 0; j < kQuads / 2; ++j) {
        const Bytes b = load_bytes(q + 64 * j);
        store_bytes(bytes + 128 * j, low_nibbles(b));
        store_bytes(bytes + 128 * j + 64, high_nibbles(b));
    }
}

// Where a block's sums are kept while groups are added: [rows][columns of the chunk].
struct Block {
    float* acc;
    int64_t ld;
};

template <int kRows, int kTiles>
inline void add_group(const uint8_t* const* bytes, const F* ws, bool nibbles, const Rows& x, int64_t g, int64_t row,
                      Block block, int64_t column) {
    I sum[kRows][kTiles];
    for (auto& r : sum)
        for (I& s : r) s = izero();
    const int8_t* q = x.group(g, row);
    for (int j = 0; j < kQuads; ++j) {
        Bytes b[kTiles];
        for (int t = 0; t < kTiles; ++t) b[t] = load_bytes(bytes[t] + 64 * j);
        for (int r = 0; r < kRows; ++r)
            for (int t = 0; t < kTiles; ++t)
                sum[r][t] = kDot4ExactForBytes || nibbles ? dot4(sum[r][t], b[t], q + r * kGroup + 4 * j)
                                                          : dot4_centred(sum[r][t], b[t], q + r * kGroup + 4 * j);
    }
    const bool centred = !kDot4ExactForBytes && !nibbles;
    const int32_t* zeros = zero_sums(nibbles, x);
    for (int r = 0; r < kRows; ++r) {
        const int64_t at = g * x.stride + row + r;
        const I z = iset1(centred ? 0 : zeros[at]);
        for (int t = 0; t < kTiles; ++t) {
            float* acc = block.acc + (row + r) * block.ld + column + t * kTileRows;
            store(acc, fma(to_float(sum[r][t] - z), ws[t] * set1(x.scales[at]), load(acc)));
        }
    }
}

#if defined(__AVX512F__)
constexpr int kBlockRows = 6, kBlockTiles = 2;  // of 4 to 12 rows and 1 to 4 tiles the quickest here
#elif defined(__AVX2__)
constexpr int kBlockRows = 4, kBlockTiles = 1;
#else
constexpr int kBlockRows = 1, kBlockTiles = 1;
#endif

template <int kTiles>
inline void add_group_rows(const uint8_t* const* bytes, const F* ws, bool nibbles, const Rows& x, int64_t g,
                           int64_t row, int64_t rows, Block block, int64_t column) {
    for (; rows >= kBlockRows; rows -= kBlockRows, row += kBlockRows)
        add_group<kBlockRows, kTiles>(bytes, ws, nibbles, x, g, row, block, column);
    for (; rows >= 4; rows -= 4, row += 4) add_group<4, kTiles>(bytes, ws, nibbles, x, g, row, block, column);
    for (; rows >= 1; --rows, ++row) add_group<1, kTiles>(bytes, ws, nibbles, x, g, row, block, column);
}

constexpr int64_t kStreamRows = 4;    // up to here weights are streamed through registers
constexpr int64_t kRowBlock = 128;    // rows that meet a group's bytes while both are in the nearest cache
constexpr int64_t kChunkTiles = 8;    // tiles of a chunk of the second path

#if defined(__AMX_INT8__)
#include "amx.h"
#else
constexpr bool kAmx = false;
inline void amx_tiles(const Matrix&, const Rows&, int64_t, int64_t, int64_t, float*, int64_t) {}
inline void amx_bf16_product(const Matrix&, const Rows&, int64_t, int64_t, int64_t, float*, int64_t, uint8_t*) {}
#endif

// What product() uses of its thread's scratch memory, from the start on.
inline size_t block_scratch(const Matrix& w, int64_t rows) {
    if (!w.tiled()) return kTileRows * w.row_bytes();
    if (kAmx) return 0;
    const int64_t kept = rows > kRowBlock ? w.groups() : 1;
    return kChunkTiles * (kGroup * kTileRows * kept + kRowBlock * kTileRows * sizeof(float));
}

// Up to kChunkTiles tiles, any number of rows.
inline void block_tiles(Context c, int thread, const Matrix& w, const Rows& x, int64_t rows, int64_t n0, int64_t n1,
                        float* out, int64_t ld) {
    const int64_t groups = w.groups(), tiles = (n1 - n0 + kTileRows - 1) / kTileRows;
    const bool keep = rows > kRowBlock, nibbles = w.layout == Layout::w4g128_t16;
    const int64_t group_bytes = kGroup * kTileRows, packed = nibbles ? group_bytes / 2 : group_bytes;
    char* memory = static_cast<char*>(c.pool->scratch(thread, block_scratch(w, rows)));
    Block block{reinterpret_cast<float*>(memory), tiles * kTileRows};
    uint8_t* bytes = reinterpret_cast<uint8_t*>(memory + kRowBlock * kChunkTiles * kTileRows * sizeof(float));
    for (int64_t row = 0; row < rows; row += kRowBlock) {
        const int64_t n = rows - row < kRowBlock ? rows - row : kRowBlock;
        const Rows mine = block_of(x, row);
        std::memset(block.acc, 0, n * block.ld * sizeof(float));
        for (int64_t g = 0; g < groups; ++g)
            for (int64_t t = 0; t < tiles; t += kBlockTiles) {
                const uint8_t* b[kBlockTiles];
                F ws[kBlockTiles];
                const int count = static_cast<int>(tiles - t < kBlockTiles ? tiles - t : kBlockTiles);
                for (int i = 0; i < count; ++i) {
                    const uint8_t* tile = w.data + (n0 / kTileRows + t + i) * w.tile_bytes();
                    ws[i] = load_f16(reinterpret_cast<const uint16_t*>(tile + w.weight_bytes()) + g * kTileRows);
                    b[i] = tile + g * packed;
                    if (!nibbles) continue;
                    uint8_t* room = bytes + ((keep ? g * kChunkTiles : 0) + t + i) * group_bytes;
                    if (row == 0) unpack_group(b[i], room);
                    b[i] = room;
                }
                if (count == kBlockTiles)
                    add_group_rows<kBlockTiles>(b, ws, nibbles, mine, g, 0, n, block, t * kTileRows);
                else
                    add_group_rows<1>(b, ws, nibbles, mine, g, 0, n, block, t * kTileRows);
            }
        for (int64_t r = 0; r < n; ++r)
            for (int64_t t = 0; t < tiles; ++t)
                write_columns(out + (row + r) * ld + t * kTileRows, load(block.acc + r * block.ld + t * kTileRows),
                              n1 - n0 - t * kTileRows);
    }
}

// Rows of bf16 or float32: 16 partial sums per output, added at the end in a fixed order.
template <class T, int kOut, int kRows>
inline void dot_rows(const typename T::weight* w, int64_t columns, const typename T::input* x, float* out, int64_t ld) {
    F acc[kOut][kRows];
    for (auto& o : acc)
        for (auto& a : o) a = zero();
    int64_t k = 0;
    for (; k + T::kWidth <= columns; k += T::kWidth) {
        typename T::vector xv[kRows];
        for (int r = 0; r < kRows; ++r) xv[r] = T::load_input(x + r * columns + k);
        for (int o = 0; o < kOut; ++o) {
            const typename T::vector wv = T::load_weight(w + o * columns + k);
            for (int r = 0; r < kRows; ++r) acc[o][r] = T::add(acc[o][r], wv, xv[r]);
        }
    }
    if (k < columns)
        for (int r = 0; r < kRows; ++r) {
            const typename T::vector xv = T::load_input_n(x + r * columns + k, columns - k);
            for (int o = 0; o < kOut; ++o)
                acc[o][r] = T::add(acc[o][r], T::load_weight_n(w + o * columns + k, columns - k), xv);
        }
    for (int o = 0; o < kOut; ++o)
        for (int r = 0; r < kRows; ++r) out[r * ld + o] = hsum(acc[o][r]);
}

struct Float32Dot {
    using weight = float;
    using input = float;
    using vector = F;
    static constexpr int64_t kWidth = 16;
    static F load_weight(const float* p) { return load(p); }
    static F load_weight_n(const float* p, int64_t n) { return load_n(p, n); }
    static F load_input(const float* p) { return load(p); }
    static F load_input_n(const float* p, int64_t n) { return load_n(p, n); }
    static F add(F acc, F w, F x) { return fma(w, x, acc); }
};

#if defined(__AVX512BF16__)
struct BFloat16Dot {
    using weight = uint16_t;
    using input = uint16_t;
    using vector = __m512i;
    static constexpr int64_t kWidth = 32;
    static __mmask32 mask(int64_t n) { return static_cast<__mmask32>((uint64_t(1) << n) - 1); }
    static __m512i load_weight(const uint16_t* p) { return _mm512_loadu_si512(p); }
    static __m512i load_weight_n(const uint16_t* p, int64_t n) { return _mm512_maskz_loadu_epi16(mask(n), p); }
    static __m512i load_input(const uint16_t* p) { return load_weight(p); }
    static __m512i load_input_n(const uint16_t* p, int64_t n) { return load_weight_n(p, n); }
    static F add(F acc, __m512i w, __m512i x) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)w, (__m512bh)x)}; }
};
#else
struct BFloat16Dot {
    using weight = uint16_t;
    using input = uint16_t;
    using vector = F;
    static constexpr int64_t kWidth = 16;
    static F load_weight(const uint16_t* p) { return load_bf16(p); }
    static F load_weight_n(const uint16_t* p, int64_t n) { return load_bf16_n(p, n); }
    static F load_input(const uint16_t* p) { return load_bf16(p); }
    static F load_input_n(const uint16_t* p, int64_t n) { return load_bf16_n(p, n); }
    static F add(F acc, F w, F x) { return fma(w, x, acc); }
};
#endif

template <class T, int kOut>
inline void dot_all_rows(const typename T::weight* w, int64_t columns, const typename T::input* x, int64_t rows,
                         float* out, int64_t ld) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) dot_rows<T, kOut, 4>(w, columns, x + r * columns, out + r * ld, ld);
    for (; r < rows; ++r) dot_rows<T, kOut, 1>(w, columns, x + r * columns, out + r * ld, ld);
}

template <class T>
inline void dot_product(const Matrix& w, const typename T::input* x, int64_t rows, int64_t n0, int64_t n1, float* out,
                        int64_t ld) {
    const typename T::weight* weights = reinterpret_cast<const typename T::weight*>(w.data);
    int64_t n = n0;
    for (; n + 4 <= n1; n += 4) dot_all_rows<T, 4>(weights + n * w.columns, w.columns, x, rows, out + n - n0, ld);
    for (; n < n1; ++n) dot_all_rows<T, 1>(weights + n * w.columns, w.columns, x, rows, out + n - n0, ld);
}

// The first `rows` rows of x times rows [n0, n1) of w; n0 a multiple of 16 where w is tiled, and for more than a few
// rows at most kChunkTiles tiles at a time.
inline void product(Context c, int thread, const Matrix& w, const Rows& x, int64_t rows, int64_t n0, int64_t n1,
                    float* out, int64_t ld) {
    if (w.layout == Layout::bf16_rows && kAmx) {
        uint8_t* edge = static_cast<uint8_t*>(c.pool->scratch(thread, block_scratch(w, rows)));
        return amx_bf16_product(w, x, rows, n0, n1, out, ld, edge);
    }
    if (w.layout == Layout::bf16_rows) return dot_product<BFloat16Dot>(w, x.half, rows, n0, n1, out, ld);
    if (w.layout == Layout::f32_rows) return dot_product<Float32Dot>(w, x.wide, rows, n0, n1, out, ld);
    if (rows == 1) return stream_tiles<1>(w, x, n0, n1, out, ld);
    if (rows == 2) return stream_tiles<2>(w, x, n0, n1, out, ld);
    if (rows == 3) return stream_tiles<3>(w, x, n0, n1, out, ld);
    if (rows == 4) return stream_tiles<4>(w, x, n0, n1, out, ld);
    if (kAmx) return amx_tiles(w, x, rows, n0, n1, out, ld);
    for (int64_t n = n0; n < n1; n += kChunkTiles * kTileRows) {
        const int64_t end = n + kChunkTiles * kTileRows < n1 ? n + kChunkTiles * kTileRows : n1;
        block_tiles(c, thread, w, x, rows, n, end, out + n - n0, ld);
    }
}

// How many rows of the matrix make a chunk of work: enough bytes to be worth claiming, few enough to share out evenly.
inline int64_t chunk_rows(const Matrix& w, int64_t rows) {
    if (!w.tiled()) {
        const int64_t n = 65536 / (w.row_bytes() + 1) / 16 * 16;
        return n < 16 ? 16 : n > 512 ? 512 : n;
    }
    if (rows > kStreamRows) return kChunkTiles * kTileRows;
    const int64_t tiles = 49152 / w.tile_bytes();
    return (tiles < 1 ? 1 : tiles > kChunkTiles ? kChunkTiles : tiles) * kTileRows;
}
