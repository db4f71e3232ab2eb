// DeepSeek's FP8 weights into float32 or bfloat16: e4m3 values times the scale of their block, rounded once.
// models/fp8.py has the same in torch.
#include <nanobind/nanobind.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace nb = nanobind;

using ciuic::as_bits;
using ciuic::as_float;

namespace {

// Four bits of exponent (bias 7), three of mantissa, no infinities; all ones is NaN. Both readings are computed and one
// is masked out: a choice between them would keep compilers from vectorising, as the conversion might trap.
CIUIC_INLINE float from_e4m3(uint8_t v) {
    const uint32_t magnitude = v & 0x7fu, sign = (v & 0x80u) << 24;
    const uint32_t normal = (magnitude << 20) + (120u << 23);
    const uint32_t subnormal = as_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
    const uint32_t is_subnormal = 0u - (magnitude < 8), is_nan = 0u - (magnitude == 0x7fu);
    return as_float(sign | (subnormal & is_subnormal) | (normal & ~is_subnormal) | (0x7fc00000u & is_nan));
}

struct ToFloat32 {
    using type = float;
    static CIUIC_INLINE float store(float f) { return f; }
};

struct ToBFloat16 {
    using type = uint16_t;
    static CIUIC_INLINE uint16_t store(float f) { return ciuic::to_bfloat16(f); }
};

template <class To>
CIUIC_INLINE void dequantise(const uint8_t* src, int64_t rows, int64_t columns, const float* scales, int64_t block_rows,
                             int64_t block_columns, typename To::type* dst) {
    const int64_t blocks = (columns + block_columns - 1) / block_columns;
    for (int64_t r = 0; r < rows; ++r, src += columns, dst += columns)
        for (int64_t b = 0; b < blocks; ++b) {
            const float scale = scales[r / block_rows * blocks + b];
            const int64_t end = std::min(columns, (b + 1) * block_columns);
            for (int64_t c = b * block_columns; c < end; ++c) dst[c] = To::store(from_e4m3(src[c]) * scale);
        }
}

#define CIUIC_FUNCTIONS(NAME, ATTRIBUTE)                                                                              \
    ATTRIBUTE void f32_##NAME(const uint8_t* s, int64_t r, int64_t c, const float* w, int64_t br, int64_t bc, void* d) { \
        dequantise<ToFloat32>(s, r, c, w, br, bc, static_cast<float*>(d));                                            \
    }                                                                                                                 \
    ATTRIBUTE void bf16_##NAME(const uint8_t* s, int64_t r, int64_t c, const float* w, int64_t br, int64_t bc,        \
                               void* d) {                                                                             \
        dequantise<ToBFloat16>(s, r, c, w, br, bc, static_cast<uint16_t*>(d));                                        \
    }

CIUIC_FUNCTIONS(portable, )
#if defined(__x86_64__) && defined(__GNUC__)
CIUIC_FUNCTIONS(avx2, __attribute__((target("avx2"))))
CIUIC_FUNCTIONS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

using Function = void (*)(const uint8_t*, int64_t, int64_t, const float*, int64_t, int64_t, void*);

Function best(bool bf16) {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return bf16 ? bf16_avx512 : f32_avx512;
    if (__builtin_cpu_supports("avx2")) return bf16 ? bf16_avx2 : f32_avx2;
#endif
    return bf16 ? bf16_portable : f32_portable;
}

// Addresses of contiguous matrices: values [rows, columns], scales [row blocks, column blocks], the result.
void dequantise_fp8(uintptr_t src, int64_t rows, int64_t columns, uintptr_t scales, int64_t block_rows,
                    int64_t block_columns, uintptr_t dst, bool bf16) {
    const Function function = best(bf16);
    nb::gil_scoped_release unlocked;
    function(reinterpret_cast<const uint8_t*>(src), rows, columns, reinterpret_cast<const float*>(scales), block_rows,
             block_columns, reinterpret_cast<void*>(dst));
}

}  // namespace

void bind_fp8(nb::module_& m) { m.def("dequantise_fp8", &dequantise_fp8); }
