// RoPE (Su et al. 2021, the halves of a head as pairs), the RMS norm of q and k before it, and K and V into their pages.
// One warp per head of one token. The order of roundings is numpy's, so that codes in the cache equal the reference's.
//
// Macros: SIZE (head_dim), HEADS, KV_HEADS, IO (kind of qkv and q), CACHE (kind of the pages), NORMS (1: q and k norm),
// PER_TOKEN (1: one cache scale per token and head, computed here and stored in [pages, KV, 64]; 0: given, [KV]).
#include "common.cuh"

constexpr int kHalf = SIZE / 2, kPairs = (kHalf + 31) / 32, kWarps = 8;

struct Head {
    float low[kPairs], high[kPairs];  // elements i and i + SIZE / 2, i = lane + 32 * pair
};

DEVICE Head load_head(const void* qkv, s64 start) {
    Head x;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        int i = threadIdx.x % 32 + 32 * p;
        x.low[p] = i < kHalf ? load_one<IO>(qkv, start + i) : 0.0f;
        x.high[p] = i < kHalf ? load_one<IO>(qkv, start + kHalf + i) : 0.0f;
    }
    return x;
}

DEVICE void normalize(Head& x, const float* weight, double eps) {
    double sum = 0;
#pragma unroll
    for (int p = 0; p < kPairs; ++p)
        sum += double(x.low[p]) * double(x.low[p]) + double(x.high[p]) * double(x.high[p]);
    float inverse = inverse_root(warp_sum(sum) / SIZE + eps);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        int i = min(int(threadIdx.x % 32) + 32 * p, kHalf - 1);
        x.low[p] = x.low[p] * inverse * weight[i];
        x.high[p] = x.high[p] * inverse * weight[kHalf + i];
    }
}

// Products and sums are rounded one by one (no fused multiply-add).
DEVICE void rotate(Head& x, const float* cosines, const float* sines) {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        int i = min(int(threadIdx.x % 32) + 32 * p, kHalf - 1);
        float a = x.low[p], b = x.high[p], c = cosines[i], s = sines[i];
        x.low[p] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
        x.high[p] = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
    }
}

DEVICE void store_cache(void* pages, s64 at, float x, float scale) {
    if constexpr (CACHE == INT8 || CACHE == E4M3) ((u8*)pages)[at] = encode<CACHE>(x, scale);
    else store_one<CACHE>(pages, at, x);
}

// `at` is the place of the token in [pages, KV, 64], in tokens.
DEVICE void store_head(const Head& x, void* pages, float* scales, s64 at, int head) {
    float scale = 1.0f;
    if constexpr (PER_TOKEN) {
        float absmax = 0.0f;
#pragma unroll
        for (int p = 0; p < kPairs; ++p) absmax = fmaxf(absmax, fmaxf(fabsf(x.low[p]), fabsf(x.high[p])));
        scale = dynamic_scale<CACHE>(warp_max(absmax));
        if (threadIdx.x % 32 == 0) scales[at] = scale;
    } else if constexpr (CACHE == INT8 || CACHE == E4M3) {
        scale = scales[head];
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        int i = threadIdx.x % 32 + 32 * p;
        if (i >= kHalf) continue;
        store_cache(pages, at * SIZE + i, x.low[p], scale);
        store_cache(pages, at * SIZE + kHalf + i, x.high[p], scale);
    }
}

// qkv IO[T, (HEADS + 2 KV) SIZE] -> q IO[T, HEADS SIZE]; cos and sin f32[positions, SIZE / 2]; a slot of -1 is not written.
KERNEL void __launch_bounds__(kWarps * 32) rope_write(const void* qkv, const int* positions, const s64* slots,
                                                      const float* cosines, const float* sines, const float* q_norm,
                                                      const float* k_norm, double eps, void* k, void* v, float* k_scale,
                                                      float* v_scale, void* q) {
    let_successor_start();
    wait_for_predecessor();
    int head = blockIdx.y * kWarps + threadIdx.x / 32;
    if (head >= HEADS + 2 * KV_HEADS) return;
    s64 token = blockIdx.x;
    Head x = load_head(qkv, (token * (HEADS + 2 * KV_HEADS) + head) * SIZE);
    s64 angle = s64(positions[token]) * kHalf, slot = slots[token];
    if (head < HEADS + KV_HEADS) {
        if constexpr (NORMS) normalize(x, head < HEADS ? q_norm : k_norm, eps);
        rotate(x, cosines + angle, sines + angle);
    }
    if (head < HEADS) {
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
            int i = threadIdx.x % 32 + 32 * p;
            if (i >= kHalf) continue;
            store_one<IO>(q, (token * HEADS + head) * SIZE + i, x.low[p]);
            store_one<IO>(q, (token * HEADS + head) * SIZE + kHalf + i, x.high[p]);
        }
    } else if (slot >= 0) {
        bool is_v = head >= HEADS + KV_HEADS;
        int kv_head = head - HEADS - (is_v ? KV_HEADS : 0);
        s64 at = (slot / kPage * KV_HEADS + kv_head) * kPage + slot % kPage;
        store_head(x, is_v ? v : k, is_v ? v_scale : k_scale, at, kv_head);
    }
}
