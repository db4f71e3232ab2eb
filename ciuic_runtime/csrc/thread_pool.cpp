#include "thread_pool.h"

#include <cstdlib>
#include <new>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#define CIUIC_FORKS 1
#include <pthread.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace ciuic {
namespace {

// How long a waiting thread spins before it lets others run, and before it sleeps. Python needs a few microseconds
// between two calls, so workers are usually met awake; a busy neighbour gets the core soon all the same.
constexpr int kSpins = 2000;
constexpr int kYields = 50;

void pause() {
#ifdef __x86_64__
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void bind(std::thread& thread, int cpu) {
#ifdef __linux__
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(thread.native_handle(), sizeof set, &set);  // refused: it runs where the system puts it
#else
    (void)thread, (void)cpu;
#endif
}

// -1 where the system does not tell.
int this_processor() {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

// How many forks this process has come out of. It then has none of its parent's workers, and what they held at that
// moment (a mutex, a place among those that wait) is held for ever.
std::atomic<unsigned> forks{0};

void count_forks() {
#ifdef CIUIC_FORKS
    static const int once = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
    (void)once;
#endif
}

struct Scratch {
    void* memory = nullptr;
    size_t nbytes = 0;
};

}  // namespace

// `ticket` holds the job's number in its upper half and the next unclaimed chunk in its lower half. A chunk is claimed
// by compare-and-swap, which fails for a thread that still has an older job in mind; so the job's fields need no lock:
// whoever claims a chunk of a job knows that the caller still waits for it.
struct ThreadPool::State {
    std::atomic<uint64_t> ticket{0};
    std::atomic<int64_t> chunks{0};
    std::atomic<Body> body{nullptr};
    std::atomic<void*> context{nullptr};
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<int> sleeping{0};
    std::atomic<bool> stop{false};
    std::mutex mutex, one_caller;
    std::condition_variable wake;
    std::vector<std::thread> workers;
    std::vector<Scratch> scratch;
    std::vector<int> homes;  // the processor of each thread; empty: the system chooses
    int callers = -1;        // processor that the caller was last seen on
    size_t displaced = 0;    // the thread whose home that is, and which is on the caller's meanwhile; 0: none
    const unsigned born = forks.load();

    // Nothing binds the caller, who is Python's thread. After a wait for the disk it wakes up wherever the reader ran,
    // which may be a worker's home, and many systems leave both there for milliseconds: they change places instead.
    void make_way() {
        const int here = this_processor();
        if (here == callers) return;
        callers = here;
        size_t at = homes.size();
        while (--at > 0 && homes[at] != here) {}
        if (at == displaced) return;
        if (displaced) bind(workers[displaced - 1], homes[displaced]);
        if (at) bind(workers[at - 1], homes[0]);
        displaced = at;
    }

    void claim(uint64_t job, int thread) {
        for (;;) {
            uint64_t seen = ticket.load(std::memory_order_acquire);
            const int64_t chunk = static_cast<int64_t>(seen & 0xffffffffu);
            if (seen >> 32 != job) return;
            const Body call = body.load(std::memory_order_acquire);
            void* const with = context.load(std::memory_order_acquire);
            if (chunk >= chunks.load(std::memory_order_acquire)) return;
            if (!ticket.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            call(with, chunk, thread);
            done.fetch_add(1, std::memory_order_release);
        }
    }

    // The number of a job other than `last`, or of `last` again when the pool ends.
    uint64_t next_job(uint64_t last) {
        for (int i = 0; i < kSpins + kYields; ++i) {
            if (ticket.load(std::memory_order_acquire) >> 32 != last) return ticket.load() >> 32;
            if (i < kSpins) pause(); else std::this_thread::yield();
        }
        std::unique_lock<std::mutex> lock(mutex);
        sleeping.fetch_add(1);
        wake.wait(lock, [&] { return ticket.load() >> 32 != last || stop.load(); });
        sleeping.fetch_sub(1);
        return ticket.load() >> 32;
    }

    void work(int thread) {
        for (uint64_t job = 0; !stop.load(std::memory_order_relaxed);) {
            job = next_job(job);
            claim(job, thread);
        }
    }
};

ThreadPool::ThreadPool(int threads, const std::vector<int>& cpus) : state_(new State), threads_(threads) {
    count_forks();
    state_->scratch.resize(threads);
    for (int i = 1; i < threads; ++i) {
        state_->workers.emplace_back([this, i] { state_->work(i); });
        if (!cpus.empty()) bind(state_->workers.back(), cpus[i % cpus.size()]);
    }
    if (threads <= static_cast<int>(cpus.size())) state_->homes.assign(cpus.begin(), cpus.begin() + threads);
}

ThreadPool::~ThreadPool() {
    if (state_->born != forks.load()) return;  // nobody to wait for
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        state_->stop.store(true);
        state_->ticket.fetch_add(uint64_t(1) << 32);
        state_->chunks.store(0);
    }
    state_->wake.notify_all();
    for (auto& worker : state_->workers) worker.join();
    for (auto& s : state_->scratch) std::free(s.memory);
    delete state_;
}

void ThreadPool::run(int64_t chunks, Body body, void* context) {
    if (state_->born != forks.load(std::memory_order_relaxed)) {  // begin again, without workers
        state_ = new State;
        state_->scratch.resize(threads_);
    }
    State& s = *state_;
    std::lock_guard<std::mutex> one(s.one_caller);  // every caller is thread 0, whose scratch memory is one caller's
    if (threads_ == 1 || chunks <= 1) {
        for (int64_t c = 0; c < chunks; ++c) body(context, c, 0);
        return;
    }
    if (!s.homes.empty()) s.make_way();
    // A late thread may still look at these fields; it then holds an older job's number and cannot claim anything: who
    // reads a new field has also seen the ticket that was stored before it.
    const uint64_t last = s.ticket.load(std::memory_order_relaxed) >> 32, job = (last + 1) & 0xffffffffu;
    s.ticket.store((last << 32) | 0xffffffffu, std::memory_order_seq_cst);  // nothing to claim while they change
    s.chunks.store(chunks, std::memory_order_release);
    s.body.store(body, std::memory_order_release);
    s.context.store(context, std::memory_order_release);
    s.done.store(0, std::memory_order_relaxed);
    s.ticket.store(job << 32, std::memory_order_seq_cst);
    if (s.sleeping.load(std::memory_order_seq_cst) > 0) {
        { std::lock_guard<std::mutex> lock(s.mutex); }
        s.wake.notify_all();
    }
    s.claim(job, 0);
    for (int i = 0; s.done.load(std::memory_order_acquire) < chunks; ++i)
        if (i < kSpins) pause(); else std::this_thread::yield();
}

void* ThreadPool::scratch(int thread, size_t nbytes) {
    Scratch& s = state_->scratch[thread];
    if (s.nbytes < nbytes) {
        std::free(s.memory);
        s.nbytes = (nbytes + 4095) / 4096 * 4096;
        s.memory = std::aligned_alloc(4096, s.nbytes);
        if (!s.memory) {
            s.nbytes = 0;
            throw std::bad_alloc();
        }
    }
    return s.memory;
}

}  // namespace ciuic
