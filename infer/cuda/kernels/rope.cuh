// One head of one token in a warp: element pairs (i, i + SIZE / 2), the RMS norm of q and k, RoPE (Su et al. 2021, the
// halves of a head as pairs). The order of roundings is numpy's, so that codes in the cache equal the reference's.

constexpr int kHalf = SIZE / 2, kPairs = (kHalf + 31) / 32;

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

// The scale of a head on its way into the cache: given, or computed of its own values (PER_TOKEN); 1 for floats. A head
// with a NaN or an infinity has scale NaN, so that whoever reads it finds out.
DEVICE float cache_scale(const Head& x, const float* scales, int head) {
    if constexpr (PER_TOKEN) {
        u32 top = 0;  // of magnitudes as bits: those of NaN and infinity are above every number's
#pragma unroll
        for (int p = 0; p < kPairs; ++p)
            top = max(top, max(__float_as_uint(fabsf(x.low[p])), __float_as_uint(fabsf(x.high[p]))));
        top = __reduce_max_sync(~0u, top);
        return top >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : dynamic_scale<CACHE>(__uint_as_float(top));
    } else if constexpr (CACHE == INT8 || CACHE == E4M3) {
        return scales[head];
    }
    return 1.0f;
}

DEVICE void store_head(const Head& x, void* pages, s64 start, float scale) {  // at element `start`
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
        int i = threadIdx.x % 32 + 32 * p;
        if (i >= kHalf) continue;
        store_cache(pages, start + i, x.low[p], scale);
        store_cache(pages, start + kHalf + i, x.high[p], scale);
    }
}
