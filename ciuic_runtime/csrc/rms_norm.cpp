// RMSNorm of rows, float32 and bfloat16: y = w * round(x / sqrt(mean(x^2) + eps)).
// A row is summed in 16 fixed partial sums added in a fixed order, so its bits depend on nothing but the row.
#include <nanobind/nanobind.h>

#include <cmath>
#include <cstdint>
#include "floats.h"

namespace nb = nanobind;

namespace {

constexpr int kLanes = 16;

struct Float32 {
    using type = float;
    static float load(float v) { return v; }
    static float round(float v) { return v; }
    static float store(float v) { return v; }
};

struct BFloat16 {
    using type = uint16_t;
    static float load(uint16_t v) { return ciuic::from_bfloat16(v); }
    static uint16_t store(float f) { return ciuic::to_bfloat16(f); }
    static float round(float f) { return load(store(f)); }
};

template <class T>
void row(const typename T::type* x, const typename T::type* w, typename T::type* y, int64_t n, float eps) {
    float part[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes)
        for (int j = 0; j < kLanes; ++j) {
            const float v = T::load(x[i + j]);
            part[j] += v * v;
        }
    for (int j = 0; i < n; ++i, ++j) {
        const float v = T::load(x[i]);
        part[j] += v * v;
    }
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int j = 0; j < half; ++j) part[j] += part[j + half];
    const float scale = 1.0f / std::sqrt(part[0] / static_cast<float>(n) + eps);
    for (i = 0; i < n; ++i) y[i] = T::store(T::load(w[i]) * T::round(T::load(x[i]) * scale));
}

// Addresses of contiguous rows [rows, n], as torch's data_ptr() gives them; the caller has checked types and shapes.
template <class T>
void rms_norm(uintptr_t x, uintptr_t w, uintptr_t y, int64_t rows, int64_t n, float eps) {
    using V = typename T::type;
    nb::gil_scoped_release unlocked;
    for (int64_t r = 0; r < rows; ++r)
        row<T>(reinterpret_cast<const V*>(x) + r * n, reinterpret_cast<const V*>(w), reinterpret_cast<V*>(y) + r * n, n,
               eps);
}

}  // namespace

void bind_rms_norm(nb::module_& m) {
    m.def("rms_norm_f32", &rms_norm<Float32>);
    m.def("rms_norm_bf16", &rms_norm<BFloat16>);
}
