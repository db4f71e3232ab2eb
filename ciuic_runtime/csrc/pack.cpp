// Packs matrices into the layouts of models/layout.py and unpacks them: groups of 128 columns, tiles of 16 rows, one
// float16 scale per row and group. Every step is written so that any compiler and instruction set gives the same bits
// (this file is compiled without contraction of a * b + c); ops/packing.py has the same in torch.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "floats.h"

namespace nb = nanobind;

#if defined(__x86_64__) && defined(__GNUC__)
#define CIUIC_DISPATCH 1
#endif

using ciuic::as_bits;
using ciuic::as_float;

namespace {

constexpr int kGroup = 128, kTileRows = 16, kQuad = 4;
constexpr int64_t kPartAlign = 64;  // bytes
constexpr uint32_t kInfinity = 0x7f800000u, kMagnitude = 0x7fffffffu;

// Round to nearest, ties to even, subnormals included; what is too large becomes infinity.
CIUIC_INLINE uint16_t to_half(float f) {
    const uint32_t bits = as_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & kMagnitude;
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more
    if (magnitude < 0x38800000u) {                                                // below 2^-14: multiples of 2^-24
        const uint32_t sum = as_bits(as_float(magnitude) + 0.5f);                 // the addition rounds to 2^-24
        return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

CIUIC_INLINE float from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude < 0x400u) return as_float(sign | as_bits(static_cast<float>(magnitude) * 0x1p-24f));
    return as_float(sign | ((magnitude << 13) + 0x38000000u));
}

struct BFloat16 {
    using type = uint16_t;
    static CIUIC_INLINE uint32_t bits(uint16_t v) { return static_cast<uint32_t>(v) << 16; }
};

struct Float32 {
    using type = float;
    static CIUIC_INLINE uint32_t bits(float v) { return as_bits(v); }
};

template <int Bits>
struct Tile {
    static constexpr int kZero = Bits == 4 ? 8 : 128, kLeast = Bits == 4 ? -8 : -127, kMost = Bits == 4 ? 7 : 127;
    static constexpr int kWords = kGroup / kQuad * Bits / 8;  // of 4 bytes: one row of one group
    static constexpr int64_t kGroupBytes = int64_t{kTileRows} * kWords * 4;

    static int64_t groups(int64_t columns) { return (columns + kGroup - 1) / kGroup; }
    static int64_t nbytes(int64_t columns) {
        const int64_t scales = groups(columns) * kTileRows * 2;
        return groups(columns) * kGroupBytes + (scales + kPartAlign - 1) / kPartAlign * kPartAlign;
    }
};

// The scale of a group from its values' bits; false where one is not finite or the scale exceeds float16.
// 4 bits: the value of largest magnitude (of equal ones the negative) becomes -8; 8 bits: it becomes 127 or -127.
template <int Bits>
CIUIC_INLINE bool group_scale(const uint32_t* bits, uint16_t* half) {
    int32_t above = 0;   // the largest positive value's bits: positive floats are ordered like integers
    uint32_t below = 0;  // the largest of all bits: a negative value's, where there is one
    for (int i = 0; i < kGroup; ++i) {
        above = std::max(above, static_cast<int32_t>(bits[i]));
        below = std::max(below, bits[i]);
    }
    const uint32_t positive = static_cast<uint32_t>(above), negative = below > kMagnitude ? below & kMagnitude : 0;
    if (std::max(positive, negative) >= kInfinity) return false;
    float scale;
    if (Bits == 4)
        scale = (positive > negative ? as_float(positive) : -as_float(negative)) * -0.125f;
    else
        scale = as_float(std::max(positive, negative)) / 127.0f;
    *half = to_half(scale);
    if (*half == 0x8000u) *half = 0;
    return (*half & 0x7fffu) < 0x7c00u;
}

template <class Source, int Bits>
CIUIC_INLINE bool pack_tile(const typename Source::type* src, int64_t rows, int64_t columns, uint8_t* dst) {
    using T = Tile<Bits>;
    const int64_t groups = T::groups(columns);
    uint8_t* scales = dst + groups * T::kGroupBytes;
    std::memset(scales, 0, static_cast<size_t>(T::nbytes(columns) - groups * T::kGroupBytes));
    for (int64_t g = 0; g < groups; ++g) {
        alignas(64) uint32_t quads[kTileRows][kGroup / kQuad];
        for (int r = 0; r < kTileRows; ++r) {
            alignas(64) uint32_t bits[kGroup];
            alignas(64) uint8_t stored[kGroup];
            const auto* row = src + r * columns + g * kGroup;
            const int64_t here = r < rows ? std::min<int64_t>(kGroup, columns - g * kGroup) : 0;
            if (here == kGroup)
                for (int i = 0; i < kGroup; ++i) bits[i] = Source::bits(row[i]);
            else
                for (int i = 0; i < kGroup; ++i) bits[i] = i < here ? Source::bits(row[i]) : 0u;
            uint16_t half;
            if (!group_scale<Bits>(bits, &half)) return false;
            std::memcpy(scales + (g * kTileRows + r) * 2, &half, 2);
            const float inverse = half ? 1.0f / from_half(half) : 0.0f;
            for (int i = 0; i < kGroup; ++i) {
                const float shifted = as_float(bits[i]) * inverse + 0x1.8p23f;  // its last bits are the rounded integer
                const int32_t q = static_cast<int32_t>(as_bits(shifted)) - 0x4b400000;
                stored[i] = static_cast<uint8_t>(std::min(std::max(q, T::kLeast), T::kMost) + T::kZero);
            }
            std::memcpy(quads[r], stored, kGroup);
        }
        alignas(64) uint32_t words[T::kWords][kTileRows];
        for (int r = 0; r < kTileRows; ++r)
            for (int j = 0; j < T::kWords; ++j)
                words[j][r] = Bits == 8 ? quads[r][j] : quads[r][2 * j] | quads[r][2 * j + 1] << 4;
        std::memcpy(dst + g * T::kGroupBytes, words, T::kGroupBytes);
    }
    return true;
}

template <int Bits>
CIUIC_INLINE void unpack_tile(const uint8_t* src, int64_t rows, int64_t columns, float* dst) {
    using T = Tile<Bits>;
    const int64_t groups = T::groups(columns);
    const uint8_t* scales = src + groups * T::kGroupBytes;
    for (int64_t g = 0; g < groups; ++g) {
        alignas(64) uint32_t words[T::kWords][kTileRows];
        std::memcpy(words, src + g * T::kGroupBytes, T::kGroupBytes);
        for (int r = 0; r < rows; ++r) {
            alignas(64) uint32_t quads[kGroup / kQuad];
            alignas(64) uint8_t stored[kGroup];
            for (int j = 0; j < T::kWords; ++j) {
                const uint32_t word = words[j][r];
                if (Bits == 8) {
                    quads[j] = word;
                } else {
                    quads[2 * j] = word & 0x0f0f0f0fu;
                    quads[2 * j + 1] = word >> 4 & 0x0f0f0f0fu;
                }
            }
            std::memcpy(stored, quads, kGroup);
            uint16_t half;
            std::memcpy(&half, scales + (g * kTileRows + r) * 2, 2);
            const float scale = from_half(half);
            alignas(64) float values[kGroup];
            for (int i = 0; i < kGroup; ++i) values[i] = scale * static_cast<float>(stored[i] - T::kZero);
            const int64_t here = std::min<int64_t>(kGroup, columns - g * kGroup);
            std::memcpy(dst + r * columns + g * kGroup, values, static_cast<size_t>(here) * 4);
        }
    }
}

// A matrix of plain values, bfloat16 or float32; false where one is not finite, or not any more after rounding.
template <class Source>
CIUIC_INLINE bool copy_bf16(const typename Source::type* src, int64_t count, uint16_t* dst) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = Source::bits(src[i]), up = bits >> 16 & 1u;
        const uint32_t rounded = std::min(bits & kMagnitude, kInfinity) + 0x7fffu + up;
        largest = std::max(largest, rounded);
        dst[i] = static_cast<uint16_t>((rounded | (bits & ~kMagnitude)) >> 16);
    }
    return largest < kInfinity;
}

template <class Source>
CIUIC_INLINE bool copy_f32(const typename Source::type* src, int64_t count, uint32_t* dst) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = Source::bits(src[i]);
        largest = std::max(largest, bits & kMagnitude);
        dst[i] = bits;
    }
    return largest < kInfinity;
}

enum class Layout { w4, w8, bf16, f32 };

Layout layout_named(const std::string& name) {
    if (name == "w4g128-t16") return Layout::w4;
    if (name == "w8g128-t16") return Layout::w8;
    if (name == "bf16-rows") return Layout::bf16;
    if (name == "f32-rows") return Layout::f32;
    throw std::invalid_argument("no layout is called " + name);
}

template <class Source, int Bits>
CIUIC_INLINE bool pack_tiles(const typename Source::type* src, int64_t rows, int64_t columns, uint8_t* dst) {
    for (int64_t r = 0; r < rows; r += kTileRows, dst += Tile<Bits>::nbytes(columns))
        if (!pack_tile<Source, Bits>(src + r * columns, std::min<int64_t>(kTileRows, rows - r), columns, dst))
            return false;
    return true;
}

template <class Source>
CIUIC_INLINE bool pack_any(Layout layout, const void* source, int64_t rows, int64_t columns, void* dst) {
    const auto* src = static_cast<const typename Source::type*>(source);
    switch (layout) {
        case Layout::w4: return pack_tiles<Source, 4>(src, rows, columns, static_cast<uint8_t*>(dst));
        case Layout::w8: return pack_tiles<Source, 8>(src, rows, columns, static_cast<uint8_t*>(dst));
        case Layout::bf16: return copy_bf16<Source>(src, rows * columns, static_cast<uint16_t*>(dst));
        default: return copy_f32<Source>(src, rows * columns, static_cast<uint32_t*>(dst));
    }
}

template <int Bits>
CIUIC_INLINE void unpack_tiles(const uint8_t* src, int64_t rows, int64_t columns, float* dst) {
    for (int64_t r = 0; r < rows; r += kTileRows, src += Tile<Bits>::nbytes(columns))
        unpack_tile<Bits>(src, std::min<int64_t>(kTileRows, rows - r), columns, dst + r * columns);
}

CIUIC_INLINE void unpack_any(Layout layout, const void* src, int64_t rows, int64_t columns, float* dst) {
    switch (layout) {
        case Layout::w4: return unpack_tiles<4>(static_cast<const uint8_t*>(src), rows, columns, dst);
        case Layout::w8: return unpack_tiles<8>(static_cast<const uint8_t*>(src), rows, columns, dst);
        case Layout::bf16:
            for (int64_t i = 0; i < rows * columns; ++i)
                dst[i] = as_float(BFloat16::bits(static_cast<const uint16_t*>(src)[i]));
            return;
        default: std::memcpy(dst, src, static_cast<size_t>(rows * columns) * 4);
    }
}

// The same code for several instruction sets; the machine's best is used unless another is named.
using PackFunction = bool (*)(Layout, const void*, int64_t, int64_t, void*);
using UnpackFunction = void (*)(Layout, const void*, int64_t, int64_t, float*);

struct Functions {
    const char* isa;
    bool usable;
    PackFunction bf16, f32;
    UnpackFunction unpack;
};

#define CIUIC_FUNCTIONS(NAME, ATTRIBUTE)                                                           \
    ATTRIBUTE bool pack_bf16_##NAME(Layout layout, const void* s, int64_t r, int64_t c, void* d) { \
        return pack_any<BFloat16>(layout, s, r, c, d);                                             \
    }                                                                                              \
    ATTRIBUTE bool pack_f32_##NAME(Layout layout, const void* s, int64_t r, int64_t c, void* d) {  \
        return pack_any<Float32>(layout, s, r, c, d);                                              \
    }                                                                                              \
    ATTRIBUTE void unpack_##NAME(Layout layout, const void* s, int64_t r, int64_t c, float* d) {   \
        unpack_any(layout, s, r, c, d);                                                            \
    }

CIUIC_FUNCTIONS(portable, )
#ifdef CIUIC_DISPATCH
CIUIC_FUNCTIONS(avx2, __attribute__((target("avx2"))))
CIUIC_FUNCTIONS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))))
#endif

// The best first.
const std::vector<Functions>& all_functions() {
    static const std::vector<Functions> all = {
#ifdef CIUIC_DISPATCH
        {"avx512",
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
         pack_bf16_avx512, pack_f32_avx512, unpack_avx512},
        {"avx2", __builtin_cpu_supports("avx2") != 0, pack_bf16_avx2, pack_f32_avx2, unpack_avx2},
#endif
        {"portable", true, pack_bf16_portable, pack_f32_portable, unpack_portable},
    };
    return all;
}

const Functions& functions(const std::string& isa) {
    for (const Functions& f : all_functions())
        if (f.usable && (isa.empty() || isa == f.isa)) return f;
    throw std::invalid_argument("this machine does not pack with " + isa);
}

std::vector<std::string> pack_instruction_sets() {
    std::vector<std::string> usable;
    for (const Functions& f : all_functions())
        if (f.usable) usable.push_back(f.isa);
    return usable;
}

// Addresses of a contiguous matrix [rows, columns] and of the packed bytes; the caller has checked types and sizes.
// False, with the destination half written, where a value is not finite or too large for the layout.
bool pack_matrix(const std::string& layout, uintptr_t src, const std::string& src_dtype, int64_t rows, int64_t columns,
                 uintptr_t dst, const std::string& isa) {
    const Layout to = layout_named(layout);
    if (src_dtype != "bf16" && src_dtype != "f32") throw std::invalid_argument("cannot pack from " + src_dtype);
    const PackFunction pack = src_dtype == "bf16" ? functions(isa).bf16 : functions(isa).f32;
    nb::gil_scoped_release unlocked;
    return pack(to, reinterpret_cast<const void*>(src), rows, columns, reinterpret_cast<void*>(dst));
}

void unpack_matrix(const std::string& layout, uintptr_t src, int64_t rows, int64_t columns, uintptr_t dst,
                   const std::string& isa) {
    const Layout from = layout_named(layout);
    const UnpackFunction unpack = functions(isa).unpack;
    nb::gil_scoped_release unlocked;
    unpack(from, reinterpret_cast<const void*>(src), rows, columns, reinterpret_cast<float*>(dst));
}

}  // namespace

void bind_pack(nb::module_& m) {
    m.def("pack_matrix", &pack_matrix, nb::arg("layout"), nb::arg("src"), nb::arg("src_dtype"), nb::arg("rows"),
          nb::arg("columns"), nb::arg("dst"), nb::arg("isa") = "");
    m.def("unpack_matrix", &unpack_matrix, nb::arg("layout"), nb::arg("src"), nb::arg("rows"), nb::arg("columns"),
          nb::arg("dst"), nb::arg("isa") = "");
    m.def("pack_instruction_sets", &pack_instruction_sets);
}
