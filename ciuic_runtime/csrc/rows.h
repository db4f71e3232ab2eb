// Activations made ready for products with a matrix of some layout: int8 with a scale per row and group where weights
// are tiles, bf16 or float32 otherwise.

// bf16 values are rows, or, for AMX, blocks of 16 rows as its right operand wants them: [columns / 32][16][rows][2], that
// is 16 pairs of columns of every row of the block, then the next 16 pairs; columns padded with zeros.
#if defined(__AMX_BF16__)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif
constexpr int64_t kPairRows = 16, kPairColumns = 32;

// int8 values lie group by group, [groups][stride][128], so that a block of rows is contiguous within a group and an
// expert's rows can be gathered by whole groups. `sums8` and `sums128` are the integer sums of a row's group, times the
// zero of 4- and 8-bit weights.
struct Rows {
    Layout layout;
    int64_t columns, stride;  // stride: rows that there is room for
    int8_t* q;
    float* scales;         // [groups][stride]
    int32_t *sums8, *sums128;  // [groups][stride]
    uint16_t* half;  // bf16, see above
    float* wide;     // float32 [stride][columns]

    int64_t groups() const { return (columns + kGroup - 1) / kGroup; }
    int8_t* group(int64_t g, int64_t row) const { return q + (g * stride + row) * kGroup; }
};

// Blocks of 16 rows are read whole by some kernels, so there is room for as many more.
constexpr int64_t kRowSlack = 16;

inline int64_t half_columns(int64_t columns) { return kPairs ? round_up(columns, kPairColumns) : columns; }

inline Rows take_rows(Arena& arena, const Matrix& w, int64_t rows) {
    Rows r{};
    r.layout = w.layout, r.columns = w.columns, r.stride = rows;
    if (w.tiled()) {
        r.layout = Layout::w8g128_t16;
        r.q = arena.take<int8_t>((r.groups() * rows + kRowSlack) * kGroup);
        r.scales = arena.take<float>(r.groups() * rows + kRowSlack);
        r.sums8 = arena.take<int32_t>(r.groups() * rows + kRowSlack);
        r.sums128 = arena.take<int32_t>(r.groups() * rows + kRowSlack);
    } else if (w.layout == Layout::bf16_rows) {
        r.half = arena.take<uint16_t>(rows * half_columns(w.columns));
    } else {
        r.wide = arena.take<float>(rows * w.columns);
    }
    return r;
}

// `count` values (at most 128) of one row and group: q = round(x * (127 / largest)), ties to even, and scale = largest
// magnitude / 127, every step rounded to float32: near a tie, x / scale may fall to its other side. Whatever is not
// finite makes the scale not a number, so that every product with it shows.
inline void quantise_group(const float* x, int64_t count, int8_t* q, float* scale, int32_t* sum) {
    I most = izero();
    const I magnitude = iset1(0x7fffffff);
    F v[8];
    for (int i = 0; i < 8; ++i) {
        const int64_t left = count - 16 * i;
        v[i] = left >= 16 ? load(x + 16 * i) : left > 0 ? load_n(x + 16 * i, left) : zero();
        most = umax(most, bits(v[i]) & magnitude);
    }
    const uint32_t top = hmax_bits(most);
    float largest;
    std::memcpy(&largest, &top, 4);
    if (top >= 0x7f800000u || largest < 1e-30f) {
        *scale = top >= 0x7f800000u ? __builtin_nanf("") : 0.0f;
        *sum = 0;
        std::memset(q, 0, kGroup);
        return;
    }
    const F inverse = set1(127.0f / largest);
    I total = izero();
    for (int i = 0; i < 8; ++i) {
        const I n = to_int(v[i] * inverse);
        total = total + n;
        store_i8(q + 16 * i, n);
    }
    int32_t lanes[16];
    store_i(lanes, total);
    int32_t s = 0;
    for (int32_t lane : lanes) s += lane;
    *scale = largest / 127.0f;
    *sum = s;
}

inline void fill_bf16(uint16_t* out, const float* x, int64_t n) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store_bf16(out + i, load(x + i));
    if (i < n) store_bf16_n(out + i, load_n(x + i, n - i), n - i);
}

// The pairs of a row of a block: pair p is at [p x rows of the block].
inline uint32_t* pairs_of(const Rows& r, int64_t row, int64_t* step) {
    const int64_t first = row / kPairRows * kPairRows, left = r.stride - first;
    *step = left < kPairRows ? left : kPairRows;
    return reinterpret_cast<uint32_t*>(r.half + first * half_columns(r.columns)) + (row - first);
}

inline void fill_pairs(const Rows& r, int64_t row, int64_t begin, int64_t count, const float* x) {
    int64_t step;
    uint32_t* to = pairs_of(r, row, &step) + begin / 2 * step;
    const bool last = begin + count == r.columns;
    const int64_t end = last ? half_columns(r.columns) - begin : count;
    for (int64_t at = 0; at < end; at += kPairColumns) {
        alignas(64) uint16_t two[kPairColumns] = {};
        fill_bf16(two, x + at, count - at < kPairColumns ? (count > at ? count - at : 0) : kPairColumns);
        uint32_t pair[kPairColumns / 2];
        std::memcpy(pair, two, sizeof two);
        for (int i = 0; i < kPairColumns / 2; ++i) to[(at / 2 + i) * step] = pair[i];
    }
}

// Columns [begin, begin + count) of a row; `begin` is a multiple of 128.
inline void fill_row(const Rows& r, int64_t row, int64_t begin, int64_t count, const float* x) {
    if (r.half && kPairs) return fill_pairs(r, row, begin, count, x);
    if (r.half) return fill_bf16(r.half + row * r.columns + begin, x, count);
    if (r.wide) {
        std::memcpy(r.wide + row * r.columns + begin, x, count * sizeof(float));
        return;
    }
    for (int64_t at = 0; at < count; at += kGroup) {
        const int64_t g = (begin + at) / kGroup, left = count - at < kGroup ? count - at : kGroup;
        int32_t sum;
        quantise_group(x + at, left, r.group(g, row), r.scales + g * r.stride + row, &sum);
        r.sums8[g * r.stride + row] = 8 * sum;
        r.sums128[g * r.stride + row] = 128 * sum;
    }
}

// All rows of x [rows, columns] (with `ld` floats from row to row).
inline void fill_rows(Context c, const Rows& r, const float* x, int64_t rows, int64_t ld) {
    if (rows == 0) return;
    const int64_t per = rows * r.columns < 16384 ? rows : (16384 + r.columns - 1) / r.columns;
    parallel(c, (rows + per - 1) / per, [&](int64_t chunk, int) {
        for (int64_t i = chunk * per; i < rows && i < (chunk + 1) * per; ++i)
            fill_row(r, i, 0, r.columns, x + i * ld);
    });
}

// Row `from` of one set as row `to` of another of the same kind.
inline void copy_row(const Rows& dst, int64_t to, const Rows& src, int64_t from) {
    if (src.half && kPairs) {
        int64_t step_to, step_from;
        uint32_t* a = pairs_of(dst, to, &step_to);
        const uint32_t* b = pairs_of(src, from, &step_from);
        for (int64_t p = 0; p < half_columns(src.columns) / 2; ++p) a[p * step_to] = b[p * step_from];
    } else if (src.half)
        std::memcpy(dst.half + to * src.columns, src.half + from * src.columns, src.columns * sizeof(uint16_t));
    else if (src.wide)
        std::memcpy(dst.wide + to * src.columns, src.wide + from * src.columns, src.columns * sizeof(float));
    else
        for (int64_t g = 0; g < src.groups(); ++g) {
            std::memcpy(dst.group(g, to), src.group(g, from), kGroup);
            dst.scales[g * dst.stride + to] = src.scales[g * src.stride + from];
            dst.sums8[g * dst.stride + to] = src.sums8[g * src.stride + from];
            dst.sums128[g * dst.stride + to] = src.sums128[g * src.stride + from];
        }
}

// Rows from `row` on (a multiple of 16) as rows of their own.
inline Rows block_of(const Rows& r, int64_t row) {
    Rows b = r;
    if (r.half) b.half += row * half_columns(r.columns), b.stride = kPairs ? r.stride - row : r.stride;
    if (r.wide) b.wide += row * r.columns;
    if (r.q) b.q += row * kGroup, b.scales += row, b.sums8 += row, b.sums128 += row;
    return b;
}
