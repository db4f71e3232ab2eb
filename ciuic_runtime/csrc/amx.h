// Products by AMX tiles: 16 x 16 sums of rows of 64 bytes.

constexpr bool kAmx = true;

struct alignas(64) AmxConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// 4 and 8 bits. A tile is unpacked to signed bytes, which then lie as the right operand wants them: 16 quads of 16 rows
// are one operand, two of them a group. 16 activation rows are the left operand.

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

inline void amx_unpack(const Matrix& w, const uint8_t* tile, uint8_t* bytes) {
    const bool nibbles = w.layout == Layout::w4g128_t16;
    const __m512i eight = _mm512_set1_epi8(8), top = _mm512_set1_epi8(-128);
    for (int64_t i = 0, end = w.groups() * kGroup * kTileRows; i < end; i += nibbles ? 128 : 64, tile += 64) {
        const Bytes b = load_bytes(tile);
        if (nibbles) {
            store_bytes(bytes + i, _mm512_sub_epi8(low_nibbles(b), eight));
            store_bytes(bytes + i + 64, _mm512_sub_epi8(high_nibbles(b), eight));
        } else {
            store_bytes(bytes + i, _mm512_xor_si512(b, top));
        }
    }
}

// 16 rows times one tile, of which the first kRows are wanted. Sums are scaled one group late: by then they have reached
// the cache.
template <int kRows>
inline void amx_rows(const uint8_t* bytes, const uint16_t* weight_scales, const Rows& x, int64_t row, F* acc) {
    alignas(64) int32_t sums[2][256];
    const int64_t groups = x.groups();
    const auto multiply = [&](int64_t g) {
        const int8_t* q = x.group(g, row);
        const uint8_t* w = bytes + g * kGroup * kTileRows;
        _tile_loadd(2, q, kGroup);
        _tile_loadd(4, w, 64);
        _tile_zero(0);
        _tile_dpbssd(0, 2, 4);
        _tile_loadd(3, q + 64, kGroup);
        _tile_loadd(5, w + 1024, 64);
        _tile_dpbssd(0, 3, 5);
        _tile_stored(0, sums[g & 1], 64);
    };
    const auto add = [&](int64_t g) {
        const F ws = load_f16(weight_scales + g * kTileRows);
        const float* xs = x.scales + g * x.stride + row;
        for (int r = 0; r < kRows; ++r) acc[r] = fma(to_float(load_i(sums[g & 1] + 16 * r)), ws * set1(xs[r]), acc[r]);
    };
    for (int r = 0; r < kRows; ++r) acc[r] = zero();
    multiply(0);
    for (int64_t g = 1; g < groups; ++g) {
        multiply(g);
        add(g - 1);
    }
    add(groups - 1);
}

// Rows [n0, n1) of the matrix, any number of activation rows; `bytes` has room for an unpacked tile.
inline void amx_tiles(const Matrix& w, const Rows& x, int64_t rows, int64_t n0, int64_t n1, float* out, int64_t ld,
                      uint8_t* bytes) {
    amx_begin();
    for (int64_t n = n0; n < n1; n += kTileRows) {
        const uint8_t* tile = w.data + n / kTileRows * w.tile_bytes();
        const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile + w.weight_bytes());
        amx_unpack(w, tile, bytes);
        for (int64_t row = 0; row < rows; row += 16) {
            F acc[16];
            const int64_t left = rows - row;
            if (left > 8) amx_rows<16>(bytes, scales, x, row, acc);
            else if (left > 4) amx_rows<8>(bytes, scales, x, row, acc);
            else amx_rows<4>(bytes, scales, x, row, acc);
            for (int64_t r = 0; r < 16 && row + r < rows; ++r) write_columns(out + (row + r) * ld + n - n0, acc[r], n1 - n);
        }
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
    const int64_t stride = w.columns * 2, whole = w.columns / kPairColumns * kPairColumns;
    for (int64_t n = n0; n < n1; n += kMost * 16) {
        const uint8_t* from[kMost];
        int blocks = 0;
        for (; blocks < kMost && n + blocks * 16 < n1; ++blocks) {
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
