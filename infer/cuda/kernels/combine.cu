// Joins the splits of attention_decode: per sequence sums f32[splits, heads, SIZE] and (maximum, total) in base 2, to one
// row, quantized. PARTS blocks share a row, so that one sequence alone is not read by one multiprocessor; where the row
// needs one scale they form a cluster and agree on the largest value.
//
// Macros: HEADS, SIZE, IO (F32 | BF16 | F16), FORMAT (0: stay float, INT8, E4M3), STATIC (1: `given` is the scale), PARTS,
// THREADS (columns of a part, in whole warps).
#include "common.cuh"
#include "hopper.cuh"

constexpr int kWidth = HEADS * SIZE, kColumns = kWidth / PARTS, kGroups = 4, kFours = kColumns / 4;

struct Share {
    float top, total, sum[4];
};

// Four columns over every kGroups-th split, starting at `group`.
DEVICE Share join(const float* sums, const float2* parts, s64 first, int column, int group, int used) {
    Share share{-3.0e38f, 0.0f, {}};
#pragma unroll 4
    for (int s = group; s < used; s += kGroups) {
        s64 place = (first + s) * HEADS + column / SIZE;
        float2 part = parts[place];
        float4 four = *(const float4*)(sums + place * SIZE + column % SIZE);
        float top = fmaxf(share.top, part.x), old = exp2f(share.top - top), fresh = exp2f(part.x - top);
        share.top = top;
        share.total = share.total * old + part.y * fresh;
        share.sum[0] = share.sum[0] * old + four.x * fresh;
        share.sum[1] = share.sum[1] * old + four.y * fresh;
        share.sum[2] = share.sum[2] * old + four.z * fresh;
        share.sum[3] = share.sum[3] * old + four.w * fresh;
    }
    return share;
}

KERNEL void __launch_bounds__(THREADS)
#if FORMAT != 0 && !STATIC && PARTS > 1
    __cluster_dims__(PARTS, 1, 1)
#endif
        combine(const float* sums, const float2* parts, const int* starts, const int* context, int window, int splits,
                void* values, u8* codes, float* scales, float given, u32* bad) {
    __shared__ Share shares[kGroups][kFours];
    let_successor_start();
    wait_for_predecessor();
    int sequence = blockIdx.y, first_row = starts[sequence], tokens = context[sequence];
    if (starts[sequence + 1] - first_row != 1) return;
    int first_page = window > 0 ? max(0, tokens - window) / kPage : 0, pages = (tokens + kPage - 1) / kPage - first_page;
    int each = max(1, (pages + splits - 1) / splits), used = (pages + each - 1) / each;  // as attention_decode cut them
    int begin = blockIdx.x * kColumns, i = threadIdx.x;
    if (i < kColumns) shares[i / kFours][i % kFours] = join(sums, parts, s64(sequence) * splits, begin + i % kFours * 4, i / kFours, used);
    __syncthreads();
    float x = 0.0f;
    if (i < kColumns) {
        float top = -3.0e38f, total = 0.0f;
#pragma unroll
        for (int g = 0; g < kGroups; ++g) top = fmaxf(top, shares[g][i / 4].top);
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
            float factor = exp2f(shares[g][i / 4].top - top);
            total += shares[g][i / 4].total * factor;
            x += shares[g][i / 4].sum[i % 4] * factor;
        }
        x = total > 0.0f ? x / total : 0.0f;
    }
    s64 at = s64(first_row) * kWidth + begin + i;
    if constexpr (FORMAT == 0) {
        if (i < kColumns) store_one<IO>(values, at, x);
    } else {
        u32 top = __float_as_uint(x) & 0x7fffffffu;
        float scale = given;
        bool first = blockIdx.x == 0 && i == 0;
#if STATIC
        if (first && sequence == 0) scales[0] = given;
#else
        __shared__ u32 warps[32];
        top = block_max<THREADS>(top, warps);
#if FORMAT != 0 && PARTS > 1
        top = cluster_max<PARTS>(top);
#endif
        scale = dynamic_scale<FORMAT>(__uint_as_float(top));
        if (first) scales[sequence] = scale;
#endif
        if (top >= 0x7f800000u) atomicOr(bad, 1u);
        if (i < kColumns) codes[at] = encode<FORMAT>(x, scale);
    }
}
