// RoPE, the RMS norm of q and k before it, and K and V into their pages. A block takes one token and holds all its heads
// in registers before it stores the first: LANES lanes per head, sixteen bytes of each half a lane where sizes allow.
//
// Macros: SIZE (head_dim), HEADS, KV_HEADS, IO (kind of qkv and q), CACHE (kind of the pages), NORMS (1: q and k norm),
// PER_TOKEN (1: one cache scale per token and head, computed here and stored in [pages, KV, 64]; 0: given, [KV]).
#include "common.cuh"
#include "rope.cuh"

DEVICE constexpr int lanes_for(int vectors) {  // a power of two, at most a warp
    int lanes = 1;
    while (lanes < vectors && lanes < 32) lanes *= 2;
    return lanes;
}
constexpr int kVector = kHalf % 8 == 0 ? 8 : kHalf % 4 == 0 ? 4 : 1, kLanes = lanes_for(kHalf / kVector);
constexpr int kThreads = 128, kTogether = kThreads / kLanes;  // heads at a time
constexpr int kAll = HEADS + 2 * KV_HEADS, kTurns = (kAll + kTogether - 1) / kTogether, kHeld = kTurns < 4 ? kTurns : 4;
using Part = Head<kLanes, kVector>;

struct Cache {
    void *k, *v;
    float *k_scale, *v_scale;
};

// Queries to q, keys and values into the token's slot, where it has one. All lanes of a warp call.
DEVICE void store(const Part& x, int head, s64 token, s64 slot, const Cache& cache, void* q) {
    bool is_v = head >= HEADS + KV_HEADS;
    int kv_head = max(head - HEADS, 0) % KV_HEADS;
    float* scales = is_v ? cache.v_scale : cache.k_scale;
    float scale = x.cache_scale(scales, kv_head);
    if (head < HEADS) {
        x.template store<IO>(q, (token * HEADS + head) * SIZE);
    } else if (head < kAll && slot >= 0) {
        s64 at = (slot / kPage * KV_HEADS + kv_head) * kPage + slot % kPage;
        if (PER_TOKEN && threadIdx.x % kLanes == 0) scales[at] = scale;
        x.store_cache(is_v ? cache.v : cache.k, at * SIZE, scale);
    }
}

// qkv IO[T, (HEADS + 2 KV) SIZE] -> q IO[T, HEADS SIZE]; cos and sin f32[positions, SIZE / 2]; a slot of -1 is not written.
KERNEL void __launch_bounds__(kThreads) rope_write(const void* qkv, const int* positions, const s64* slots,
                                                   const float* cosines, const float* sines, const float* q_norm,
                                                   const float* k_norm, double eps, void* k, void* v, float* k_scale,
                                                   float* v_scale, void* q) {
    let_successor_start();
    wait_for_predecessor();
    s64 token = blockIdx.x, slot = slots[token];
    Angle<kLanes, kVector> angle;
    angle.load(cosines, sines, positions[token]);
    Cache cache{k, v, k_scale, v_scale};
    for (int turn = 0; turn < kTurns; turn += kHeld) {
        Part held[kHeld];
        int first = turn * kTogether + threadIdx.x / kLanes;
#pragma unroll
        for (int i = 0; i < kHeld; ++i)  // beyond the last head its lanes hold the last one again: shuffles need them all
            held[i].load(qkv, (token * kAll + min(first + i * kTogether, kAll - 1)) * SIZE);
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
            int head = first + i * kTogether;
            Part& x = held[i];
            if constexpr (NORMS) x.normalize(head < HEADS ? q_norm : head < HEADS + KV_HEADS ? k_norm : nullptr, eps);
            if (head < HEADS + KV_HEADS) x.rotate(angle);
            store(x, head, token, slot, cache, q);
        }
    }
}
