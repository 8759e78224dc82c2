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

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Mapped, not from the heap: what the heap hands out again is memory of small pages, and slower for as long as it is used.
std::shared_ptr<void> block_of(int64_t size) {
    size_t mapped = size_t(rounded(size, kHuge) + kHuge);
    void* p = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    auto* aligned = reinterpret_cast<uint8_t*>(uintptr_t(rounded(int64_t(reinterpret_cast<uintptr_t>(p)), kHuge)));
    // whole pages only: the rest of the last one would be memory nobody uses. A refusal leaves small pages, which work.
    (void)madvise(aligned, size_t(size / kHuge * kHuge), MADV_HUGEPAGE);
    return {aligned, [p, mapped](void*) { (void)munmap(p, mapped); }};
}
#else
std::shared_ptr<void> block_of(int64_t size) {
    void* p = std::aligned_alloc(size_t(kHuge), size_t(rounded(size, kHuge)));
    if (!p) throw std::bad_alloc();
    return {p, std::free};
}
#endif

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
