// Products by AMX tiles: 16 x 16 sums of rows of 64 bytes.

constexpr bool kAmx = true;

struct alignas(64) AmxConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

// Path 2 of 4 and 8 bits: unpacked weights lie as the right operand wants them, 16 quads of 16 rows are one operand, two
// of them a group.

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

// Up to 16 rows' sums of one group, of up to two tiles: acc = fma(sum - zero, weight scale x activation scale, acc).
struct AmxSums {
    alignas(64) int32_t of[2][256];
    int64_t row, rows;
};

inline void amx_scale(const AmxSums& s, int tiles, const F* ws, const int32_t* zeros, const float* scales, Block block,
                      int64_t column) {
    float* acc = block.acc + s.row * block.ld + column;
    for (int64_t r = 0; r < s.rows; ++r, acc += block.ld) {
        const I zero = iset1(zeros[s.row + r]);
        const F scale = set1(scales[s.row + r]);
        store(acc, fma(to_float(load_i(s.of[0] + 16 * r) - zero), ws[0] * scale, load(acc)));
        if (tiles > 1) {
            float* next = acc + kTileRows;
            store(next, fma(to_float(load_i(s.of[1] + 16 * r) - zero), ws[1] * scale, load(next)));
        }
    }
}

inline void amx_add_group(const uint8_t* const* bytes, int tiles, const F* ws, bool nibbles, const Rows& x, int64_t g,
                          int64_t rows, Block block, int64_t column) {
    // Sums are scaled one step late: by then they have reached the cache.
    AmxSums sums[2];
    const int32_t* zeros = zero_sums(nibbles, x) + g * x.stride;
    const float* scales = x.scales + g * x.stride;
    _tile_loadd(4, bytes[0], 64);
    _tile_loadd(5, bytes[0] + 1024, 64);
    if (tiles > 1) {
        _tile_loadd(6, bytes[1], 64);
        _tile_loadd(7, bytes[1] + 1024, 64);
    }
    int at = 0;
    for (int64_t row = 0; row < rows; row += 16, at ^= 1) {
        AmxSums& now = sums[at];
        const int8_t* q = x.group(g, row);
        now.row = row, now.rows = rows - row < 16 ? rows - row : 16;
        _tile_loadd(2, q, kGroup);
        _tile_loadd(3, q + 64, kGroup);
        _tile_zero(0);
        _tile_dpbsud(0, 2, 4);
        if (tiles > 1) {
            _tile_zero(1);
            _tile_dpbsud(1, 2, 6);
        }
        _tile_dpbsud(0, 3, 5);
        if (tiles > 1) _tile_dpbsud(1, 3, 7);
        _tile_stored(0, now.of[0], 64);
        if (tiles > 1) _tile_stored(1, now.of[1], 64);
        if (row > 0) amx_scale(sums[at ^ 1], tiles, ws, zeros, scales, block, column);
    }
    amx_scale(sums[at ^ 1], tiles, ws, zeros, scales, block, column);
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
