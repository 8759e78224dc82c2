// Hopper's own instructions (sm_90a): barriers in shared memory, bulk tensor copies, clusters, warpgroup products.

typedef struct __align__(64) { u64 opaque[16]; } TensorMap;

DEVICE u32 shared_of(const void* p) { return u32(__cvta_generic_to_shared(p)); }

DEVICE void init_barrier(u64* barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_of(barrier)), "r"(arrivals) : "memory");
}
DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void expect_bytes(u64* barrier, u32 bytes) {  // arrives, and holds the phase open until so many bytes came
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_of(barrier)), "r"(bytes) : "memory");
}
DEVICE void arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_of(barrier)) : "memory");
}
DEVICE void wait_phase(u64* barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again; }" ::"r"(shared_of(barrier)), "r"(parity) : "memory");
}

// Cache policies of bulk copies: what is read once leaves first, what many blocks read stays.
constexpr u64 kReadOnce = 0x12F0000000000000ull, kKeep = 0x14F0000000000000ull;

// The box at (column, row) of a matrix into shared memory, its bytes counted by `barrier`; zeros beyond the matrix.
DEVICE void copy_box(void* to, const TensorMap* map, u64* barrier, int column, int row, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;"
        ::"r"(shared_of(to)), "l"(map), "r"(shared_of(barrier)), "r"(column), "r"(row), "l"(policy) : "memory");
}

// The same box to the same place in each block of the cluster that `blocks` has a bit for, counted by the barrier there.
DEVICE void copy_box_to(u16 blocks, void* to, const TensorMap* map, u64* barrier, int column, int row, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint "
        "[%0], [%1, {%3, %4}], [%2], %5, %6;"
        ::"r"(shared_of(to)), "l"(map), "r"(shared_of(barrier)), "r"(column), "r"(row), "h"(blocks), "l"(policy) : "memory");
}

DEVICE void arrive_at(u64* barrier, int rank) {  // the barrier at the same place in another block of the cluster
    asm volatile(
        "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(shared_of(barrier)), "r"(rank) : "memory");
}
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same without waiting for what was stored: nobody leaves while others read its shared memory. What was read must
// have arrived, that is, been used.
DEVICE void leave_together() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
DEVICE uint4 load_from_block(u32 address, int rank) {  // the same shared address in another block of the cluster
    u32 there;
    uint4 v;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(there) : "memory");
    return v;
}

// The largest over the COUNT blocks of a cluster; every thread calls, with its block's own.
template <int COUNT>
DEVICE u32 cluster_max(u32 mine) {
    __shared__ __align__(16) u32 offered[4];
    if (threadIdx.x == 0) offered[0] = mine;
    cluster_barrier();
    for (int rank = 0; rank < COUNT; ++rank) mine = max(mine, load_from_block(shared_of(offered), rank).x);
    cluster_barrier();  // nobody leaves while others read
    return mine;
}

// Descriptor of rows of 128 bytes, placed by a copy with the 128-byte swizzle; 8 rows are 1024 bytes apart.
DEVICE u64 describe(const void* p) { return u64((shared_of(p) & 0x3ffff) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62); }

DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A warpgroup gives registers back, or takes some that others gave: each of its threads has COUNT from here on (0: as before).
template <int COUNT>
DEVICE void give_registers() {
    if constexpr (COUNT > 0) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void take_registers() {
    if constexpr (COUNT > 0) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
