#include "pool.h"

#include <pthread.h>

#if defined(__linux__)
#include <sched.h>
#endif

namespace quantbench {

namespace {

constexpr int kSpins = 4000;  // some ten microseconds: longer than the gap between two operations of a step

struct Current {
    std::mutex mutex;
    std::shared_ptr<Pool> pool;
};

Current*& current() {
    static auto* state = new Current;  // never destroyed: threads may outlive static destruction
    return state;
}

// A forked child has the memory of the pool but none of its threads: it starts with a new one, and leaks the old.
void forget_after_fork() { current() = new Current; }

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

int affinity_count() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    int n = int(std::thread::hardware_concurrency());
    return n > 0 ? n : 1;
}

std::shared_ptr<Pool> Pool::shared() {
    static const int registered = pthread_atfork(nullptr, nullptr, forget_after_fork);
    (void)registered;
    std::lock_guard lock(current()->mutex);
    auto& pool = current()->pool;
    if (!pool) pool = std::make_shared<Pool>(affinity_count());
    return pool;
}

void set_threads(int threads) {
    auto next = std::make_shared<Pool>(threads);
    Pool::shared();
    std::lock_guard lock(current()->mutex);
    current()->pool.swap(next);
}

Pool::Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

Pool::~Pool() {
    stop_.store(true);
    epoch_.fetch_add(1);
    epoch_.notify_all();
    for (auto& worker : workers_) worker.join();
}

// The call is read after a task was taken, and a taken task keeps its dispatch alive: a thread that arrives late
// either takes a task of the present dispatch or none.
bool Pool::take() {
    int64_t left = left_.load(std::memory_order_acquire);
    while (left > 0 && !left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) {}
    if (left <= 0) return false;
    call_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), left - 1);
    done_.fetch_add(1, std::memory_order_release);
    return true;
}

void Pool::dispatch(int64_t tasks, Call call, void* context) {
    call_.store(call, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    left_.store(tasks, std::memory_order_release);
    epoch_.fetch_add(1, std::memory_order_release);
    epoch_.notify_all();
    while (take()) {}
    for (int spin = 0; done_.load(std::memory_order_acquire) != tasks; ++spin) {
        if (spin < kSpins) pause();
        else std::this_thread::yield();
    }
}

void Pool::work() {
    uint32_t seen = epoch_.load(std::memory_order_acquire);
    while (!stop_.load(std::memory_order_relaxed)) {
        while (take()) {}
        for (int spin = 0; spin < kSpins && epoch_.load(std::memory_order_acquire) == seen; ++spin) pause();
        epoch_.wait(seen, std::memory_order_acquire);  // returns at once where the epoch has moved on
        seen = epoch_.load(std::memory_order_acquire);
    }
}

}  // namespace quantbench
