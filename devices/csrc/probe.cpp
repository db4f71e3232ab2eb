// How fast the cores can read memory: each thread reads its own slice of a buffer much larger than the caches,
// and the bytes read by all threads are counted in equal windows of time.
// The loop is written once over 64-byte vectors and compiled for each instruction set; the widest that this
// processor has is taken at run time.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#endif

namespace nb = nanobind;

namespace {

typedef uint64_t Vector __attribute__((vector_size(64)));

constexpr size_t kChunk = size_t(1) << 20;     // bytes between two looks at the clock
constexpr size_t kHugePage = size_t(2) << 20;  // bytes

#define CIUIC_READ_LOOP                                              \
    const Vector* p = static_cast<const Vector*>(memory);            \
    const Vector* end = p + nbytes / sizeof(Vector);                 \
    Vector a{}, b{}, c{}, d{};                                       \
    for (; p != end; p += 4) {                                       \
        a ^= p[0];                                                   \
        b ^= p[1];                                                   \
        c ^= p[2];                                                   \
        d ^= p[3];                                                   \
    }                                                                \
    a ^= b ^ c ^ d;                                                  \
    return a[0] ^ a[1] ^ a[2] ^ a[3] ^ a[4] ^ a[5] ^ a[6] ^ a[7];

uint64_t read_portable(const void* memory, size_t nbytes) { CIUIC_READ_LOOP }

#ifdef __x86_64__
__attribute__((target("avx2"))) uint64_t read_avx2(const void* memory, size_t nbytes) { CIUIC_READ_LOOP }
__attribute__((target("avx512f"))) uint64_t read_avx512(const void* memory, size_t nbytes) { CIUIC_READ_LOOP }
#endif

struct Reader {
    const char* name;
    uint64_t (*read)(const void*, size_t);
};

Reader widest_reader() {
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx512f")) return {"avx512f", read_avx512};
    if (__builtin_cpu_supports("avx2")) return {"avx2", read_avx2};
#endif
    return {"portable", read_portable};
}

using Clock = std::chrono::steady_clock;

struct Start {
    std::atomic<int> ready{0};
    std::atomic<bool> go{false};
    std::atomic<bool> failed{false};
    std::atomic<uint64_t> sink{0};  // keeps the compiler from dropping the reads
    Clock::time_point at;           // written before `go`
};

void run_on(const std::vector<int>& cpus, size_t thread) {
#ifdef __linux__
    if (cpus.empty()) return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpus[thread % cpus.size()], &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused: measured where the system puts it
#else
    (void)cpus, (void)thread;
#endif
}

// Memory of this thread's own, first touched by it: on its NUMA node.
void* own_memory(size_t nbytes) {
    void* memory = std::aligned_alloc(kHugePage, nbytes);
    if (!memory) return nullptr;
#ifdef __linux__
    madvise(memory, nbytes, MADV_HUGEPAGE);  // only advice
#endif
    std::memset(memory, 1, nbytes);
    return memory;
}

void read_windows(Start& start, size_t nbytes, double window, std::vector<uint64_t>& bytes_read) {
    void* memory = own_memory(nbytes);
    if (!memory) start.failed = true;
    start.ready.fetch_add(1);
    while (!start.go.load(std::memory_order_acquire)) std::this_thread::yield();
    const auto read = widest_reader().read;
    uint64_t sum = 0;
    for (size_t offset = 0; memory && !start.failed; offset = offset + kChunk < nbytes ? offset + kChunk : 0) {
        sum ^= read(static_cast<const char*>(memory) + offset, kChunk);
        const double elapsed = std::chrono::duration<double>(Clock::now() - start.at).count();
        const size_t at = static_cast<size_t>(elapsed / window);
        if (at >= bytes_read.size()) break;
        bytes_read[at] += kChunk;
    }
    start.sink.fetch_xor(sum);
    std::free(memory);
}

// Bytes per second in each of `windows` windows that together last `seconds`, by `threads` threads that read
// `nbytes` in all over and over; thread i is bound to cpus[i % len(cpus)], or to none.
std::vector<double> read_bandwidth(size_t nbytes, int threads, double seconds, int windows, std::vector<int> cpus) {
    if (threads < 1 || windows < 1 || !(seconds > 0)) throw std::invalid_argument("threads, windows, seconds must be positive");
    const size_t slice = std::max(nbytes / threads / kHugePage, size_t(1)) * kHugePage;
    const double window = seconds / windows;
    std::vector<std::vector<uint64_t>> bytes_read(threads, std::vector<uint64_t>(windows));
    Start start;
    std::vector<std::thread> workers;
    for (int i = 0; i < threads; ++i)
        workers.emplace_back([&, i] {
            run_on(cpus, i);
            read_windows(start, slice, window, bytes_read[i]);
        });
    while (start.ready.load() < threads) std::this_thread::sleep_for(std::chrono::microseconds(50));
    start.at = Clock::now();
    start.go.store(true, std::memory_order_release);
    for (auto& worker : workers) worker.join();
    if (start.failed) throw std::bad_alloc();
    std::vector<double> rates(windows);
    for (int w = 0; w < windows; ++w)
        for (int i = 0; i < threads; ++i) rates[w] += bytes_read[i][w] / window;
    return rates;
}

}  // namespace

NB_MODULE(_probe, m) {
    m.def("read_bandwidth", &read_bandwidth, nb::arg("nbytes"), nb::arg("threads"), nb::arg("seconds"),
          nb::arg("windows") = 5, nb::arg("cpus") = std::vector<int>{}, nb::call_guard<nb::gil_scoped_release>(),
          "Bytes per second read in each window, by `threads` threads over `nbytes` in all.");
    m.def("instruction_set", [] { return std::string(widest_reader().name); }, "Of the loads that are used.");
}
