#include <cstdlib>
#include <new>

#include "kernels.h"

namespace ciuic {

// Pieces are chained; after a call that needed several, the next reset replaces them by one that holds everything.
struct Arena::Piece {
    Piece* next;
    size_t nbytes;
};

namespace {
constexpr size_t kHeader = 64;
constexpr size_t kSmallest = size_t(1) << 20;
}  // namespace

Arena::~Arena() {
    while (first_) {
        Piece* next = first_->next;
        std::free(first_);
        first_ = next;
    }
}

void Arena::reset() {
    used_ = 0;
    if (!first_ || !first_->next) return;
    const size_t all = total_;
    while (first_) {
        Piece* next = first_->next;
        std::free(first_);
        first_ = next;
    }
    total_ = 0;
    take(all);
    used_ = 0;
}

void* Arena::take(size_t nbytes) {
    nbytes = (nbytes + 63) / 64 * 64;
    if (!first_ || used_ + nbytes > first_->nbytes) {
        const size_t size = (nbytes > kSmallest ? nbytes : kSmallest) + kHeader;
        Piece* piece = static_cast<Piece*>(std::aligned_alloc(64, size));
        if (!piece) throw std::bad_alloc();
        piece->next = first_;
        piece->nbytes = size - kHeader;
        first_ = piece;
        total_ += piece->nbytes;
        used_ = 0;
    }
    char* at = reinterpret_cast<char*>(first_) + kHeader + used_;
    used_ += nbytes;
    return at;
}

}  // namespace ciuic
