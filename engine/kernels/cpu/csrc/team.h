// Threads of one call. A kernel is a set of phases, plain functions of a team, so that several can
// follow each other in one parallel region with `Team::barrier` between them. A phase divides its
// work by thread index; a product's panels are taken piece by piece, at most one such phase between
// two barriers. Results do not depend on who computes what.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "vec.h"

// What -fopenmp would make of `#pragma omp parallel`, called by name: the library is linked with
// no OpenMP runtime of its own, so that these are those of the runtime that torch has loaded,
// and both share one pool of threads, whichever compiler built this.
extern "C" void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern "C" int omp_get_thread_num(void);
extern "C" int omp_get_num_threads(void);

namespace VENTURI_NAMESPACE {

constexpr int kMostThreads = 64;

// What the threads of one call share.
struct Barrier {
    alignas(64) int arrived = 0;
    alignas(64) unsigned turn = 0;
    int sleepers = 0;
    // Pieces of each thread's part of a phase that somebody has taken.
    struct alignas(64) Taken {
        int64_t count = 0;
    } taken[kMostThreads];
};

constexpr int kSpins = 4000;  // some ten microseconds

VENTURI_INLINE void sleep_while(const unsigned* word, unsigned value) {
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}
VENTURI_INLINE void wake_all(const unsigned* word) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

VENTURI_INLINE void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Team {
    int thread, threads;
    Barrier* shared;

    // The next piece of `owner`'s part of this phase. A thread that is done with its own part
    // helps the others: one that another process keeps from its core is not waited for so long.
    int64_t take(int owner) const {
        return __atomic_fetch_add(&shared->taken[owner].count, 1, __ATOMIC_RELAXED);
    }

    // Waits for all threads, and makes what they wrote visible. Spins, since phases take
    // microseconds; then sleeps: where another process has the core of a thread that is waited
    // for, that thread can move to the core that falls idle.
    void barrier() const {
        if (threads == 1) {
            shared->taken[0].count = 0;
            return;
        }
        const unsigned turn = __atomic_load_n(&shared->turn, __ATOMIC_ACQUIRE);
        if (__atomic_add_fetch(&shared->arrived, 1, __ATOMIC_ACQ_REL) == threads) {
            __atomic_store_n(&shared->arrived, 0, __ATOMIC_RELAXED);
            for (int i = 0; i < threads; ++i) shared->taken[i].count = 0;
            __atomic_store_n(&shared->turn, turn + 1, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&shared->sleepers, __ATOMIC_SEQ_CST)) wake_all(&shared->turn);
            return;
        }
        for (int spins = 0; spins < kSpins; ++spins) {
            if (__atomic_load_n(&shared->turn, __ATOMIC_ACQUIRE) != turn) return;
            relax();
        }
        __atomic_add_fetch(&shared->sleepers, 1, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&shared->turn, __ATOMIC_ACQUIRE) == turn)
            sleep_while(&shared->turn, turn);
        __atomic_sub_fetch(&shared->sleepers, 1, __ATOMIC_SEQ_CST);
    }
};

// Runs `body(team)` in `threads` threads of the OpenMP runtime, or fewer if it has no more.
template <typename Body>
static void run_team(int threads, const Body& body) {
    if (threads > kMostThreads) threads = kMostThreads;
    Barrier shared;
    if (threads <= 1) {
        body(Team{0, 1, &shared});
        return;
    }
    struct Context {
        const Body& body;
        Barrier* shared;
    } context{body, &shared};
    auto entry = [](void* data) {
        const Context& found = *static_cast<Context*>(data);
        found.body(Team{omp_get_thread_num(), omp_get_num_threads(), found.shared});
    };
    GOMP_parallel(entry, &context, (unsigned)threads, 0);
}

// Threads that pay for a product of `rows` with `weights` numbers: waking and waiting takes about
// as long as some hundred thousand products.
VENTURI_INLINE int paying_threads(int64_t threads, int64_t rows, int64_t weights) {
    const int64_t most = 1 + rows * weights / (256 << 10);
    return (int)(threads < most ? threads : most);
}

struct Range {
    int64_t begin, end;
};

// The part of `count` items that is `thread`'s: contiguous, sizes differ by 1 at most.
VENTURI_INLINE Range part(int64_t count, int thread, int threads) {
    return {count * thread / threads, count * (thread + 1) / threads};
}

VENTURI_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace VENTURI_NAMESPACE
