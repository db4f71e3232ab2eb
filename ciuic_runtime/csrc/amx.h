// Path 2 by AMX tiles (16 x 16 int32 sums of 64-byte rows). Unpacked weights lie as its right operand wants them:
// 16 quads of 16 rows are one operand, two of them a group.

constexpr bool kAmx = true;

struct alignas(64) AmxConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

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

// One group of 16 rows of a block's sums: acc = fma(sum - zero, weight scale x activation scale, acc).
inline void amx_scale(const int32_t* sums, F ws, int32_t zero_of, const Rows& x, int64_t g, int64_t row, int64_t rows,
                      float* acc, int64_t ld) {
    for (int64_t r = 0; r < rows; ++r, acc += ld) {
        const int64_t at = g * x.stride + row + r;
        const I sum = load_i(sums + r * 16) - iset1(zero_of * x.sums[at]);
        store(acc, fma(to_float(sum), ws * set1(x.scales[at]), load(acc)));
    }
}

inline void amx_add_group(const uint8_t* const* bytes, int tiles, const F* ws, int32_t zero_of, const Rows& x, int64_t g,
                          int64_t row, int64_t rows, Block block, int64_t column) {
    alignas(64) int32_t sums[4][256];
    _tile_loadd(4, bytes[0], 64);
    _tile_loadd(5, bytes[0] + 1024, 64);
    if (tiles > 1) {
        _tile_loadd(6, bytes[1], 64);
        _tile_loadd(7, bytes[1] + 1024, 64);
    }
    for (; rows > 0; rows -= 16, row += 16) {
        const int8_t* q = x.group(g, row);
        const int64_t n = rows < 16 ? rows : 16;
        _tile_loadd(2, q, kGroup);
        _tile_loadd(3, q + 64, kGroup);
        _tile_zero(0);
        _tile_dpbsud(0, 2, 4);
        _tile_dpbsud(0, 3, 5);
        _tile_stored(0, sums[0], 64);
        if (tiles > 1) {
            _tile_zero(1);
            _tile_dpbsud(1, 2, 6);
            _tile_dpbsud(1, 3, 7);
            _tile_stored(1, sums[1], 64);
        }
        float* acc = block.acc + row * block.ld + column;
        amx_scale(sums[0], ws[0], zero_of, x, g, row, n, acc, block.ld);
        if (tiles > 1) amx_scale(sums[1], ws[1], zero_of, x, g, row, n, acc + kTileRows, block.ld);
    }
}
