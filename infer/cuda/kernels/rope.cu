// RoPE, the RMS norm of q and k before it, and K and V into their pages. One warp per head of one token.
//
// Macros: SIZE (head_dim), HEADS, KV_HEADS, IO (kind of qkv and q), CACHE (kind of the pages), NORMS (1: q and k norm),
// PER_TOKEN (1: one cache scale per token and head, computed here and stored in [pages, KV, 64]; 0: given, [KV]).
#include "common.cuh"
#include "rope.cuh"

constexpr int kWarps = 8;

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
        float* scales = is_v ? v_scale : k_scale;
        float scale = cache_scale(x, scales, kv_head);
        if (PER_TOKEN && threadIdx.x % 32 == 0) scales[at] = scale;
        store_head(x, is_v ? v : k, at * SIZE, scale);
    }
}
