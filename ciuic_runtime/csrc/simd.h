// Sixteen lanes of float32 or int32 under one name for every instruction set, so that each kernel is written once.
// Included inside the namespace of one instruction set; what is inline here must not leave it.
//
// `dot4` adds to 16 int32 sums the products of four unsigned bytes each with four signed bytes that all lanes share.

#if defined(__AVX512F__)

struct F { __m512 v; };
struct I { __m512i v; };

inline F zero() { return {_mm512_setzero_ps()}; }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
inline __mmask16 first(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline F load_n(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store_n(float* p, F a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is not a number
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F round(F a) { return {_mm512_roundscale_ps(a.v, 8)}; }
inline F scale2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }  // a x 2^n
inline F widen_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
inline F load_bf16(const uint16_t* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline F load_bf16_n(const uint16_t* p, int64_t n) { return widen_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
inline F load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline __m256i narrow_bf16(F a) {
    const __m512i bits = _mm512_castps_si512(a.v), one = _mm512_set1_epi32(1);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), one);
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    up = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16));
}
inline void store_bf16(uint16_t* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a)); }
inline void store_bf16_n(uint16_t* p, F a, int64_t n) { _mm256_mask_storeu_epi16(p, first(n), narrow_bf16(a)); }

// a where n < 0, else b.
inline F select_negative(F n, F a, F b) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(n.v, _mm512_setzero_ps(), _CMP_LT_OQ), b.v, a.v)};
}

inline I izero() { return {_mm512_setzero_si512()}; }
inline I iset1(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline I umax(I a, I b) { return {_mm512_max_epu32(a.v, b.v)}; }
inline I bits(F a) { return {_mm512_castps_si512(a.v)}; }
inline F as_float(I a) { return {_mm512_castsi512_ps(a.v)}; }
inline I operator&(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline I load_i(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_i(int32_t* p, I a) { _mm512_storeu_si512(p, a.v); }
inline void store_i8(int8_t* p, I a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v)); }

typedef __m512i Bytes;
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
inline Bytes low_nibbles(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high_nibbles(Bytes b) { return _mm512_and_si512(_mm512_srli_epi16(b, 4), _mm512_set1_epi8(15)); }
inline I dot4(I sum, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return {_mm512_dpbusd_epi32(sum.v, w, _mm512_set1_epi32(four))};
}
constexpr bool kDot4ExactForBytes = true;

#elif defined(__AVX2__)

struct F { __m256 a, b; };
struct I { __m256i a, b; };

inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline F round(F x) { return {_mm256_round_ps(x.a, 8), _mm256_round_ps(x.b, 8)}; }
inline __m256 power2(__m256 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F scale2(F x, F n) { return {_mm256_mul_ps(x.a, power2(n.a)), _mm256_mul_ps(x.b, power2(n.b))}; }
inline __m256 widen_bf16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline F load_bf16(const uint16_t* p) {
    return {widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline F load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
            _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
inline __m128i narrow_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    up = _mm256_blendv_epi8(up, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
    up = _mm256_srli_epi32(up, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(up), _mm256_extracti128_si256(up, 1));
}
inline void store_bf16(uint16_t* p, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(x.a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow_bf16(x.b));
}

inline F select_negative(F n, F x, F y) {
    return {_mm256_blendv_ps(y.a, x.a, n.a), _mm256_blendv_ps(y.b, x.b, n.b)};  // by the sign bit
}

inline I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline I iset1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline I operator+(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I operator-(I x, I y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline I operator&(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline I umax(I x, I y) { return {_mm256_max_epu32(x.a, y.a), _mm256_max_epu32(x.b, y.b)}; }
inline I bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline F as_float(I x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline I to_int(F x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline I load_i(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}
inline void store_i(int32_t* p, I x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}

struct Bytes { __m256i a, b; };
inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline void store_bytes(uint8_t* p, Bytes x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), x.b);
}
inline Bytes low_nibbles(Bytes x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
inline Bytes high_nibbles(Bytes x) {
    const __m256i m = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), m), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), m)};
}
// Pairs of products are summed in 16 bits first: exact for nibbles only (2 x 15 x 127).
inline I dot4(I sum, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i v = _mm256_set1_epi32(four), one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.a, _mm256_madd_epi16(_mm256_maddubs_epi16(w.a, v), one)),
            _mm256_add_epi32(sum.b, _mm256_madd_epi16(_mm256_maddubs_epi16(w.b, v), one))};
}
constexpr bool kDot4ExactForBytes = false;
inline __m256i dot4_signed(__m256i sum, __m256i w, __m256i x) {
    const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(s), _mm256_sign_epi8(x, s));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
// The same for bytes stored with a zero of 128, which is taken off here (magnitudes up to 127: 2 x 127 x 127 fits).
inline I dot4_centred(I sum, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    const __m256i v = _mm256_set1_epi32(four);
    return {dot4_signed(sum.a, w.a, v), dot4_signed(sum.b, w.b, v)};
}

#else

// Four vectors of four lanes in the compiler's own vector types: SSE2 on any x86-64, NEON on any aarch64.
typedef float V4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));
typedef int16_t S8 __attribute__((vector_size(16)));

struct F { V4 v[4]; };
struct I { I4 v[4]; };
#define CIUIC_EACH for (int i = 0; i < 4; ++i)

inline F set1(float x) { F r; CIUIC_EACH r.v[i] = V4{x, x, x, x}; return r; }
inline F zero() { return set1(0.0f); }
inline F load(const float* p) { F r; CIUIC_EACH std::memcpy(&r.v[i], p + 4 * i, 16); return r; }
inline void store(float* p, F a) { CIUIC_EACH std::memcpy(p + 4 * i, &a.v[i], 16); }
inline F operator+(F a, F b) { CIUIC_EACH a.v[i] += b.v[i]; return a; }
inline F operator-(F a, F b) { CIUIC_EACH a.v[i] -= b.v[i]; return a; }
inline F operator*(F a, F b) { CIUIC_EACH a.v[i] *= b.v[i]; return a; }
inline F operator/(F a, F b) { CIUIC_EACH a.v[i] /= b.v[i]; return a; }
inline F fma(F a, F b, F c) { CIUIC_EACH a.v[i] = a.v[i] * b.v[i] + c.v[i]; return a; }
inline F max(F a, F b) { CIUIC_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline F min(F a, F b) { CIUIC_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
// Ties to even, for magnitudes below 2^22: adding 1.5 x 2^23 leaves no bits for a fraction.
inline F round(F a) { CIUIC_EACH a.v[i] = (a.v[i] + 12582912.0f) - 12582912.0f; return a; }
inline I to_int(F a) { a = round(a); I r; CIUIC_EACH r.v[i] = __builtin_convertvector(a.v[i], I4); return r; }
inline F to_float(I a) { F r; CIUIC_EACH r.v[i] = __builtin_convertvector(a.v[i], V4); return r; }
inline F scale2(F a, F n) {
    const I power = to_int(n);
    CIUIC_EACH a.v[i] *= (V4)((power.v[i] + 127) << 23);
    return a;
}
inline U4 load_halves(const uint16_t* p) {
    H4 h;
    std::memcpy(&h, p, 8);
    return __builtin_convertvector(h, U4);
}
// A bfloat16 is the upper half of its float32: halves and zeros in turns (little-endian).
inline F load_bf16(const uint16_t* p) {
    F r;
    for (int i = 0; i < 4; i += 2) {
        S8 h;
        std::memcpy(&h, p + 4 * i, 16);
#if defined(__clang__)
        r.v[i] = (V4)__builtin_shufflevector(S8{}, h, 0, 8, 1, 9, 2, 10, 3, 11);
        r.v[i + 1] = (V4)__builtin_shufflevector(S8{}, h, 4, 12, 5, 13, 6, 14, 7, 15);
#else
        r.v[i] = (V4)__builtin_shuffle(S8{}, h, S8{0, 8, 1, 9, 2, 10, 3, 11});
        r.v[i + 1] = (V4)__builtin_shuffle(S8{}, h, S8{4, 12, 5, 13, 6, 14, 7, 15});
#endif
    }
    return r;
}
inline void store_bf16(uint16_t* p, F a) {
    CIUIC_EACH {
        const U4 bits = (U4)a.v[i], rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
        const H4 h = __builtin_convertvector((a.v[i] == a.v[i] ? rounded : bits | 0x400000u) >> 16, H4);
        std::memcpy(p + 4 * i, &h, 8);
    }
}
// The exponent moves over by a product; subnormals come out right too.
inline F load_f16(const uint16_t* p) {
    F r;
    CIUIC_EACH {
        const U4 h = load_halves(p + 4 * i), rest = h & 0x7fffu, finite = (U4)((V4)(rest << 13) * 0x1p112f);
        r.v[i] = (V4)((rest >= 0x7c00u ? rest << 13 | 0x7f800000u : finite) | (h & 0x8000u) << 16);
    }
    return r;
}
inline F select_negative(F n, F a, F b) { CIUIC_EACH a.v[i] = n.v[i] < 0.0f ? a.v[i] : b.v[i]; return a; }

inline I iset1(int32_t x) { I r; CIUIC_EACH r.v[i] = I4{x, x, x, x}; return r; }
inline I izero() { return iset1(0); }
inline I operator+(I a, I b) { CIUIC_EACH a.v[i] += b.v[i]; return a; }
inline I operator-(I a, I b) { CIUIC_EACH a.v[i] -= b.v[i]; return a; }
inline I operator&(I a, I b) { CIUIC_EACH a.v[i] &= b.v[i]; return a; }
inline I umax(I a, I b) { CIUIC_EACH a.v[i] = (U4)a.v[i] > (U4)b.v[i] ? a.v[i] : b.v[i]; return a; }
inline I bits(F a) { I r; CIUIC_EACH r.v[i] = (I4)a.v[i]; return r; }
inline F as_float(I a) { F r; CIUIC_EACH r.v[i] = (V4)a.v[i]; return r; }
inline I load_i(const int32_t* p) { I r; CIUIC_EACH std::memcpy(&r.v[i], p + 4 * i, 16); return r; }
inline void store_i(int32_t* p, I a) { CIUIC_EACH std::memcpy(p + 4 * i, &a.v[i], 16); }

struct Bytes { U4 v[4]; };  // four bytes of a row in each lane
inline Bytes load_bytes(const uint8_t* p) { Bytes r; CIUIC_EACH std::memcpy(&r.v[i], p + 16 * i, 16); return r; }
inline void store_bytes(uint8_t* p, Bytes b) { CIUIC_EACH std::memcpy(p + 16 * i, &b.v[i], 16); }
inline Bytes low_nibbles(Bytes b) { CIUIC_EACH b.v[i] &= 0x0f0f0f0fu; return b; }
inline Bytes high_nibbles(Bytes b) { CIUIC_EACH b.v[i] = b.v[i] >> 4 & 0x0f0f0f0fu; return b; }
// Products of 16 bits (255 x 127 fits), every other byte at a time, added in pairs to 32.
inline I4 multiply_pairs(I4 sum, S8 w, S8 x) {
#if defined(__SSE2__)
    return sum + (I4)_mm_madd_epi16((__m128i)w, (__m128i)x);
#elif defined(__aarch64__)
    return (I4)vpadalq_s16((int32x4_t)sum, (int16x8_t)(w * x));
#else
    const I4 both = (I4)(w * x);
    return sum + ((I4)((U4)both << 16) >> 16) + (both >> 16);
#endif
}
inline I dot4(I sum, Bytes w, const int8_t* x) {
    const int16_t a = x[0], b = x[1], c = x[2], d = x[3];
    const S8 even{a, c, a, c, a, c, a, c}, odd{b, d, b, d, b, d, b, d};
    CIUIC_EACH {
        sum.v[i] = multiply_pairs(sum.v[i], (S8)(w.v[i] & 0x00ff00ffu), even);
        sum.v[i] = multiply_pairs(sum.v[i], (S8)(w.v[i] >> 8 & 0x00ff00ffu), odd);
    }
    return sum;
}
constexpr bool kDot4ExactForBytes = true;
#undef CIUIC_EACH

#endif

#if !defined(__AVX512F__)
inline F load_n(const float* p, int64_t n) {
    float lanes[16] = {};
    std::memcpy(lanes, p, n * sizeof(float));
    return load(lanes);
}
inline void store_n(float* p, F a, int64_t n) {
    float lanes[16];
    store(lanes, a);
    std::memcpy(p, lanes, n * sizeof(float));
}
inline F load_bf16_n(const uint16_t* p, int64_t n) {
    uint16_t lanes[16] = {};
    std::memcpy(lanes, p, n * sizeof(uint16_t));
    return load_bf16(lanes);
}
inline void store_bf16_n(uint16_t* p, F a, int64_t n) {
    uint16_t lanes[16];
    store_bf16(lanes, a);
    std::memcpy(p, lanes, n * sizeof(uint16_t));
}
inline void store_i8(int8_t* p, I a) {
    int32_t lanes[16];
    store_i(lanes, a);
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}
#endif
#if !defined(__AVX2__)
inline I dot4_centred(I sum, Bytes, const int8_t*) { return sum; }  // never called: dot4 is exact for bytes here
#elif defined(__AVX512F__)
inline I dot4_centred(I sum, Bytes, const int8_t*) { return sum; }
#endif

// Sums and maxima over the lanes, halving: a fixed order.
inline float hsum(F a) {
    float lanes[16];
    store(lanes, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
inline float hmax(F a) {
    float lanes[16];
    store(lanes, a);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}
inline uint32_t hmax_bits(I a) {
    int32_t lanes[16];
    store_i(lanes, a);
    uint32_t most = 0;
    for (int32_t v : lanes) most = static_cast<uint32_t>(v) > most ? static_cast<uint32_t>(v) : most;
    return most;
}

// e^x to about 1 ulp: 2^n e^r with |r| <= ln(2)/2 and a polynomial (Cephes); 0 below -87, not a number stays so.
inline F exp(F x) {
    x = max(set1(-87.3f), min(set1(88.0f), x));
    const F n = round(x * set1(1.44269504f));
    F r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    F p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p * r, r, r + set1(1.0f));
    return scale2(p, n);
}
inline F silu(F x) { return x / (set1(1.0f) + exp(zero() - x)); }
