// Products by AMX tiles: 16 x 16 sums of rows of 64 bytes.

constexpr bool kAmx = true;

struct alignas(64) AmxConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// 4 and 8 bits. Two tiles meet 32 activation rows at a time, in four registers of sums, so that every operand loaded is
// used twice. A group of weights is unpacked to signed bytes, which then lie as the right operand wants them (16 quads of
// 16 rows are one operand, two of them a group) and serve all rows; 16 activation rows are the left operand. What is at
// hand (weights, sums, outputs: 36 KB) is kept small enough for the nearest cache: with two groups at a time it is not,
// and everything takes half as long again.

constexpr int kAmxTiles = 2;
constexpr int64_t kAmxRows = 32;
constexpr int64_t kAmxAhead = 4;  // groups
constexpr int64_t kGroupBytes = kGroup * kTileRows;  // unpacked

inline void amx_begin() {
    static const AmxConfig config = [] {
        AmxConfig c{};
        c.palette = 1;
        for (int i = 0; i < 8; ++i) c.row_bytes[i] = 64, c.rows[i] = 16;
        return c;
    }();
    asm volatile("ldtilecfg %0" ::"m"(config));  // gcc 12's intrinsic reads 8 of the 64 bytes only
}
inline void amx_end() { _tile_release(); }
// gcc 12 does not know that a tile is loaded from memory: what was stored before this is there to be loaded after it.
inline void amx_stored() { asm volatile("" ::: "memory"); }

// One of kParts parts of a group of a tile, to signed bytes; what lies `ahead` bytes on is asked for from memory. For a
// nibble n, n - 8 has n's lower bits and the opposite of its bit 3 everywhere above: a linear map of bits, for which there
// is one instruction.
template <int kParts>
inline void amx_unpack(bool nibbles, const uint8_t* packed, int64_t ahead, uint8_t* bytes, int64_t part) {
    constexpr int64_t kSize = kGroupBytes / kParts;
    bytes += part * kSize;
    if (nibbles) {
        const __m512i low = _mm512_set1_epi64(0x0102040808080808), high = _mm512_set1_epi64(0x1020408080808080);
        packed += part * (kSize / 2);
        for (int64_t i = 0; i < kSize; i += 128) {
            __builtin_prefetch(packed + i / 2 + ahead, 0, 2);
            const Bytes b = load_bytes(packed + i / 2);
            store_bytes(bytes + i, _mm512_gf2p8affine_epi64_epi8(b, low, 0xf8));
            store_bytes(bytes + i + 64, _mm512_gf2p8affine_epi64_epi8(b, high, 0xf8));
        }
    } else {
        packed += part * kSize;
        for (int64_t i = 0; i < kSize; i += 64) {
            __builtin_prefetch(packed + i + ahead, 0, 2);
            store_bytes(bytes + i, _mm512_xor_si512(load_bytes(packed + i), _mm512_set1_epi8(-128)));
        }
    }
}

// A group of kTiles tiles: the packed bytes, and where they go, [kTiles][kGroupBytes].
template <int kTiles>
struct AmxWeights {
    const uint8_t* packed[kTiles];
    const uint16_t* scales[kTiles];
    int64_t ahead;  // where the same tiles' bytes are some groups later, or the next tiles'
    bool nibbles;
    uint8_t* bytes;
};

// Integer sums [kTiles][kAmxRows][16] of one group, to be scaled and added to acc [rows][16 kTiles].
template <int kTiles>
struct AmxSums {
    const int32_t* sums;
    const float* scales;  // of the activations' rows
    const uint16_t* weight_scales[kTiles];
    float* acc;
    int blocks;  // of 16 rows
    bool first;  // nothing is in acc yet
};

template <int kTiles>
struct AmxScaling {
    const int32_t* sums;
    const float* scales;
    float* acc;
    __mmask16 keep;
    F weight_scales[kTiles];

    explicit AmxScaling(const AmxSums<kTiles>& s)
        : sums(s.sums), scales(s.scales), acc(s.acc), keep(s.first ? 0 : 0xffff) {
        for (int t = 0; t < kTiles; ++t) weight_scales[t] = load_f16(s.weight_scales[t]);
    }
    CIUIC_INLINE void row(int64_t r) const {
        for (int t = 0; t < kTiles; ++t) {
            float* to = acc + (r * kTiles + t) * 16;
            const I sum = load_i(sums + (t * kAmxRows + r) * 16);
            store(to, fma(to_float(sum), weight_scales[t] * set1(scales[r]), F{_mm512_maskz_loadu_ps(keep, to)}));
        }
    }
};

// kBlocks x 16 rows times kTiles tiles over one group. Between the multiplications, for which they use other parts of the
// core, the sums of the step before (kBefore x 16 rows) are scaled and the weights of the group after are unpacked: what
// was stored a moment ago is slow to load as a tile, and the other way round.
template <int kBlocks, int kTiles, int kBefore>
inline void amx_step(const int8_t* q, const uint8_t* w, int32_t* sums, const AmxSums<kTiles>& before,
                     const AmxWeights<kTiles>* after) {
    constexpr int kMultiplications = 2 * kBlocks * kTiles, kRows = 16 * kBefore / kMultiplications;
    const AmxScaling<kTiles> scaling(before);
    const auto between = [&](int m) __attribute__((always_inline)) {
        for (int r = 0; r < kRows; ++r) scaling.row(m * kRows + r);
        const int tile = m / (2 * kBlocks);
        if (after)
            amx_unpack<2 * kBlocks>(after->nibbles, after->packed[tile], after->ahead, after->bytes + tile * kGroupBytes,
                                    m % (2 * kBlocks));
    };
    int m = 0;
    amx_stored();
    _tile_zero(0);
    if (kTiles > 1) _tile_zero(1);
    if (kBlocks > 1) _tile_zero(2);
    if (kBlocks > 1 && kTiles > 1) _tile_zero(3);
    for (int half = 0; half < 2; ++half) {
        _tile_loadd(6, w + 1024 * half, 64);
        _tile_loadd(4, q + 64 * half, kGroup);
        _tile_dpbssd(0, 4, 6);
        between(m++);
        if (kTiles > 1) {
            _tile_loadd(7, w + kGroupBytes + 1024 * half, 64);
            _tile_dpbssd(1, 4, 7);
            between(m++);
        }
        if (kBlocks > 1) {
            _tile_loadd(5, q + 16 * kGroup + 64 * half, kGroup);
            _tile_dpbssd(2, 5, 6);
            between(m++);
        }
        if (kBlocks > 1 && kTiles > 1) {
            _tile_dpbssd(3, 5, 7);
            between(m++);
        }
    }
    _tile_stored(0, sums, 64);
    if (kTiles > 1) _tile_stored(1, sums + kAmxRows * 16, 64);
    if (kBlocks > 1) _tile_stored(2, sums + 256, 64);
    if (kBlocks > 1 && kTiles > 1) _tile_stored(3, sums + kAmxRows * 16 + 256, 64);
}

// kTiles tiles from output n on, at most kRowBlock rows.
template <int kTiles>
inline void amx_some_tiles(const Matrix& w, const Rows& x, int64_t rows, int64_t n, int64_t n1, float* out, int64_t ld) {
    alignas(64) uint8_t bytes[2][kTiles * kGroupBytes];
    alignas(64) int32_t sums[2][kTiles * kAmxRows * 16];
    alignas(64) float acc[kRowBlock * kTiles * 16];
    const int64_t groups = w.groups();
    const auto weights_of = [&](int64_t g) {
        AmxWeights<kTiles> of;
        of.nibbles = w.layout == Layout::w4g128_t16, of.bytes = bytes[g & 1];
        const int64_t group_bytes = kGroupBytes / (of.nibbles ? 2 : 1);
        of.ahead = kAmxAhead * group_bytes + (g + kAmxAhead < groups ? 0 : kTiles * w.tile_bytes() - groups * group_bytes);
        for (int t = 0; t < kTiles; ++t) {
            const uint8_t* tile = w.data + (n / kTileRows + t) * w.tile_bytes();
            of.packed[t] = tile + g * group_bytes;
            of.scales[t] = reinterpret_cast<const uint16_t*>(tile + w.weight_bytes()) + g * kTileRows;
        }
        return of;
    };
    AmxWeights<kTiles> now = weights_of(0);
    for (int t = 0; t < kTiles; ++t) amx_unpack<1>(now.nibbles, now.packed[t], now.ahead, now.bytes + t * kGroupBytes, 0);
    AmxSums<kTiles> left[2];  // what the step before left; nothing at first, which the next step writes over
    left[1] = {sums[1], x.scales, {}, acc, 1, true};
    for (int t = 0; t < kTiles; ++t) left[1].weight_scales[t] = now.scales[t];
    int64_t step = 0;
    for (int64_t g = 0; g < groups; ++g) {
        const AmxWeights<kTiles> next = weights_of(g + 1 < groups ? g + 1 : g);
        for (int64_t row = 0; row < rows; row += kAmxRows, ++step) {
            const AmxSums<kTiles>& before = left[(step + 1) & 1];
            AmxSums<kTiles>& mine = left[step & 1];
            int32_t* to = sums[step & 1];
            mine.sums = to, mine.scales = x.scales + g * x.stride + row, mine.acc = acc + row * kTiles * 16;
            mine.blocks = rows - row > 16 ? 2 : 1, mine.first = g == 0;
            for (int t = 0; t < kTiles; ++t) mine.weight_scales[t] = now.scales[t];
            const AmxWeights<kTiles>* after = row == 0 && g + 1 < groups ? &next : nullptr;
            const int8_t* q = x.group(g, row);
            if (mine.blocks == 2 && before.blocks == 2) amx_step<2, kTiles, 2>(q, now.bytes, to, before, after);
            else if (mine.blocks == 2) amx_step<2, kTiles, 1>(q, now.bytes, to, before, after);
            else if (before.blocks == 2) amx_step<1, kTiles, 2>(q, now.bytes, to, before, after);
            else amx_step<1, kTiles, 1>(q, now.bytes, to, before, after);
        }
        now = next;
    }
    const AmxSums<kTiles>& last = left[(step + 1) & 1];
    const AmxScaling<kTiles> scaling(last);
    for (int64_t r = 0; r < 16 * last.blocks; ++r) scaling.row(r);
    for (int64_t r = 0; r < rows; ++r)
        for (int t = 0; t < kTiles; ++t)
            write_columns(out + r * ld + 16 * t, load(acc + (r * kTiles + t) * 16), n1 - n - 16 * t);
}

// Rows [n0, n1) of the matrix, any number of activation rows.
inline void amx_tiles(const Matrix& w, const Rows& x, int64_t rows, int64_t n0, int64_t n1, float* out, int64_t ld) {
    amx_begin();
    for (int64_t row = 0; row < rows; row += kRowBlock) {
        const int64_t count = rows - row < kRowBlock ? rows - row : kRowBlock;
        const Rows mine = block_of(x, row);
        float* to = out + row * ld - n0;
        int64_t n = n0;
        for (; n + kTileRows < n1; n += kAmxTiles * kTileRows) amx_some_tiles<2>(w, mine, count, n, n1, to + n, ld);
        if (n < n1) amx_some_tiles<1>(w, mine, count, n, n1, to + n, ld);
    }
    amx_end();
}

// bf16, any number of rows: 16 weight rows of 32 columns are the left operand, straight from the matrix; activations are
// the right one. An output's sum runs over its columns in steps of 32, whatever else is computed beside it.

inline void amx_begin_bf16(int64_t rows) {
    alignas(64) AmxConfig c{};
    c.palette = 1;
    for (int i = 0; i < 8; ++i) c.row_bytes[i] = 64, c.rows[i] = 16;
    for (int i : {0, 1, 2, 7}) c.row_bytes[i] = static_cast<uint16_t>(4 * rows);  // sums, and the right operand
    asm volatile("ldtilecfg %0" ::"m"(c));
}

// Up to three blocks of 16 weight rows meet up to 16 activation rows. `w` [blocks][16 rows] with `stride` bytes from row
// to row; `tails` has their last columns, padded with zeros, where columns are no multiple of 32.
template <int kBlocks>
inline void amx_bf16_blocks(const uint8_t* const* w, int64_t stride, const uint8_t (*tails)[1024], int64_t columns,
                            const uint16_t* x, int64_t rows, float (*sums)[256]) {
    _tile_zero(0);
    if (kBlocks > 1) _tile_zero(1);
    if (kBlocks > 2) _tile_zero(2);
    const int64_t step = kPairRows * rows * 2;  // values of 32 columns of the rows
    const auto add = [&](const uint8_t* a, const uint8_t* b, const uint8_t* c, int64_t ld) {
        _tile_loadd(7, x, rows * 4);
        _tile_loadd(3, a, ld);
        _tile_dpbf16ps(0, 3, 7);
        if (kBlocks > 1) {
            _tile_loadd(4, b, ld);
            _tile_dpbf16ps(1, 4, 7);
        }
        if (kBlocks > 2) {
            _tile_loadd(5, c, ld);
            _tile_dpbf16ps(2, 5, 7);
        }
        x += step;
    };
    int64_t k = 0;
    for (; k + kPairColumns <= columns; k += kPairColumns)
        add(w[0] + 2 * k, kBlocks > 1 ? w[1] + 2 * k : nullptr, kBlocks > 2 ? w[2] + 2 * k : nullptr, stride);
    if (k < columns) add(tails[0], tails[1], tails[2], 64);
    _tile_stored(0, sums[0], rows * 4);
    if (kBlocks > 1) _tile_stored(1, sums[1], rows * 4);
    if (kBlocks > 2) _tile_stored(2, sums[2], rows * 4);
}

// `edge` has room for 16 weight rows: fewer than 16 at the matrix's end are read from a copy there.
inline void amx_bf16_product(const Matrix& w, const Rows& x, int64_t rows, int64_t n0, int64_t n1, float* out, int64_t ld,
                             uint8_t* edge) {
    constexpr int kMost = 3;
    alignas(64) uint8_t tails[kMost][1024] = {};  // columns beyond the last stay zero
    alignas(64) float sums[kMost][256];
    const int most = rows <= kPairRows ? 1 : kMost;  // read once from memory, in as few streams as can be
    const int64_t stride = w.columns * 2, whole = w.columns / kPairColumns * kPairColumns;
    for (int64_t n = n0; n < n1; n += most * 16) {
        const uint8_t* from[kMost];
        int blocks = 0;
        for (; blocks < most && n + blocks * 16 < n1; ++blocks) {
            const int64_t first = n + blocks * 16, here = n1 - first < 16 ? n1 - first : 16;
            from[blocks] = w.data + first * stride;
            if (w.rows - first < 16) {
                std::memcpy(edge, from[blocks], here * stride);
                std::memset(edge + here * stride, 0, (16 - here) * stride);
                from[blocks] = edge;
            }
            for (int64_t i = 0; whole < w.columns && i < here; ++i)
                std::memcpy(tails[blocks] + 64 * i, from[blocks] + i * stride + 2 * whole, 2 * (w.columns - whole));
        }
        amx_stored();
        for (int64_t row = 0; row < rows; row += kPairRows) {
            const int64_t room = x.stride - row < kPairRows ? x.stride - row : kPairRows;
            const int64_t mine = rows - row < room ? rows - row : room;
            const uint16_t* xs = x.half + row * half_columns(w.columns);
            amx_begin_bf16(room);
            if (blocks == 1) amx_bf16_blocks<1>(from, stride, tails, w.columns, xs, room, sums);
            if (blocks == 2) amx_bf16_blocks<2>(from, stride, tails, w.columns, xs, room, sums);
            if (blocks == 3) amx_bf16_blocks<3>(from, stride, tails, w.columns, xs, room, sums);
            for (int b = 0; b < blocks; ++b)
                for (int64_t i = 0; i < 16 && n + 16 * b + i < n1; ++i)
                    for (int64_t r = 0; r < mine; ++r) out[(row + r) * ld + n - n0 + 16 * b + i] = sums[b][i * room + r];
        }
    }
    amx_end();
}
