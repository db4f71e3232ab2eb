// What this machine gives right now, in under a second: cores, memory reads, and the peaks of the instructions that
// multiply. Every thread is pinned to its processor and measured together with the others.
//   limits THREADS [BUFFER_MIB [SECONDS_PER_PROBE]]      prints one JSON object; a peak that the processor lacks is 0

#define _GNU_SOURCE
#include <cpuid.h>
#include <immintrin.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256
#define HUGE_PAGE (2ul << 20)
#define MAX_SLICES 100000

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

// One probe: a function that does a fixed piece of work and says how much that was.
typedef struct {
    const unsigned char* buffer;  // of this thread
    size_t nbytes, at;
    uint64_t sink;
} State;
typedef double (*Work)(State*);

static double spin(State* s) {  // a chain of dependent multiplications, about 20 us
    uint64_t x = s->sink | 1;
    for (int i = 0; i < 16000; i++) {
        x *= 0x9e3779b97f4a7c15u;
        __asm__ volatile("" : "+r"(x));
    }
    s->sink = x;
    return 16000;
}

#define STREAMS 4  // read side by side, so that more than one hardware prefetcher works
#define PIECE (1ul << 20)

__attribute__((target("avx512f"))) static double read_avx512(State* s) {
    const size_t lane = s->nbytes / STREAMS, step = PIECE / STREAMS;
    if (s->at + step > lane) s->at = 0;
    const unsigned char* p = s->buffer + s->at;
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i < step; i += 64) {
        a = _mm512_xor_si512(a, _mm512_load_si512(p + i));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + i + lane));
        c = _mm512_xor_si512(c, _mm512_load_si512(p + i + 2 * lane));
        d = _mm512_xor_si512(d, _mm512_load_si512(p + i + 3 * lane));
    }
    s->at += step;
    a = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
    s->sink ^= _mm_cvtsi128_si64(_mm512_castsi512_si128(a));
    return PIECE;
}

static double read_portable(State* s) {
    if (s->at + PIECE > s->nbytes) s->at = 0;
    const uint64_t* p = (const uint64_t*)(s->buffer + s->at);
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i < PIECE / 8; i += 4) a ^= p[i], b ^= p[i + 1], c ^= p[i + 2], d ^= p[i + 3];
    s->at += PIECE;
    s->sink ^= a ^ b ^ c ^ d;
    return PIECE;
}

// 12 independent accumulators cover latency x ports of the vector units.
#define TWELVE(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define DECLARE(i) __m512i a##i = _mm512_setzero_si512();
#define VNNI(i) __asm__ volatile("vpdpbusd %1, %1, %0" : "+v"(a##i) : "v"(w));
#define AVXBF16(i) __asm__ volatile("vdpbf16ps %1, %1, %0" : "+v"(a##i) : "v"(w));

__attribute__((target("avx512f"))) static double vnni(State* s) {
    (void)s;
    __m512i w = _mm512_setzero_si512();
    TWELVE(DECLARE)
    for (int i = 0; i < 4000; i++) { TWELVE(VNNI) }
    return 4000.0 * 12 * 128;
}

__attribute__((target("avx512f"))) static double avx512_bf16(State* s) {
    (void)s;
    __m512i w = _mm512_setzero_si512();
    TWELVE(DECLARE)
    for (int i = 0; i < 4000; i++) { TWELVE(AVXBF16) }
    return 4000.0 * 12 * 64;
}

// Four tiles of results from two and two: as a kernel would hold them.
__attribute__((target("amx-tile"))) static void configure_tiles(void) {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } config = {.palette = 1};
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory");  // gcc 12 takes the stores for dead otherwise
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
}

__attribute__((target("amx-tile,amx-int8"))) static double amx_int8(State* s) {
    (void)s;
    configure_tiles();
    for (int i = 0; i < 1000; i++) {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return 1000.0 * 4 * 2 * 16 * 16 * 64;
}

__attribute__((target("amx-tile,amx-bf16"))) static double amx_bf16(State* s) {
    (void)s;
    configure_tiles();
    for (int i = 0; i < 1000; i++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return 1000.0 * 4 * 2 * 16 * 16 * 32;
}

static int has_amx(void) {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    const unsigned wanted = 1u << 22 | 1u << 24 | 1u << 25;           // amx_bf16, amx_tile, amx_int8
    return (d & wanted) == wanted && !syscall(SYS_arch_prctl, 0x1023, 18);  // may this process use tile data?
}

static int has_avx512_bf16(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}

// All threads do the work until the time is over. Slices of work are timed: what an undisturbed slice takes (a fast
// one: the tenth part) tells how much of its processor a thread was given.
typedef struct {
    pthread_t thread;
    int cpu;
    Work work;
    State state;
    double done, seconds, given;
} Worker;

static Worker workers[MAX_THREADS];
static pthread_barrier_t barrier;
static double probe_seconds = 0.1;

static int ascending(const void* a, const void* b) {
    const float x = *(const float*)a, y = *(const float*)b;
    return (x > y) - (x < y);
}

static void* run(void* argument) {
    Worker* w = argument;
    static __thread float slices[MAX_SLICES];
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(w->cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    w->work(&w->state);
    pthread_barrier_wait(&barrier);
    const double begin = now();
    double at = begin, end;
    int n = 0;
    w->done = 0;
    do {
        w->done += w->work(&w->state);
        end = now();
        slices[n++] = end - at;
        at = end;
    } while (end - begin < probe_seconds && n < MAX_SLICES);
    w->seconds = end - begin;
    qsort(slices, n, sizeof *slices, ascending);
    w->given = n * slices[n / 10] / w->seconds;
    return 0;
}

static void* touch(void* argument) {
    Worker* w = argument;
    memset((void*)w->state.buffer, 1, w->state.nbytes);
    return 0;
}

static void all(int threads, void* (*function)(void*)) {
    for (int i = 0; i < threads; i++) pthread_create(&workers[i].thread, 0, function, workers + i);
    for (int i = 0; i < threads; i++) pthread_join(workers[i].thread, 0);
}

// Work per second by all threads; `given`: processors that they were given.
static double rate(int threads, Work work, double* given) {
    double sum = 0, share = 0;
    pthread_barrier_init(&barrier, 0, threads);
    for (int i = 0; i < threads; i++) workers[i].work = work;
    all(threads, run);
    for (int i = 0; i < threads; i++) sum += workers[i].done / workers[i].seconds, share += workers[i].given;
    pthread_barrier_destroy(&barrier);
    if (given) *given = share;
    return sum;
}

int main(int argc, char** argv) {
    const int threads = argc > 1 ? atoi(argv[1]) : 1;
    const size_t mib = argc > 2 ? strtoul(argv[2], 0, 10) : 1024;
    if (argc > 3) probe_seconds = atof(argv[3]);
    if (threads < 1 || threads > MAX_THREADS || mib < 8 * (size_t)threads || probe_seconds <= 0) {
        fprintf(stderr, "usage: limits THREADS [BUFFER_MIB [SECONDS_PER_PROBE]]\n");
        return 2;
    }
    cpu_set_t allowed;
    sched_getaffinity(0, sizeof allowed, &allowed);
    for (int i = 0, cpu = -1; i < threads; i++) {
        do cpu = (cpu + 1) % CPU_SETSIZE;
        while (!CPU_ISSET(cpu, &allowed));
        workers[i].cpu = cpu;
    }
    const size_t slice = (mib << 20) / threads / (8 * PIECE) * (8 * PIECE);
    unsigned char* memory = mmap(0, slice * threads + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return perror("mmap"), 1;
    memory += -(uintptr_t)memory & (HUGE_PAGE - 1);
    madvise(memory, slice * threads, MADV_HUGEPAGE);
    for (int i = 0; i < threads; i++) workers[i].state = (State){memory + slice * i, slice, 0, 1};
    all(threads, touch);

    const int avx512 = __builtin_cpu_supports("avx512f"), amx = has_amx();
    double given;
    const double spins = rate(threads, spin, &given);
    probe_seconds *= 2;
    const double reads = rate(threads, avx512 ? read_avx512 : read_portable, 0);
    probe_seconds /= 2;
    const double i8 = __builtin_cpu_supports("avx512vnni") ? rate(threads, vnni, 0) : 0;
    const double b16 = avx512 && has_avx512_bf16() ? rate(threads, avx512_bf16, 0) : 0;
    const double i8_tiles = amx ? rate(threads, amx_int8, 0) : 0, b16_tiles = amx ? rate(threads, amx_bf16, 0) : 0;
    printf(
        "{\"threads\": %d, \"cores_given\": %.3f, \"spins_per_s\": %.4g, \"read_bandwidth\": %.5g, \"vnni_int8\": %.4g, "
        "\"avx512_bf16\": %.4g, \"amx_int8\": %.4g, \"amx_bf16\": %.4g}\n",
        threads, given, spins, reads, i8, b16, i8_tiles, b16_tiles);
    return 0;
}
