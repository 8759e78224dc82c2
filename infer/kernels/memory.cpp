#include "memory.h"

#include <cstdlib>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace quantbench {

namespace {

constexpr int64_t kHuge = int64_t(2) << 20;
constexpr int64_t kBlock = int64_t(16) << 20;  // shared by small weights; what is not used of it is never touched

int64_t rounded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

std::shared_ptr<void> block_of(int64_t size) {
    void* p = std::aligned_alloc(size_t(kHuge), size_t(rounded(size, kHuge)));
    if (!p) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    // whole pages only: the rest of the last one would be memory nobody uses. A refusal leaves small pages, which work.
    (void)madvise(p, size_t(size / kHuge * kHuge), MADV_HUGEPAGE);
#endif
    return {p, std::free};
}

struct Shared {
    std::mutex mutex;
    std::weak_ptr<void> block;
    int64_t used = 0;
};

}  // namespace

std::shared_ptr<void> weight_memory(int64_t size) {
#if defined(__SANITIZE_ADDRESS__)
    void* p = std::aligned_alloc(64, size_t(rounded(size, 64)));  // apart, so that reading past the end is found
    if (!p) throw std::bad_alloc();
    return {p, std::free};
#else
    if (size > kBlock / 4) return block_of(size);
    static auto* shared = new Shared;  // never destroyed: weights may outlive static destruction
    std::lock_guard lock(shared->mutex);
    size = rounded(size, 64);
    std::shared_ptr<void> block = shared->block.lock();
    if (!block || shared->used + size > kBlock) {
        block = block_of(kBlock);
        shared->block = block;
        shared->used = 0;
    }
    auto* p = static_cast<uint8_t*>(block.get()) + shared->used;
    shared->used += size;
    return {block, p};
#endif
}

}  // namespace quantbench
