// The kernels of one instruction set. CMake compiles this file once per set, with the set's flags and CIUIC_ISA as its
// name; everything is in a namespace of that name, so that nothing compiled for one processor is used on another.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AMX_INT8__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "floats.h"
#include "kernels.h"

#define CIUIC_JOIN(a, b) a##b
#define CIUIC_NAME(a, b) CIUIC_JOIN(a, b)
#define CIUIC_TEXT_OF(a) #a
#define CIUIC_TEXT(a) CIUIC_TEXT_OF(a)

namespace ciuic {
namespace CIUIC_ISA {

#include "simd.h"

alignas(64) constexpr float kLaneNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// body(chunk, thread) for every chunk in [0, chunks), on all threads of the pool.
template <class Body>
inline void parallel(Context c, int64_t chunks, const Body& body) {
    c.pool->run(
        chunks,
        [](void* context, int64_t chunk, int thread) { (*static_cast<const Body*>(context))(chunk, thread); },
        const_cast<Body*>(&body));
}

// body(row) for every row; shared out among threads only where the work (values per row) is worth it.
template <class Body>
inline void for_rows(Context c, int64_t rows, int64_t values, const Body& body) {
    const int64_t per = values < 1 ? rows : 16384 / values + 1, chunks = (rows + per - 1) / per;
    const auto chunk_rows = [&](int64_t chunk, int) {
        for (int64_t r = chunk * per; r < rows && r < (chunk + 1) * per; ++r) body(r);
    };
    if (chunks < 4) for (int64_t i = 0; i < chunks; ++i) chunk_rows(i, 0);
    else parallel(c, chunks, chunk_rows);
}

#include "rows.h"
#include "product.h"
#include "linear.h"
#include "moe.h"
#include "attention.h"
#include "gqa.h"
#if defined(__AMX_INT8__)
#include "attention_amx.h"
#include "mla_amx.h"
#endif
#include "mla.h"

bool here() {
#if defined(__AMX_INT8__)
#if defined(__linux__)
    constexpr int kAskPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") &&
           __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("gfni") &&
           syscall(SYS_arch_prctl, kAskPermission, kTileData) == 0;
#else
    return false;
#endif
#elif defined(__AVX512F__)
#if defined(__AVX512BF16__)
    if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#elif defined(__AVX2__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return true;
#endif
}

const Kernels kTable = {CIUIC_TEXT(CIUIC_ISA), linear, mlp, route, experts, combine, mla, gqa, rms_norm, embed};

}  // namespace CIUIC_ISA

const Kernels* CIUIC_NAME(CIUIC_ISA, _kernels)() {
    static const bool usable = CIUIC_ISA::here();
    return usable ? &CIUIC_ISA::kTable : nullptr;
}

}  // namespace ciuic
