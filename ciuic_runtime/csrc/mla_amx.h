// The two forms of MLA on AMX tiles; mla.h has them for the other instruction sets, with the same signatures.

inline void expanded_unit(Context c, int thread, const MlaWeights& w, const Sequence& s, const Rows& latents, const Unit& u,
                          const uint16_t* cache, const float* q, float* mixed) {
    constexpr int64_t kMostGroups = kMostUnitRows / kAmxLanes;
    const int64_t qk = w.nope + w.rope, width = w.kv_rank + w.rope, rows = u.rows;
    const int64_t key_ld = round_up(qk, 32), value_ld = round_up(w.value, 32), groups = (rows + kAmxLanes - 1) / kAmxLanes;
    const int64_t chunk = round_up(block_scratch(w.k_b, kBlock), 64);  // product() uses the start of the thread's scratch
    const size_t one = AmxAttention::queries_nbytes(qk, w.value), tools = AmxAttention::nbytes(qk, w.value);
    const int64_t wide = kBlock * (key_ld + value_ld);  // values of a block's keys and values
    char* memory = static_cast<char*>(c.pool->scratch(thread, chunk + tools + (groups + 2) * one + wide * 8)) + chunk;
    AmxAttention m(memory, qk, w.value);
    memory += tools;
    AmxQueries queries[kMostGroups];
    for (int64_t g = 0; g < groups; ++g) queries[g] = m.take_queries(memory);
    AmxQueries alone = m.take_queries(memory), after = m.take_queries(memory);
    float *keys = reinterpret_cast<float*>(memory), *values = keys + kBlock * key_ld;
    uint16_t* parts = reinterpret_cast<uint16_t*>(values + kBlock * value_ld);
    uint16_t *key_parts[2] = {parts, parts + kBlock * key_ld};
    uint16_t *value_parts[2] = {parts + 2 * kBlock * key_ld, parts + 2 * kBlock * key_ld + kBlock * value_ld};
    const auto bytes = [](const uint16_t* p) { return reinterpret_cast<const uint8_t*>(p); };
    const AmxKeyValues kv{{bytes(key_parts[0]), bytes(key_parts[1])}, {bytes(value_parts[0]), bytes(value_parts[1])},
                          key_ld * 2, value_ld * 2};
    std::memset(keys, 0, wide * sizeof(float));  // columns beyond the last stay zero
    const int64_t start = s.position + u.row;    // position of the unit's first row
    const float* mine = q + ((s.start + u.row) * w.heads + u.head) * qk;
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t left = rows - g * kAmxLanes, ld = w.heads * qk;
        m.set_queries(mine + g * kAmxLanes * ld, ld, left < kAmxLanes ? left : kAmxLanes, queries[g]);
    }
    for (int64_t block = 0; block * kBlock < start + rows; ++block) {
        const int64_t left = start + rows - block * kBlock, positions = left < kBlock ? left : kBlock;
        const Rows latent = block_of(latents, block * kBlock);
        product(c, thread, w.k_b.at(u.head), latent, positions, 0, w.nope, keys, key_ld);
        product(c, thread, w.v_b.at(u.head), latent, positions, 0, w.value, values, value_ld);
        latents_of(cache, width, s, block, positions, w.rope, w.kv_rank, keys + w.nope, key_ld);
        std::memset(values + positions * value_ld, 0, (kBlock - positions) * value_ld * sizeof(float));
        split_bf16(keys, kBlock * key_ld, key_parts[0], key_parts[1]);
        split_bf16(values, kBlock * value_ld, value_parts[0], value_parts[1]);
        // Zero times a later token's value that is not finite would spread to earlier rows: then every row has the later
        // values set to zero, from the last row to the first.
        const bool apart = start + 1 < block * kBlock + positions && !all_finite(values, value_ld, positions, value_ld);
        amx_begin();
        if (!apart) m.set_values(kv, nullptr, 0);
        for (int64_t g = groups - 1; g >= 0; --g) {
            const int64_t row = g * kAmxLanes, count = rows - row < kAmxLanes ? rows - row : kAmxLanes;
            if (start + row + count - 1 < block * kBlock) break;  // this group and those before it have seen all they may
            float valid[kAmxLanes];
            int64_t seen = positions;
            for (int64_t i = 0; i < kAmxLanes; ++i) {
                const int64_t n = i < count ? start + row + i + 1 - block * kBlock : positions;
                valid[i] = static_cast<float>(n);
                seen = n < seen ? n : seen;
            }
            if (!apart) {
                m.attend(queries[g], kv, w.scale, block == 0, positions, seen, load(valid));
                continue;
            }
            after = queries[g].copied_to(after, m.tiles);
            for (int64_t i = count - 1; i >= 0 && valid[i] > 0; --i) {
                const int64_t n = valid[i] < positions ? static_cast<int64_t>(valid[i]) : positions;
                for (uint16_t* part : value_parts)
                    std::memset(part + n * value_ld, 0, (kBlock - n) * value_ld * sizeof(uint16_t));
                m.set_values(kv, nullptr, 0);
                alone = queries[g].copied_to(alone, m.tiles);
                m.attend(alone, kv, w.scale, block == 0, positions, seen, load(valid));
                m.copy_lane(after, alone, i);
            }
            queries[g] = after.copied_to(queries[g], m.tiles);
        }
        amx_end();
    }
    float result[kAmxLanes * 64];
    for (int64_t r = 0; r < rows; ++r) {
        float* to = mixed + ((s.start + u.row + r) * w.heads + u.head) * w.value;
        for (int64_t at = 0; at < w.value; at += kAmxLanes * 64) {
            const int64_t n = w.value - at < kAmxLanes * 64 ? w.value - at : kAmxLanes * 64;
            AmxAttention::result(queries[r / kAmxLanes], r % kAmxLanes, at, round_up(n, 16), true, result);
            std::memcpy(to + at, result, n * sizeof(float));
        }
    }
}

inline void absorbed_span(Context c, int thread, const MlaWeights& w, const uint16_t* cache, const Sequence& s,
                          const float* q, int64_t heads, int64_t first, int64_t last, int64_t context, Running* state,
                          float* out) {
    const int64_t width = w.kv_rank + w.rope, out_ld = round_up(w.kv_rank, 16);
    const size_t tools = AmxAttention::nbytes(width, w.kv_rank), one = AmxAttention::queries_nbytes(width, w.kv_rank);
    char* memory = static_cast<char*>(c.pool->scratch(thread, tools + one + kBlock * round_up(width, 32) * 2));
    AmxAttention m(memory, width, w.kv_rank);
    memory += tools;
    AmxQueries queries = m.take_queries(memory);
    uint16_t* copy = reinterpret_cast<uint16_t*>(memory);
    m.set_queries(q, width, heads, queries);
    amx_begin();
    const auto entries_of = [&](int64_t block) { return cache + s.blocks[block] * kBlock * width; };
    for (int64_t block = first; block < last && block * kBlock < context; ++block) {
        const int64_t left = context - block * kBlock, positions = left < kBlock ? left : kBlock;
        const uint16_t* entries = entries_of(block);
        if (positions < kBlock || width != m.padded) {
            std::memset(copy, 0, kBlock * m.padded * sizeof(uint16_t));
            for (int64_t p = 0; p < positions; ++p)
                std::memcpy(copy + p * m.padded, entries + p * width, width * sizeof(uint16_t));
            entries = copy;
        }
        const uint8_t* bytes = reinterpret_cast<const uint8_t*>(entries);
        const AmxKeyValues kv{{bytes, nullptr}, {bytes, nullptr}, m.padded * 2, m.padded * 2};
        const bool more = block + 1 < last && (block + 1) * kBlock < context;
        m.set_values(kv, reinterpret_cast<const uint8_t*>(more ? entries_of(block + 1) : entries), more ? kBlock * width * 2 : 0);
        m.attend(queries, kv, w.scale, block == first, positions, positions, zero());
    }
    amx_end();
    float most[kAmxLanes], total[kAmxLanes];
    store(most, queries.largest), store(total, queries.sum);
    for (int64_t h = 0; h < heads; ++h) {
        state[h] = {most[h], total[h]};
        AmxAttention::result(queries, h, 0, out_ld, false, out + h * out_ld);
    }
}
