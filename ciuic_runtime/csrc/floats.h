// Bits of float32 and bfloat16. Static, so that each instruction set's translation unit has a copy of its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__GNUC__) || defined(__clang__)
#define CIUIC_INLINE inline __attribute__((always_inline))
#else
#define CIUIC_INLINE inline
#endif

namespace ciuic {

static CIUIC_INLINE float as_float(uint32_t bits) {
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

static CIUIC_INLINE uint32_t as_bits(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
}

static CIUIC_INLINE float from_bfloat16(uint16_t v) { return as_float(static_cast<uint32_t>(v) << 16); }

// Round to nearest, ties to even; what is not a number stays so.
static CIUIC_INLINE uint16_t to_bfloat16(float f) {
    const uint32_t bits = as_bits(f), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    return static_cast<uint16_t>(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16);
}

}  // namespace ciuic
