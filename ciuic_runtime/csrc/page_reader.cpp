// Reads pages from files into memory on threads of its own, past the page cache, without Python's lock. Pages are cut
// into pieces, so that one page that is waited for is read by all threads at once. Knows addresses, no page names, and
// checks nothing but that all bytes came.
#include <fcntl.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace nb = nanobind;

namespace {

constexpr int64_t kBlock = 4096;      // what direct reads come in
constexpr size_t kRowsPerThread = 4;  // fewer are not worth another thread

double now() {  // as Python's time.perf_counter()
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

struct Job {
    int64_t ticket;
    int direct, plain;  // descriptors of the same file; direct is -1 where the file system refuses O_DIRECT
    int64_t offset, nbytes;
    uint8_t* into;
    int64_t order;  // smaller ones are read first
    int64_t claimed = 0, done = 0;  // bytes
    int64_t missing = 0;            // bytes that the file no longer has
    int error = 0;                  // errno of the first piece that failed
    double start = 0, end = 0;
};

// A finished read: ticket, errno, bytes missing, when its first piece began and its last one ended.
using Done = std::tuple<int64_t, int, int64_t, double, double>;

class PageReader {
  public:
    PageReader(int threads, int64_t piece_nbytes) : piece_(piece_nbytes) {
        if (threads < 1 || piece_nbytes < 4096 || piece_nbytes % 4096)
            throw std::invalid_argument("at least one thread, and pieces of a multiple of 4096 bytes");
        for (int i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
    }

    ~PageReader() { stop(); }

    // What was not begun is dropped; returns when nothing is written to any more.
    void stop() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        work_.notify_all();
        done_cv_.notify_all();
        for (auto& w : workers_)
            if (w.joinable()) w.join();
    }

    int64_t submit(int direct, int plain, int64_t offset, int64_t nbytes, uintptr_t into, int64_t order) {
        if (nbytes <= 0) throw std::invalid_argument("a read has at least one byte");
        auto job = std::make_unique<Job>();
        Job* j = job.get();
        j->direct = direct, j->plain = plain, j->offset = offset, j->nbytes = nbytes, j->order = order;
        j->into = reinterpret_cast<uint8_t*>(into);
        int64_t ticket;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            ticket = j->ticket = next_ticket_++;
            jobs_[ticket] = std::move(job);
            enqueue(j);
        }
        work_.notify_one();  // who wakes the next one: waking all of them costs the caller a quarter of a millisecond
        return ticket;  // the job may have ended already, and be gone
    }

    void promote(int64_t ticket, int64_t order) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = jobs_.find(ticket);
        if (found == jobs_.end() || found->second->order <= order) return;
        found->second->order = order;
        if (take(found->second.get())) enqueue(found->second.get());
    }

    // Whether it was taken back before a byte of it was asked for. Else what was not asked for yet is left out, and the
    // read ends with ECANCELED, unless all of it was under way.
    bool cancel(int64_t ticket) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = jobs_.find(ticket);
        if (found == jobs_.end()) return false;
        Job* j = found->second.get();
        if (!take(j)) return false;  // no piece is left to be asked for
        if (j->claimed == 0) return jobs_.erase(found), true;
        j->error = ECANCELED;
        j->nbytes = j->claimed;
        if (j->done == j->nbytes) finish(j);
        return false;
    }

    // Reads that have finished since the last call; where there are none, the first to finish within `seconds`.
    std::vector<Done> finished(double seconds) {
        std::vector<Done> result;
        if (seconds <= 0 && !any_done_.load(std::memory_order_acquire)) return result;
        nb::gil_scoped_release unlocked;
        std::unique_lock<std::mutex> lock(mutex_);
        if (seconds > 0)
            done_cv_.wait_for(lock, std::chrono::duration<double>(seconds), [&] { return !done_.empty() || stop_; });
        result.swap(done_);
        any_done_.store(false, std::memory_order_release);
        return result;
    }

    // Fills `into` with so many bytes at each of these offsets, side by side, on threads for this call alone: few bytes
    // each, so what counts is how many are under way at once. errno and bytes missing.
    std::tuple<int, int64_t> read_rows(int direct, int plain, const std::vector<int64_t>& offsets, int64_t nbytes,
                                       uintptr_t into) {
        if (nbytes <= 0) throw std::invalid_argument("a row has at least one byte");
        nb::gil_scoped_release unlocked;
        std::atomic<size_t> next{0};
        std::atomic<int> error{0};
        std::atomic<int64_t> missing{0};
        const auto some = [&] {
            const int64_t most = (nbytes + 2 * kBlock - 2) / kBlock * kBlock;  // that a row can lie across
            std::unique_ptr<uint8_t, decltype(&std::free)> block(
                static_cast<uint8_t*>(std::aligned_alloc(kBlock, most)), &std::free);
            if (!block) {
                error = ENOMEM;
                return;
            }
            for (size_t i; !error && (i = next++) < offsets.size();) {
                const int64_t first = offsets[i] / kBlock * kBlock, skip = offsets[i] - first;
                const int64_t whole = (skip + nbytes + kBlock - 1) / kBlock * kBlock;
                int64_t lacks = 0;
                if (const int e = read(direct, plain, first, block.get(), whole, lacks)) error = e;
                if (lacks) missing += lacks;
                std::memcpy(reinterpret_cast<uint8_t*>(into) + i * nbytes, block.get() + skip, nbytes);
            }
        };
        std::vector<std::thread> helpers;
        const size_t threads = std::min(workers_.size(), (offsets.size() + kRowsPerThread - 1) / kRowsPerThread);
        while (helpers.size() + 1 < threads) helpers.emplace_back(some);
        some();
        for (auto& helper : helpers) helper.join();
        return {error.load(), missing.load()};
    }

    int64_t in_flight() {
        std::lock_guard<std::mutex> lock(mutex_);
        return static_cast<int64_t>(jobs_.size());
    }

    // Bytes that had to be read through the page cache.
    int64_t plain_nbytes() const { return plain_nbytes_.load(); }

  private:
    void enqueue(Job* job) {  // behind those of the same order
        const auto after = [](const Job* a, const Job* b) { return a->order < b->order; };
        queue_.insert(std::upper_bound(queue_.begin(), queue_.end(), job, after), job);
    }

    bool take(Job* job) {
        const auto at = std::find(queue_.begin(), queue_.end(), job);
        return at != queue_.end() && (queue_.erase(at), true);
    }

    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            work_.wait(lock, [&] { return stop_ || !queue_.empty(); });
            if (stop_) return;
            Job* j = queue_.front();
            const int64_t at = j->claimed, n = std::min(piece_, j->nbytes - at);
            j->claimed += n;
            if (j->claimed == j->nbytes) queue_.pop_front();
            if (at == 0) j->start = now();
            const bool give_up = j->error != 0, more = !queue_.empty();
            lock.unlock();
            if (more) work_.notify_one();
            int64_t missing = 0;
            const int error = give_up ? 0 : read(j->direct, j->plain, j->offset + at, j->into + at, n, missing);
            lock.lock();
            if (error && !j->error) j->error = error;
            j->missing += missing;
            j->done += n;
            if (j->done == j->nbytes) finish(j);
        }
    }

    void finish(Job* j) {
        done_.emplace_back(j->ticket, j->error, j->missing, j->start, now());
        any_done_.store(true, std::memory_order_release);
        jobs_.erase(jobs_.find(j->ticket));
        done_cv_.notify_all();
    }

    // One piece; 0 or an errno.
    int read(int direct, int plain, int64_t offset, uint8_t* into, int64_t n, int64_t& missing) {
        int file = direct >= 0 ? direct : plain;
        int64_t got = 0;
        while (got < n) {
            const ssize_t r = pread(file, into + got, n - got, offset + got);
            if (r > 0) {
                got += r;
            } else if (r == 0) {
                missing = n - got;
                break;
            } else if (errno == EINVAL && file == direct) {
                file = plain;  // some file systems accept the flag and refuse the read
            } else if (errno != EINTR) {
                return errno;
            }
        }
        if (file == plain) {
            plain_nbytes_ += got;
#ifdef POSIX_FADV_DONTNEED
            posix_fadvise(file, offset, got, POSIX_FADV_DONTNEED);  // it is held in a slot: not here as well
#endif
        }
        return 0;
    }

    const int64_t piece_;
    std::mutex mutex_;
    std::condition_variable work_, done_cv_;
    std::deque<Job*> queue_;  // with pieces that nobody has claimed, by their order
    std::unordered_map<int64_t, std::unique_ptr<Job>> jobs_;
    std::vector<Done> done_;
    std::vector<std::thread> workers_;
    std::atomic<bool> any_done_{false};
    std::atomic<int64_t> plain_nbytes_{0};
    int64_t next_ticket_ = 1;
    bool stop_ = false;
};

}  // namespace

NB_MODULE(_page_reader, m) {
    nb::class_<PageReader>(m, "PageReader")
        .def(nb::init<int, int64_t>(), nb::arg("threads"), nb::arg("piece_nbytes"))
        .def("submit", &PageReader::submit)
        .def("promote", &PageReader::promote)
        .def("cancel", &PageReader::cancel)
        .def("finished", &PageReader::finished)
        .def("read_rows", &PageReader::read_rows)
        .def("stop", &PageReader::stop, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("in_flight", &PageReader::in_flight)
        .def_prop_ro("plain_nbytes", &PageReader::plain_nbytes);
}
