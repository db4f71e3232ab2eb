// The pool of threads and the kernels on it, for a thread sanitizer: many jobs of changing size from one and from two
// callers, pools that end at once, and products, an MLP and experts whose threads share inputs and scratch memory.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels.h"

using namespace ciuic;

namespace {

void check(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::exit(1);
}

// Every chunk of every job is done once and by the time run() returns; plain memory, so that a race shows.
void jobs(ThreadPool& pool, int times) {
    std::vector<int> hits;
    for (int i = 0; i < times; ++i) {
        const int64_t chunks = i * 7 % 23;
        hits.assign(chunks, 0);
        pool.run(chunks, [](void* context, int64_t chunk, int) { static_cast<int*>(context)[chunk] += 1; }, hits.data());
        for (int hit : hits) check(hit == 1, "a piece of work was done twice or not at all");
        if (i % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
}

struct Data {
    std::vector<uint8_t> bytes;
    Matrix matrix;
    Data(Layout layout, int64_t rows, int64_t columns) {
        matrix.layout = layout, matrix.rows = rows, matrix.columns = columns;
        bytes.assign(matrix.nbytes(), 0x31);
        matrix.data = bytes.data();
    }
};

void products(const Kernels& k, ThreadPool& pool, Layout layout, int64_t rows) {
    Arena arena;
    const Context context{&pool, &arena};
    const int64_t hidden = 200, width = 300, experts = 3;
    Data up(layout, width, hidden), down(layout, hidden, width);
    const MlpWeights mlp{up.matrix, up.matrix, down.matrix};
    std::vector<float> x(rows * hidden), out(rows * hidden), first(rows * hidden), each(rows * 2 * hidden);
    for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) - 8.0f;
    std::vector<int64_t> ids(rows * 2), addresses(experts * 3);
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = i % experts;
    for (int64_t e = 0; e < experts; ++e) {
        addresses[3 * e] = addresses[3 * e + 1] = reinterpret_cast<int64_t>(up.matrix.data);
        addresses[3 * e + 2] = reinterpret_cast<int64_t>(down.matrix.data);
    }
    for (int i = 0; i < 10; ++i) {
        k.mlp(context, mlp, x.data(), rows, nullptr, out.data());
        if (i == 0) first = out;
        check(!std::memcmp(out.data(), first.data(), out.size() * 4), "an MLP differs from call to call");
        k.experts(context, mlp, addresses.data(), experts, x.data(), ids.data(), rows, 2, each.data());
        check(!std::memcmp(each.data(), first.data(), hidden * 4), "an expert differs from the MLP");
    }
}

}  // namespace

int main() {
    for (int threads : {1, 2, 5}) {
        ThreadPool pool(threads, {});
        jobs(pool, 3000);
        std::thread other([&] { jobs(pool, 2000); });
        jobs(pool, 2000);
        other.join();
        std::thread beside([&] { products(*portable_kernels(), pool, Layout::w8g128_t16, 20); });
        for (Layout layout : {Layout::w4g128_t16, Layout::bf16_rows})
            for (int64_t rows : {1, 20}) products(*portable_kernels(), pool, layout, rows);
        beside.join();
    }
    for (int i = 0; i < 200; ++i) {
        ThreadPool pool(1 + i % 4, {});
        if (i % 3) jobs(pool, i % 5);
    }
    std::puts("done");
}
