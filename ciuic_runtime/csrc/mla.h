// Multi-head latent attention with residual (DeepSeek-V2, section 2.1). Prompt tokens are computed in the expanded form:
// keys and values of a block are made from its latents, head by head, and never kept. Generated tokens are computed in
// the absorbed form: the expansion moves to the query and behind the attention, and all heads share the latent row.

// Step 1: queries, and the latent and rotated key of every token to the cache.
inline void mla_project(Context c, const MlaWeights& w, const Rope& rope, const Batch& batch, const float* x,
                        uint16_t* cache, float* q) {
    const int64_t n = batch.rows, qk = w.nope + w.rope, width = w.kv_rank + w.rope;
    const Matrix& first = w.q_a.data ? w.q_a : w.q;
    const Rows ready = take_rows(*c.arena, first, n);
    fill_rows(c, ready, x, n, first.columns);
    float* kv = c.arena->take<float>(n * width);
    linear_from(c, w.kv_a, w.kv_a_bias, ready, n, nullptr, kv);
    if (w.q_a.data) {
        float* latent = c.arena->take<float>(n * w.q_a.rows);
        linear_from(c, w.q_a, w.q_a_bias, ready, n, nullptr, latent);
        for_rows(c, n, w.q_a.rows, [&](int64_t r) {
            norm_row(latent + r * w.q_a.rows, w.q_a_norm, w.q_a.rows, w.norm_eps, latent + r * w.q_a.rows);
        });
        const Rows inner = take_rows(*c.arena, w.q_b, n);
        fill_rows(c, inner, latent, n, w.q_a.rows);
        linear_from(c, w.q_b, nullptr, inner, n, nullptr, q);
    } else {
        linear_from(c, w.q, nullptr, ready, n, nullptr, q);
    }
    for_rows(c, n, w.heads * w.rope * 4 + width, [&](int64_t r) {
        float* mine = kv + r * width;
        norm_row(mine, w.kv_a_norm, w.kv_rank, w.norm_eps, mine);
        rotate(rope, batch.positions[r], mine + w.kv_rank);
        fill_bf16(cache + batch.slots[r] * width, mine, width);
        for (int64_t h = 0; h < w.heads; ++h) rotate(rope, batch.positions[r], q + (r * w.heads + h) * qk + w.nope);
    });
}

#if !defined(__AMX_INT8__)  // else in mla_amx.h
// A head's rows of a prompt meet their context, of which `latents` are made ready; `mixed` [rows, heads, value].
inline void expanded_unit(Context c, int thread, const MlaWeights& w, const Sequence& s, const Rows& latents, const Unit& u,
                          const uint16_t* cache, const float* q, float* mixed) {
    const int64_t qk = w.nope + w.rope, width = w.kv_rank + w.rope, value_ld = round_up(w.value, 16);
    const int64_t nope_ld = round_up(w.nope, 16), rows = u.rows;
    const int64_t chunk = block_scratch(w.k_b, kBlock);  // product() uses the start of the thread's scratch
    const int64_t floats = rows * (value_ld + 2) + kBlock * (qk + 2 * value_ld + nope_ld + w.rope);
    char* memory = static_cast<char*>(c.pool->scratch(thread, chunk + floats * sizeof(float) + 64));
    float* result = reinterpret_cast<float*>(memory + chunk);
    KeyValues kv{result + rows * value_ld, nullptr, qk, value_ld, value_ld};
    kv.values = kv.keys + qk * kBlock;
    float *nope = kv.values + kBlock * value_ld, *roped = nope + kBlock * nope_ld;
    Running* state = reinterpret_cast<Running*>(roped + kBlock * w.rope);
    std::memset(kv.values, 0, kBlock * value_ld * sizeof(float));
    const Matrix k_b = w.k_b.at(u.head), v_b = w.v_b.at(u.head);
    const float* mine = q + ((s.start + u.row) * w.heads + u.head) * qk;
    attend(mine, w.heads * qk, rows, kv, w.scale, 0, kAllBlocks, [&](int64_t r) { return s.position + u.row + r; },
           [&](int64_t block, int64_t positions) {
               const Rows latent = block_of(latents, block * kBlock);
               product(c, thread, k_b, latent, positions, 0, w.nope, nope, nope_ld);
               product(c, thread, v_b, latent, positions, 0, w.value, kv.values, value_ld);
               latents_of(cache, width, s, block, positions, w.rope, w.kv_rank, roped, w.rope);
               turn_keys(nope, nope_ld, positions, w.nope, kv.keys);
               turn_keys(roped, w.rope, positions, w.rope, kv.keys + w.nope * kBlock);
           },
           state, result);
    for (int64_t r = 0; r < rows; ++r) {
        divide_by_sum(state[r], result + r * value_ld, value_ld);
        std::memcpy(mixed + ((s.start + u.row + r) * w.heads + u.head) * w.value, result + r * value_ld,
                    w.value * sizeof(float));
    }
}

// Queries [heads][kv_rank + rope] of a token with `context` positions meet the blocks [first, last) of its latents.
inline void absorbed_span(Context c, int thread, const MlaWeights& w, const uint16_t* cache, const Sequence& s,
                          const float* q, int64_t heads, int64_t first, int64_t last, int64_t context, Running* state,
                          float* out) {
    const int64_t width = w.kv_rank + w.rope, wide_ld = round_up(width, 16);
    // Values are the first columns of the widened entries.
    KeyValues kv{static_cast<float*>(c.pool->scratch(thread, kBlock * (width + wide_ld) * sizeof(float))), nullptr, width,
                 round_up(w.kv_rank, 16), wide_ld};
    kv.values = kv.keys + kBlock * width;
    attend(q, width, heads, kv, w.scale, first, last, [&](int64_t) { return context - 1; },
           [&](int64_t block, int64_t positions) {
               latents_of(cache, width, s, block, positions, width, 0, kv.values, wide_ld);
               std::memset(kv.values + positions * wide_ld, 0, (kBlock - positions) * wide_ld * sizeof(float));
               turn_keys(kv.values, wide_ld, positions, width, kv.keys);
           },
           state, out);
}
#endif

// Prompt tokens of the sequences: a head's keys and values are expanded block by block, for all rows of a unit at once.
inline void mla_expanded(Context c, const MlaWeights& w, const Batch& batch, const uint16_t* cache, const float* q,
                         float* mixed) {
    const int64_t width = w.kv_rank + w.rope;
    const Units units = share_out(c, batch, w.heads, true);
    // Latents made ready once per sequence, for every head: [context] rows each.
    Rows* latents = c.arena->take<Rows>(batch.num_sequences);
    for (int64_t i = 0; i < batch.num_sequences; ++i) {
        const Sequence& s = batch.sequences[i];
        if (!s.prompt) continue;
        const int64_t context = s.position + s.length;
        latents[i] = take_rows(*c.arena, w.k_b, context);
        parallel(c, (context + kBlock - 1) / kBlock, [&](int64_t block, int thread) {
            const int64_t positions = context - block * kBlock < kBlock ? context - block * kBlock : kBlock;
            float* wide = static_cast<float*>(c.pool->scratch(thread, kBlock * w.kv_rank * sizeof(float)));
            latents_of(cache, width, s, block, positions, w.kv_rank, 0, wide, w.kv_rank);
            for (int64_t p = 0; p < positions; ++p)
                fill_row(latents[i], block * kBlock + p, 0, w.kv_rank, wide + p * w.kv_rank);
        });
    }
    parallel(c, units.count, [&](int64_t i, int thread) {
        const Unit& u = units.unit[i];
        expanded_unit(c, thread, w, batch.sequences[u.sequence], latents[u.sequence], u, cache, q, mixed);
    });
}

// Generated tokens of the sequences.
inline void mla_absorbed(Context c, const MlaWeights& w, const Batch& batch, const uint16_t* cache, const float* q,
                         float* mixed) {
    const int64_t qk = w.nope + w.rope, width = w.kv_rank + w.rope, rank_ld = round_up(w.kv_rank, 16);
    int64_t* row_of = c.arena->take<int64_t>(batch.rows);
    int64_t count = 0;
    for (int64_t i = 0; i < batch.num_sequences; ++i)
        for (int64_t r = 0; !batch.sequences[i].prompt && r < batch.sequences[i].length; ++r)
            row_of[count++] = batch.sequences[i].start + r;
    // Step 2: the query in latent space, head by head: [rows, heads, kv_rank + rope].
    float* absorbed = c.arena->take<float>(batch.rows * w.heads * width);
    Rows* inputs = c.arena->take<Rows>(w.heads);
    Rows* outputs = c.arena->take<Rows>(w.heads);
    for (int64_t h = 0; h < w.heads; ++h) {
        inputs[h] = take_rows(*c.arena, w.k_b_absorbed, count);
        outputs[h] = take_rows(*c.arena, w.v_b, count);
    }
    parallel(c, w.heads, [&](int64_t h, int thread) {
        for (int64_t i = 0; i < count; ++i) fill_row(inputs[h], i, 0, w.nope, q + (row_of[i] * w.heads + h) * qk);
        float part[kPartFloats];
        const int64_t step = kPartFloats / w.kv_rank / 16 * 16;
        for (int64_t i = 0; i < count; i += step) {
            const int64_t n = count - i < step ? count - i : step;
            product(c, thread, w.k_b_absorbed.at(h), block_of(inputs[h], i), n, 0, w.kv_rank, part, w.kv_rank);
            for (int64_t r = 0; r < n; ++r) {
                float* to = absorbed + (row_of[i + r] * w.heads + h) * width;
                std::memcpy(to, part + r * w.kv_rank, w.kv_rank * sizeof(float));
                std::memcpy(to + w.kv_rank, q + (row_of[i + r] * w.heads + h) * qk + w.nope, w.rope * sizeof(float));
            }
        }
    });
    // Step 3: attention of some heads of a token over spans of its latents, each span for itself; then spans are merged in
    // order.
    int64_t spans = 0;  // of whichever token has most
    int64_t* position_of = c.arena->take<int64_t>(count);
    const Sequence** sequence_of = c.arena->take<const Sequence*>(count);
    for (int64_t i = 0, at = 0; i < batch.num_sequences; ++i) {
        const Sequence& s = batch.sequences[i];
        for (int64_t t = 0; !s.prompt && t < s.length; ++t, ++at) {
            position_of[at] = s.position + t, sequence_of[at] = &s;
            spans = spans_of(position_of[at] + 1) > spans ? spans_of(position_of[at] + 1) : spans;
        }
    }
    // All heads read a block that was turned round once; fewer heads at a time only where threads would go idle.
    int64_t group = w.heads < 16 ? w.heads : 16;
    while (!kAmx && group > 4 && count * spans * ((w.heads + group - 1) / group) < c.pool->threads()) group = (group + 1) / 2;
    const int64_t groups = (w.heads + group - 1) / group;
    float* latent = c.arena->take<float>(count * spans * w.heads * rank_ld);
    Running* states = c.arena->take<Running>(count * spans * w.heads);
    parallel(c, count * spans * groups, [&](int64_t unit, int thread) {
        const int64_t i = unit / (spans * groups), span = unit / groups % spans, head = unit % groups * group;
        const int64_t heads = w.heads - head < group ? w.heads - head : group, context = position_of[i] + 1;
        if (span >= spans_of(context)) return;
        const int64_t first = span * span_blocks(context), last = first + span_blocks(context);
        const int64_t at = (i * spans + span) * w.heads + head;
        absorbed_span(c, thread, w, cache, *sequence_of[i], absorbed + (row_of[i] * w.heads + head) * width, heads, first,
                      last, context, states + at, latent + at * rank_ld);
    });
    const auto latent_of = [&](int64_t i, int64_t h) {
        const int64_t first = i * spans * w.heads + h;
        float* whole = latent + first * rank_ld;
        for (int64_t span = 1; span < spans_of(position_of[i] + 1); ++span) {
            const int64_t at = first + span * w.heads;
            merge(states + first, whole, states[at], latent + at * rank_ld, rank_ld);
        }
        divide_by_sum(states[first], whole, rank_ld);
        return whole;
    };
    // Step 4: each head's values from its latent.
    parallel(c, w.heads, [&](int64_t h, int thread) {
        for (int64_t i = 0; i < count; ++i) fill_row(outputs[h], i, 0, w.kv_rank, latent_of(i, h));
        float part[kPartFloats];
        const int64_t step = kPartFloats / w.value / 16 * 16;
        for (int64_t i = 0; i < count; i += step) {
            const int64_t n = count - i < step ? count - i : step;
            product(c, thread, w.v_b.at(h), block_of(outputs[h], i), n, 0, w.value, part, w.value);
            for (int64_t r = 0; r < n; ++r)
                std::memcpy(mixed + (row_of[i + r] * w.heads + h) * w.value, part + r * w.value, w.value * sizeof(float));
        }
    });
}

inline void mla(Context c, const MlaWeights& w, const Rope& rope, const Batch& batch, const float* x,
                const float* residual, uint16_t* cache, float* out) {
    c.arena->reset();
    const int64_t n = batch.rows;
    float* q = c.arena->take<float>(n * w.heads * (w.nope + w.rope));
    float* mixed = c.arena->take<float>(n * w.heads * w.value);
    mla_project(c, w, rope, batch, x, cache, q);
    bool prompts = false, generated = false;
    for (int64_t i = 0; i < batch.num_sequences; ++i) (batch.sequences[i].prompt ? prompts : generated) = true;
    if (prompts) mla_expanded(c, w, batch, cache, q, mixed);
    if (generated) mla_absorbed(c, w, batch, cache, q, mixed);
    const Rows joined = take_rows(*c.arena, w.o, n);
    fill_rows(c, joined, mixed, n, w.heads * w.value);
    linear_from(c, w.o, w.o_bias, joined, n, residual, out);
}
