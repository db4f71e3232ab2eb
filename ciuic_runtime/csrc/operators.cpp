// Binds the kernels to Python. Tensors come as addresses (torch's data_ptr()) of contiguous memory whose shapes the
// caller has checked; weights are described once as `Matrix` and bundles of them, and kept alive by the caller.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
using namespace ciuic;

namespace {

using Address = uintptr_t;

template <class T>
T* at(Address a) { return reinterpret_cast<T*>(a); }

struct Candidate {
    const char* name;
    const Kernels* (*find)();
};

// Best first.
const std::vector<Candidate>& candidates() {
    static const std::vector<Candidate> all = {
#if defined(CIUIC_X86_64)
        {"amx", amx_kernels}, {"avx512", avx512_kernels}, {"avx512vnni", avx512vnni_kernels}, {"avx2", avx2_kernels},
#endif
        {"portable", portable_kernels},
    };
    return all;
}

std::vector<std::string> instruction_sets(bool usable) {
    std::vector<std::string> names;
    for (const auto& c : candidates())
        if (!usable || c.find()) names.push_back(c.name);
    return names;
}

const Kernels* kernels_named(const std::string& name) {
    for (const auto& c : candidates())
        if (name == c.name) {
            if (const Kernels* found = c.find()) return found;
            throw std::invalid_argument("this processor cannot run the " + name + " kernels");
        }
    throw std::invalid_argument("no kernels are called " + name);
}

Layout layout_named(const std::string& name) {
    if (name == "w4g128-t16") return Layout::w4g128_t16;
    if (name == "w8g128-t16") return Layout::w8g128_t16;
    if (name == "bf16-rows") return Layout::bf16_rows;
    if (name == "f32-rows") return Layout::f32_rows;
    throw std::invalid_argument("no kernel reads the layout " + name);
}

void check(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
}

// Matrices that read the same activations need them in the same form.
bool same_input(const Matrix& a, const Matrix& b) {
    return a.columns == b.columns && (a.tiled() ? b.tiled() : a.layout == b.layout);
}

Matrix make_matrix(const std::string& layout, int64_t count, int64_t rows, int64_t columns, Address data) {
    check(count > 0 && rows > 0 && columns > 0, "a matrix has at least one row and column");
    Matrix m;
    m.layout = layout_named(layout), m.count = count, m.rows = rows, m.columns = columns, m.data = at<const uint8_t>(data);
    return m;
}

MlpWeights make_mlp(Matrix gate, Matrix up, Matrix down, Address gate_bias, Address up_bias, Address down_bias) {
    check(same_input(gate, up) && gate.rows == up.rows && down.columns == gate.rows, "gate, up and down do not fit");
    return {gate, up, down, at<float>(gate_bias), at<float>(up_bias), at<float>(down_bias)};
}

MlaWeights make_mla(std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> sizes, std::vector<Matrix> m,
                    std::vector<Address> vectors, float norm_eps, float scale) {
    MlaWeights w{};
    std::tie(w.heads, w.nope, w.rope, w.value, w.kv_rank) = sizes;
    check(m.size() == 8 && vectors.size() == 5, "MLA takes q, q_a, q_b, kv_a, k_b, k_b_absorbed, v_b, o and 5 vectors");
    w.q = m[0], w.q_a = m[1], w.q_b = m[2], w.kv_a = m[3], w.k_b = m[4], w.k_b_absorbed = m[5], w.v_b = m[6], w.o = m[7];
    w.q_a_norm = at<float>(vectors[0]), w.kv_a_norm = at<float>(vectors[1]), w.q_a_bias = at<float>(vectors[2]);
    w.kv_a_bias = at<float>(vectors[3]), w.o_bias = at<float>(vectors[4]);
    w.norm_eps = norm_eps, w.scale = scale;
    const Matrix &first = w.q_a.data ? w.q_a : w.q, &last = w.q_a.data ? w.q_b : w.q;
    check(same_input(first, w.kv_a), "the query and latent projections read different inputs");
    check(last.rows == w.heads * (w.nope + w.rope) && w.kv_a.rows == w.kv_rank + w.rope, "MLA's projections do not fit");
    check(same_input(w.k_b, w.v_b) && w.k_b.columns == w.kv_rank && w.k_b.rows == w.nope && w.v_b.rows == w.value &&
              w.k_b_absorbed.rows == w.kv_rank && w.k_b_absorbed.columns == w.nope && w.k_b.count == w.heads &&
              w.k_b_absorbed.count == w.heads && w.v_b.count == w.heads, "MLA's expansions do not fit");
    check(w.o.columns == w.heads * w.value, "MLA's output projection does not fit");
    check(w.kv_rank <= 1024 && w.value <= 1024, "MLA's heads are larger than these kernels take");
    return w;
}

GqaWeights make_gqa(std::tuple<int64_t, int64_t, int64_t> sizes, std::vector<Matrix> m, std::vector<Address> biases,
                    float scale) {
    GqaWeights w{};
    std::tie(w.heads, w.kv_heads, w.dim) = sizes;
    check(m.size() == 4 && biases.size() == 4, "grouped-query attention takes q, k, v, o and their biases");
    w.q = m[0], w.k = m[1], w.v = m[2], w.o = m[3];
    w.q_bias = at<float>(biases[0]), w.k_bias = at<float>(biases[1]), w.v_bias = at<float>(biases[2]);
    w.o_bias = at<float>(biases[3]), w.scale = scale;
    check(same_input(w.q, w.k) && same_input(w.q, w.v), "queries, keys and values read different inputs");
    check(w.q.rows == w.heads * w.dim && w.k.rows == w.kv_heads * w.dim && w.v.rows == w.k.rows &&
              w.o.columns == w.q.rows && w.heads % w.kv_heads == 0, "the attention's projections do not fit");
    return w;
}

// A batch with its sequences' block tables.
struct BatchData {
    Batch batch;
    std::vector<Sequence> sequences;
    std::vector<std::vector<int32_t>> blocks;

    using Given = std::tuple<int64_t, int64_t, int64_t, std::vector<int32_t>, bool>;  // start, length, position, ...
    BatchData(int64_t rows, Address positions, Address slots, std::vector<Given> given) {
        for (auto& [start, length, position, table, prompt] : given) {
            check(start >= 0 && length > 0 && position >= 0 && start + length <= rows, "a sequence lies outside its batch");
            check(static_cast<int64_t>(table.size()) * kBlockTokens >= position + length, "a block table is too short");
            blocks.push_back(std::move(table));
            sequences.push_back({start, length, position, blocks.back().data(), prompt});
        }
        batch = {rows, static_cast<int64_t>(sequences.size()), at<int64_t>(positions), at<int64_t>(slots), sequences.data()};
    }
    BatchData(const BatchData&) = delete;
};

// Kernels of one instruction set on one pool, with the memory for their temporaries. One call at a time.
class Operators {
  public:
    Operators(const std::string& set, ThreadPool& pool) : k_(kernels_named(set)), context_{&pool, &arena_} {}

    const char* name() const { return k_->name; }
    size_t workspace_nbytes() const { return arena_.nbytes(); }

    void linear(const Matrix& w, Address bias, Address x, int64_t rows, Address residual, Address out) {
        nb::gil_scoped_release unlocked;
        k_->linear(context_, w, at<float>(bias), at<float>(x), rows, at<float>(residual), at<float>(out));
    }
    void mlp(const MlpWeights& w, Address x, int64_t rows, Address residual, Address out) {
        nb::gil_scoped_release unlocked;
        k_->mlp(context_, w, at<float>(x), rows, at<float>(residual), at<float>(out));
    }
    void route(const RouteParams& p, const Matrix& weight, Address bias, Address x, int64_t rows, Address ids, Address weights) {
        nb::gil_scoped_release unlocked;
        k_->route(context_, p, weight, at<float>(bias), at<float>(x), rows, at<int64_t>(ids), at<float>(weights));
    }
    void experts(const MlpWeights& shape, Address addresses, int64_t num_experts, Address x, Address ids, int64_t rows,
                 int64_t per_token, Address out) {
        nb::gil_scoped_release unlocked;
        k_->experts(context_, shape, at<int64_t>(addresses), num_experts, at<float>(x), at<int64_t>(ids), rows, per_token,
                    at<float>(out));
    }
    void combine(Address expert_rows, Address weights, int64_t rows, int64_t per_token, int64_t hidden, Address added0,
                 Address added1, Address out) {
        nb::gil_scoped_release unlocked;
        k_->combine(context_, at<float>(expert_rows), at<float>(weights), rows, per_token, hidden, at<float>(added0),
                    at<float>(added1), at<float>(out));
    }
    void mla(const MlaWeights& w, const Rope& rope, const BatchData& b, Address x, Address residual, Address cache, Address out) {
        nb::gil_scoped_release unlocked;
        k_->mla(context_, w, rope, b.batch, at<float>(x), at<float>(residual), at<uint16_t>(cache), at<float>(out));
    }
    void gqa(const GqaWeights& w, const Rope& rope, const BatchData& b, Address x, Address residual, Address cache, Address out) {
        nb::gil_scoped_release unlocked;
        k_->gqa(context_, w, rope, b.batch, at<float>(x), at<float>(residual), at<uint16_t>(cache), at<float>(out));
    }
    void rms_norm(Address x, Address weight, int64_t rows, int64_t width, float eps, Address out) {
        nb::gil_scoped_release unlocked;
        k_->rms_norm(context_, at<float>(x), at<float>(weight), rows, width, eps, at<float>(out));
    }
    void embed(Address table, Address ids, int64_t rows, int64_t width, Address out) {
        nb::gil_scoped_release unlocked;
        k_->embed(context_, at<uint16_t>(table), at<int64_t>(ids), rows, width, at<float>(out));
    }

  private:
    const Kernels* k_;
    Arena arena_;
    Context context_;
};

RouteParams make_route(int64_t experts, int64_t per_token, int64_t groups, int64_t groups_per_token, bool sigmoid,
                       bool group_top2, bool limited, bool normalise, float scaling) {
    check(experts > 0 && per_token > 0 && per_token <= experts, "a token takes at most as many experts as there are");
    check(!limited || (groups > 0 && groups <= 1024 && experts % groups == 0 && groups_per_token > 0 &&
                       groups_per_token <= groups && groups_per_token * (experts / groups) >= per_token),
          "the groups of experts do not fit");
    return {experts, per_token, groups, groups_per_token, sigmoid, group_top2, limited, normalise, scaling};
}

}  // namespace

void bind_operators(nb::module_& m) {
    m.def("instruction_sets", &instruction_sets, nb::arg("usable") = true, "Best first; those this processor can run.");
    nb::class_<ThreadPool>(m, "ThreadPool")
        .def(nb::init<int, const std::vector<int>&>(), nb::arg("threads"), nb::arg("cpus"))
        .def_prop_ro("threads", &ThreadPool::threads);
    nb::class_<Matrix>(m, "Matrix")
        .def(nb::new_(&make_matrix), nb::arg("layout"), nb::arg("count"), nb::arg("rows"), nb::arg("columns"), nb::arg("data"))
        .def_static("none", [] { return Matrix(); })
        .def_prop_ro("nbytes", [](const Matrix& w) { return w.count * w.nbytes(); });
    nb::class_<MlpWeights>(m, "MlpWeights")
        .def(nb::new_(&make_mlp), nb::arg("gate"), nb::arg("up"), nb::arg("down"), nb::arg("gate_bias") = 0,
             nb::arg("up_bias") = 0, nb::arg("down_bias") = 0);
    nb::class_<MlaWeights>(m, "MlaWeights")
        .def(nb::new_(&make_mla), nb::arg("sizes"), nb::arg("matrices"), nb::arg("vectors"), nb::arg("norm_eps"), nb::arg("scale"));
    nb::class_<GqaWeights>(m, "GqaWeights")
        .def(nb::new_(&make_gqa), nb::arg("sizes"), nb::arg("matrices"), nb::arg("biases"), nb::arg("scale"));
    nb::class_<RouteParams>(m, "RouteParams")
        .def(nb::new_(&make_route), nb::arg("experts"), nb::arg("per_token"), nb::arg("groups"), nb::arg("groups_per_token"),
             nb::arg("sigmoid"), nb::arg("group_top2"), nb::arg("limited"), nb::arg("normalise"), nb::arg("scaling"));
    nb::class_<Rope>(m, "Rope").def(
        nb::new_([](Address cos, Address sin, int64_t dim, bool interleaved) {
            return Rope{at<float>(cos), at<float>(sin), dim, interleaved};
        }),
        nb::arg("cos"), nb::arg("sin"), nb::arg("dim"), nb::arg("interleaved"));
    nb::class_<BatchData>(m, "Batch")
        .def(nb::init<int64_t, Address, Address, std::vector<BatchData::Given>>(), nb::arg("rows"), nb::arg("positions"),
             nb::arg("slots"), nb::arg("sequences"));
    nb::class_<Operators>(m, "Operators")
        .def(nb::init<const std::string&, ThreadPool&>(), nb::arg("instruction_set"), nb::arg("pool"), nb::keep_alive<1, 3>())
        .def_prop_ro("name", &Operators::name)
        .def_prop_ro("workspace_nbytes", &Operators::workspace_nbytes)
        .def("linear", &Operators::linear)
        .def("mlp", &Operators::mlp)
        .def("route", &Operators::route)
        .def("experts", &Operators::experts)
        .def("combine", &Operators::combine)
        .def("mla", &Operators::mla)
        .def("gqa", &Operators::gqa)
        .def("rms_norm", &Operators::rms_norm)
        .def("embed", &Operators::embed);
}
