// A persistent pool of threads for one NUMA node. Work is claimed chunk by chunk: a thread that loses its core for a
// while delays only the chunk it holds, and one that does not wake in time is not waited for. The caller works too, so
// a pool without workers (one thread; after a fork) does everything itself.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

namespace ciuic {

class ThreadPool {
  public:
    using Body = void (*)(void* context, int64_t chunk, int thread);

    // `threads` in all, the caller being thread 0; worker i is bound to cpus[i % cpus.size()], or to none. Where each has
    // one for itself, the worker whose processor the caller is on has that of thread 0 meanwhile.
    ThreadPool(int threads, const std::vector<int>& cpus);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return threads_; }

    // Calls body(context, chunk, thread) once for every chunk in [0, chunks); at most 2^31 chunks.
    void run(int64_t chunks, Body body, void* context);

    // Memory of a thread's own, 64-byte aligned, that keeps its address until more is asked for.
    void* scratch(int thread, size_t nbytes);

  private:
    struct State;
    State* state_;
    int threads_;
};

}  // namespace ciuic
