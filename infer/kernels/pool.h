// A pool of threads that take numbered tasks from one counter. The caller works too, and does not wait for threads
// that are still asleep: on a busy machine a late thread costs nothing. Idle threads spin briefly, then sleep.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace quantbench {

class Pool {
public:
    static std::shared_ptr<Pool> shared();  // the process's pool, kept alive by whoever uses it
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return int(workers_.size()) + 1; }

    // Calls f(task) for every task in [0, tasks), on this thread alone where that is one task, or the pool is in use.
    template <class F>
    void run(int64_t tasks, F&& f) {
        std::unique_lock<std::mutex> lock(busy_, std::defer_lock);
        if (tasks <= 1 || workers_.empty() || !lock.try_lock()) {
            for (int64_t i = 0; i < tasks; ++i) f(i);
            return;
        }
        dispatch(tasks, [](void* context, int64_t i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); }, &f);
    }

private:
    using Call = void (*)(void*, int64_t);
    void dispatch(int64_t tasks, Call call, void* context);
    bool take();
    void work();

    std::mutex busy_;
    std::vector<std::thread> workers_;
    alignas(64) std::atomic<int64_t> left_{0};    // tasks nobody has taken
    alignas(64) std::atomic<int64_t> done_{0};    // tasks finished
    alignas(64) std::atomic<uint32_t> epoch_{0};  // changes with every dispatch; threads sleep on it
    std::atomic<Call> call_{nullptr};
    std::atomic<void*> context_{nullptr};
    std::atomic<bool> stop_{false};
};

int affinity_count();          // processors this process may run on
void set_threads(int threads); // replaces the pool; 1 runs everything on the caller

}  // namespace quantbench
