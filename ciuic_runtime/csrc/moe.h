// Mixture of experts: `route`, `experts`, `combine`.

inline float sigmoid_of(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// The largest of `n` scores, the first of equals, not taken yet; -1 where all are taken or not eligible.
inline int64_t best_of(const float* score, const uint8_t* taken, int64_t n) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i)
        if (!taken[i] && (best < 0 || score[i] > score[best])) best = i;
    return best;
}

// One row: scores [experts] are logits on entry; `wanted` and `taken` [experts] are scratch.
inline void route_row(const RouteParams& p, const float* bias, float* scores, float* wanted, uint8_t* taken,
                      int64_t* ids, float* weights) {
    const int64_t n = p.experts;
    // What is not finite is not outvoted: it makes all of the row's weights so. Ids stay expert numbers all the same.
    bool bad = false;
    for (int64_t e = 0; e < n; ++e) bad |= scores[e] - scores[e] != 0.0f;
    if (p.sigmoid) {
        for (int64_t e = 0; e < n; ++e) scores[e] = sigmoid_of(scores[e]);
    } else {
        float most = scores[0], sum = 0;
        for (int64_t e = 1; e < n; ++e) most = scores[e] > most ? scores[e] : most;
        for (int64_t e = 0; e < n; ++e) sum += scores[e] = std::exp(scores[e] - most);
        for (int64_t e = 0; e < n; ++e) scores[e] /= sum;
    }
    for (int64_t e = 0; e < n; ++e) wanted[e] = bias ? scores[e] + bias[e] : scores[e];
    for (int64_t e = 0; e < n; ++e) bad |= wanted[e] != wanted[e];
    std::memset(taken, 0, n);
    if (p.limited) {
        // Step 1: the best groups; everybody else is out.
        const int64_t size = n / p.groups;
        std::memset(taken, 1, n);
        float value[1024];
        uint8_t chosen[1024] = {};
        for (int64_t g = 0; g < p.groups; ++g) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t e = g * size; e < (g + 1) * size; ++e) {
                if (wanted[e] > first) second = first, first = wanted[e];
                else if (wanted[e] > second) second = wanted[e];
            }
            value[g] = p.group_top2 && size > 1 ? first + second : first;
        }
        for (int64_t i = 0; i < p.groups_per_token; ++i) {
            const int64_t g = best_of(value, chosen, p.groups);
            chosen[g] = 1;
            std::memset(taken + g * size, 0, size);
        }
    }
    // Step 2: the best experts, and their weights from the scores without the bias.
    float sum = bad ? __builtin_nanf("") : 0.0f;
    for (int64_t k = 0; k < p.per_token; ++k) {
        const int64_t e = best_of(wanted, taken, n);
        taken[e] = 1;
        ids[k] = e;
        weights[k] = bad ? sum : scores[e];
        sum += scores[e];
    }
    for (int64_t k = 0; k < p.per_token; ++k) weights[k] = (p.normalise ? weights[k] / (sum + 1e-20f) : weights[k]) * p.scaling;
}

inline void route(Context c, const RouteParams& p, const Matrix& weight, const float* bias, const float* x,
                  int64_t rows, int64_t* ids, float* weights) {
    c.arena->reset();
    const Rows ready = take_rows(*c.arena, weight, rows);
    float* scores = c.arena->take<float>(rows * p.experts);
    float* wanted = c.arena->take<float>(rows * p.experts);
    uint8_t* taken = c.arena->take<uint8_t>(rows * p.experts);
    fill_rows(c, ready, x, rows, weight.columns);
    linear_from(c, weight, nullptr, ready, rows, nullptr, scores);
    for_rows(c, rows, p.experts * 16, [&](int64_t r) {
        route_row(p, bias, scores + r * p.experts, wanted + r * p.experts, taken + r * p.experts, ids + r * p.per_token,
                  weights + r * p.per_token);
    });
}

// The (token, k) rows of one expert: entries [begin, begin + rows) of the sorted order.
struct ExpertRows {
    int64_t expert, begin, rows;
};

inline MlpWeights at_addresses(const MlpWeights& shape, const int64_t* address) {
    MlpWeights w = shape;
    w.gate.data = reinterpret_cast<const uint8_t*>(address[0]);
    w.up.data = reinterpret_cast<const uint8_t*>(address[1]);
    w.down.data = reinterpret_cast<const uint8_t*>(address[2]);
    return w;
}

inline void experts(Context c, const MlpWeights& shape, const int64_t* addresses, int64_t num_experts, const float* x,
                    const int64_t* ids, int64_t rows, int64_t per_token, float* out) {
    c.arena->reset();
    const int64_t all = rows * per_token, hidden = shape.down.rows, width = shape.gate.rows;
    // Step 1: the rows of every expert that is here, expert by expert.
    int64_t* first = c.arena->take<int64_t>(num_experts + 1);
    int64_t* order = c.arena->take<int64_t>(all);
    ExpertRows* present = c.arena->take<ExpertRows>(num_experts);
    std::memset(first, 0, (num_experts + 1) * sizeof(int64_t));
    for (int64_t i = 0; i < all; ++i) ++first[ids[i] + 1];
    for (int64_t e = 0; e < num_experts; ++e) first[e + 1] += first[e];
    int64_t count = 0, most = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
        const int64_t n = first[e + 1] - first[e];
        if (n && addresses[3 * e]) present[count++] = {e, first[e], n};
        if (n > most) most = n;
    }
    for (int64_t i = 0; i < all; ++i) order[first[ids[i]]++] = i;
    if (!count) return;
    // Step 2: inputs, made ready once per token and gathered by expert.
    const Rows ready = take_rows(*c.arena, shape.gate, rows);
    fill_rows(c, ready, x, rows, shape.gate.columns);
    Rows* gathered = c.arena->take<Rows>(count);
    Rows* inner = c.arena->take<Rows>(count);
    for (int64_t i = 0; i < count; ++i) {
        gathered[i] = take_rows(*c.arena, shape.gate, present[i].rows);
        inner[i] = take_rows(*c.arena, shape.down, present[i].rows);
    }
    const auto gather = [&](int64_t i, int) {
        for (int64_t r = 0; r < present[i].rows; ++r)
            copy_row(gathered[i], r, ready, order[present[i].begin + r] / per_token);
    };
    if (all * shape.gate.columns < 32768) for (int64_t i = 0; i < count; ++i) gather(i, 0);
    else parallel(c, count, gather);
    // Step 3: silu(gate) x up, 128 columns of an expert at a time.
    const int64_t parts = (width + kGroup - 1) / kGroup;
    parallel(c, count * parts, [&](int64_t chunk, int thread) {
        const int64_t i = chunk / parts, n0 = chunk % parts * kGroup, n1 = n0 + kGroup < width ? n0 + kGroup : width;
        const MlpWeights w = at_addresses(shape, addresses + 3 * present[i].expert);
        gated_columns(c, thread, w, gathered[i], present[i].rows, n0, n1, inner[i]);
    });
    // Step 4: down, each row to its own place.
    const int64_t per = chunk_rows(shape.down, most), chunks = (hidden + per - 1) / per;
    parallel(c, count * chunks, [&](int64_t chunk, int thread) {
        const int64_t i = chunk / chunks, n0 = chunk % chunks * per, n1 = n0 + per < hidden ? n0 + per : hidden;
        const MlpWeights w = at_addresses(shape, addresses + 3 * present[i].expert);
        float part[kPartFloats];
        const int64_t step = kPartFloats / (n1 - n0) / 16 * 16;
        for (int64_t r = 0; r < present[i].rows; r += step) {
            const int64_t n = present[i].rows - r < step ? present[i].rows - r : step;
            product(c, thread, w.down, block_of(inner[i], r), n, n0, n1, part, n1 - n0);
            for (int64_t k = 0; k < n; ++k)
                std::memcpy(out + order[present[i].begin + r + k] * hidden + n0, part + k * (n1 - n0),
                            (n1 - n0) * sizeof(float));
        }
    });
}

inline void combine(Context c, const float* expert_rows, const float* weights, int64_t rows, int64_t per_token,
                    int64_t hidden, const float* added0, const float* added1, float* out) {
    for_rows(c, rows, hidden * per_token, [&](int64_t r) {
        const float *from = expert_rows + r * per_token * hidden, *w = weights + r * per_token;
        for (int64_t i = 0; i < hidden; i += 16) {
            const int64_t n = hidden - i < 16 ? hidden - i : 16;
            F sum = load_n(from + i, n) * set1(w[0]);
            for (int64_t k = 1; k < per_token; ++k) sum = fma(load_n(from + k * hidden + i, n), set1(w[k]), sum);
            if (added0) sum = sum + load_n(added0 + r * hidden + i, n);
            if (added1) sum = sum + load_n(added1 + r * hidden + i, n);
            store_n(out + r * hidden + i, sum, n);
        }
    });
}
