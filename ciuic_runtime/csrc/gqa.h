// Grouped-query attention with residual: queries of the heads that share a key head are computed together.

inline void gqa(Context c, const GqaWeights& w, const Rope& rope, const Batch& batch, const float* x,
                const float* residual, uint16_t* cache, float* out) {
    c.arena->reset();
    const int64_t n = batch.rows, dim = w.dim, heads = w.heads, kv_heads = w.kv_heads, share = heads / kv_heads;
    const int64_t entry = 2 * kv_heads * dim, value_ld = round_up(dim, 16);
    // Step 1: queries, keys and values; keys and values to the cache.
    const Rows ready = take_rows(*c.arena, w.q, n);
    fill_rows(c, ready, x, n, w.q.columns);
    float* q = c.arena->take<float>(n * heads * dim);
    float* k = c.arena->take<float>(n * kv_heads * dim);
    float* v = c.arena->take<float>(n * kv_heads * dim);
    linear_from(c, w.q, w.q_bias, ready, n, nullptr, q);
    linear_from(c, w.k, w.k_bias, ready, n, nullptr, k);
    linear_from(c, w.v, w.v_bias, ready, n, nullptr, v);
    for_rows(c, n, heads * dim * 4, [&](int64_t r) {
        for (int64_t h = 0; h < heads; ++h) rotate(rope, batch.positions[r], q + (r * heads + h) * dim);
        for (int64_t h = 0; h < kv_heads; ++h) rotate(rope, batch.positions[r], k + (r * kv_heads + h) * dim);
        uint16_t* to = cache + batch.slots[r] * entry;
        fill_bf16(to, k + r * kv_heads * dim, kv_heads * dim);
        fill_bf16(to + kv_heads * dim, v + r * kv_heads * dim, kv_heads * dim);
    });
    // Step 2: attention, some rows of a sequence and key head at a time.
    const Rows joined = take_rows(*c.arena, w.o, n);
    float* mixed = c.arena->take<float>(n * heads * dim);
    const Units units = share_out(c, batch, kv_heads, false);
    parallel(c, units.count, [&](int64_t i, int thread) {
        const Unit u = units.unit[i];
        const Sequence& s = batch.sequences[u.sequence];
        const int64_t rows = u.rows * share;
        float* memory = static_cast<float*>(
            c.pool->scratch(thread, (rows * (dim + value_ld + 2) + kBlock * (dim + 2 * value_ld)) * sizeof(float) + 64));
        float *queries = memory, *result = queries + rows * dim;
        KeyValues kv{result + rows * value_ld, nullptr, dim, value_ld, value_ld};
        kv.values = kv.keys + dim * kBlock;
        float* wide = kv.values + kBlock * value_ld;
        Running* state = reinterpret_cast<Running*>(wide + kBlock * value_ld);
        for (int64_t r = 0; r < u.rows; ++r)
            std::memcpy(queries + r * share * dim, q + ((s.start + u.row + r) * heads + u.head * share) * dim,
                        share * dim * sizeof(float));
        std::memset(kv.values, 0, kBlock * value_ld * sizeof(float));
        attend(queries, dim, rows, kv, w.scale, 0, kAllBlocks, [&](int64_t r) { return s.position + u.row + r / share; },
               [&](int64_t block, int64_t positions) {
                   const uint16_t* from = cache + s.blocks[block] * kBlock * entry + u.head * dim;
                   for (int64_t p = 0; p < positions; ++p) {
                       widen_row(from + p * entry, dim, wide + p * value_ld);
                       widen_row(from + p * entry + kv_heads * dim, dim, kv.values + p * value_ld);
                   }
                   turn_keys(wide, value_ld, positions, dim, kv.keys);
               },
               state, result);
        for (int64_t r = 0; r < rows; ++r) divide_by_sum(state[r], result + r * value_ld, value_ld);
        for (int64_t r = 0; r < u.rows; ++r)
            for (int64_t h = 0; h < share; ++h)
                std::memcpy(mixed + ((s.start + u.row + r) * heads + u.head * share + h) * dim,
                            result + (r * share + h) * value_ld, dim * sizeof(float));
    });
    // Step 3: out.
    fill_rows(c, joined, mixed, n, heads * dim);
    linear_from(c, w.o, w.o_bias, joined, n, residual, out);
}
