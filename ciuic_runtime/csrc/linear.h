// Products, MLPs and norms over all threads.

constexpr int64_t kPartFloats = kRowBlock * kGroup;  // of a chunk's results before they go where they belong

inline void linear_from(Context c, const Matrix& w, const float* bias, const Rows& x, int64_t rows,
                        const float* residual, float* out) {
    const int64_t per = chunk_rows(w, rows), n_all = w.rows;
    parallel(c, (n_all + per - 1) / per, [&](int64_t chunk, int thread) {
        const int64_t n0 = chunk * per, n1 = n0 + per < n_all ? n0 + per : n_all;
        const bool direct = !bias && !residual;
        if (direct) return product(c, thread, w, x, rows, n0, n1, out + n0, n_all);
        // The output may be the residual itself, so the product goes elsewhere first, some rows at a time.
        float part[kPartFloats];
        const int64_t width = n1 - n0, most = kPartFloats / width / 16 * 16;
        for (int64_t r = 0; r < rows; r += most) {
            const int64_t n = rows - r < most ? rows - r : most;
            product(c, thread, w, block_of(x, r), n, n0, n1, part, width);
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < width; ++j) {
                    const int64_t at = (r + i) * n_all + n0 + j;
                    float v = part[i * width + j];
                    if (bias) v += bias[n0 + j];
                    out[at] = residual ? residual[at] + v : v;
                }
        }
    });
}

inline void linear(Context c, const Matrix& w, const float* bias, const float* x, int64_t rows, const float* residual,
                   float* out) {
    if (rows == 0) return;  // a prompt's chunk that is not its last wants no logits
    c.arena->reset();
    const Rows ready = take_rows(*c.arena, w, rows);
    fill_rows(c, ready, x, rows, w.columns);
    linear_from(c, w, bias, ready, rows, residual, out);
}

inline void add_bias(float* x, const float* bias, int64_t rows, int64_t width) {
    if (!bias) return;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; ++i) x[r * width + i] += bias[i];
}

// Columns [n0, n1) of silu(gate) x up, at most 128 of them and n0 a multiple of 128, written where the down projection
// reads its input.
inline void gated_columns(Context c, int thread, const MlpWeights& w, const Rows& x, int64_t rows, int64_t n0,
                          int64_t n1, const Rows& h) {
    float gate[kPartFloats], up[kPartFloats];
    const int64_t width = n1 - n0, most = kRowBlock;
    for (int64_t r = 0; r < rows; r += most) {
        const int64_t n = rows - r < most ? rows - r : most;
        const Rows mine = block_of(x, r);
        product(c, thread, w.gate, mine, n, n0, n1, gate, width);
        product(c, thread, w.up, mine, n, n0, n1, up, width);
        add_bias(gate, w.gate_bias ? w.gate_bias + n0 : nullptr, n, width);
        add_bias(up, w.up_bias ? w.up_bias + n0 : nullptr, n, width);
        for (int64_t i = 0; i < n; ++i) {
            float* g = gate + i * width;
            const float* u = up + i * width;
            int64_t j = 0;
            for (; j + 16 <= width; j += 16) store(g + j, silu(load(g + j)) * load(u + j));
            if (j < width) store_n(g + j, silu(load_n(g + j, width - j)) * load_n(u + j, width - j), width - j);
            fill_row(h, r + i, n0, width, g);
        }
    }
}

inline void mlp(Context c, const MlpWeights& w, const float* x, int64_t rows, const float* residual, float* out) {
    c.arena->reset();
    const Rows ready = take_rows(*c.arena, w.gate, rows), h = take_rows(*c.arena, w.down, rows);
    fill_rows(c, ready, x, rows, w.gate.columns);
    const int64_t width = w.gate.rows;
    parallel(c, (width + kGroup - 1) / kGroup, [&](int64_t chunk, int thread) {
        const int64_t n0 = chunk * kGroup, n1 = n0 + kGroup < width ? n0 + kGroup : width;
        gated_columns(c, thread, w, ready, rows, n0, n1, h);
    });
    linear_from(c, w.down, w.down_bias, h, rows, residual, out);
}

// Summed in 16 partial sums added in a fixed order.
inline void norm_row(const float* x, const float* weight, int64_t n, float eps, float* out) {
    F sum = zero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) sum = fma(load(x + i), load(x + i), sum);
    if (i < n) {
        const F rest = load_n(x + i, n - i);
        sum = fma(rest, rest, sum);
    }
    const F scale = set1(1.0f / std::sqrt(hsum(sum) / static_cast<float>(n) + eps));
    for (i = 0; i + 16 <= n; i += 16) store(out + i, load(weight + i) * (load(x + i) * scale));
    if (i < n) store_n(out + i, load_n(weight + i, n - i) * (load_n(x + i, n - i) * scale), n - i);
}

inline void rms_norm(Context c, const float* x, const float* weight, int64_t rows, int64_t width, float eps, float* out) {
    for_rows(c, rows, width, [&](int64_t r) { norm_row(x + r * width, weight, width, eps, out + r * width); });
}

inline void embed(Context c, const uint16_t* table, const int64_t* ids, int64_t rows, int64_t width, float* out) {
    for_rows(c, rows, width, [&](int64_t r) {
        const uint16_t* from = table + ids[r] * width;
        float* to = out + r * width;
        int64_t i = 0;
        for (; i + 16 <= width; i += 16) store(to + i, load_bf16(from + i));
        if (i < width) store_n(to + i, load_bf16_n(from + i, width - i), width - i);
    });
}
