// Causal softmax attention over the pages in float32, for any head size: what the tensor-core kernels are checked with,
// and what runs where activations are float32. One block per row of q and head; each warp takes every fourth run of keys.
//
// Macros: SIZE (head_dim), GROUP (q heads per KV head), IO (kind of q and out), CACHE (kind of the pages), PER_TOKEN
// (1: scales are [pages, KV, 64]; 0: [KV]), DOUBLE (1: the sums in double and the pages
// as the reference reads them).
#include "common.cuh"

typedef Real<DOUBLE>::type real;

constexpr int kWarps = 4, kRun = 4, kEach = (SIZE + 31) / 32;  // keys taken together; elements of a head per lane

constexpr real kNone = -3.0e38f;

struct Softmax {
    real top, total, sum[kEach];  // of a warp: largest score so far, sum of exponentials, weighted sum of values
};

DEVICE int sequence_of(const int* starts, int sequences, int row) {  // the last that starts at or before the row
    int low = 0, high = sequences - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (starts[middle] <= row) low = middle;
        else high = middle - 1;
    }
    return low;
}

// An element of a page; DOUBLE takes its scale here, rounded to float, as the reference reads a page.
DEVICE real element(const void* pages, s64 at, int i, float scale) {
    if (i >= SIZE) return 0;
    float code = load_one<CACHE>(pages, at * SIZE + i);
    return DOUBLE ? __fmul_rn(code, scale) : code;
}
DEVICE real exponential(real x) {
    if constexpr (DOUBLE) return exp(x);
    else return expf(x);
}

KERNEL void __launch_bounds__(kWarps * 32) attention_plain(const void* q, const int* starts, const int* context,
                                                           const int* tables, int sequences, int table_width,
                                                           const void* k, const void* v, const float* k_scale,
                                                           const float* v_scale, int kv_heads, int window, void* out) {
    __shared__ real tops[kWarps], totals[kWarps], sums[kWarps][SIZE];
    let_successor_start();
    wait_for_predecessor();
    int row = blockIdx.x, head = blockIdx.y, kv_head = head / GROUP, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int sequence = sequence_of(starts, sequences, row);
    int last = context[sequence] - starts[sequence + 1] + row;  // the position of this row: the last key it sees
    int first = window > 0 ? max(0, last - window + 1) : 0;
    s64 at = (s64(row) * kv_heads * GROUP + head) * SIZE;
    real x[kEach], factor = DOUBLE ? 1.0 : rsqrtf(float(SIZE));
    Softmax s{kNone, 0, {}};
#pragma unroll
    for (int e = 0; e < kEach; ++e) x[e] = lane + 32 * e < SIZE ? load_one<IO>(q, at + lane + 32 * e) * factor : 0;
    for (int key0 = first + warp * kRun; key0 <= last; key0 += kWarps * kRun) {
        real score[kRun];
        s64 place[kRun];
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
            int key = min(key0 + r, last), page = tables[s64(sequence) * table_width + key / kPage];
            place[r] = (s64(page) * kv_heads + kv_head) * kPage + key % kPage;
            score[r] = 0;
            float scale = k_scale[PER_TOKEN ? place[r] : kv_head];
#pragma unroll
            for (int e = 0; e < kEach; ++e) score[r] += x[e] * element(k, place[r], lane + 32 * e, scale);
        }
#pragma unroll
        for (int step = 16; step; step >>= 1)
#pragma unroll
            for (int r = 0; r < kRun; ++r) score[r] += __shfl_xor_sync(~0u, score[r], step);
        real top = s.top;
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
            real unit = DOUBLE ? 1 / sqrt(double(SIZE)) : k_scale[PER_TOKEN ? place[r] : kv_head];
            score[r] = key0 + r <= last ? score[r] * unit : kNone;
            top = max(top, score[r]);
        }
        real old = exponential(s.top - top);
        s.top = top;
        s.total *= old;
#pragma unroll
        for (int e = 0; e < kEach; ++e) s.sum[e] *= old;
#pragma unroll
        for (int r = 0; r < kRun; ++r) {
            if (key0 + r > last) continue;
            float scale = v_scale[PER_TOKEN ? place[r] : kv_head];
            real weight = exponential(score[r] - top), scaled = DOUBLE ? weight : weight * scale;
            s.total += weight;
#pragma unroll
            for (int e = 0; e < kEach; ++e) s.sum[e] += scaled * element(v, place[r], lane + 32 * e, scale);
        }
    }
    if (lane == 0) tops[warp] = s.top, totals[warp] = s.total;
#pragma unroll
    for (int e = 0; e < kEach; ++e)
        if (lane + 32 * e < SIZE) sums[warp][lane + 32 * e] = s.sum[e];
    __syncthreads();
    for (int i = threadIdx.x; i < SIZE; i += kWarps * 32) {
        real top = tops[0], total = 0, sum = 0;
        for (int w = 1; w < kWarps; ++w) top = max(top, tops[w]);
        for (int w = 0; w < kWarps; ++w) {
            real share = exponential(tops[w] - top);
            total += totals[w] * share;
            sum += sums[w][i] * share;
        }
        store_one<IO>(out, at + i, context[sequence] > 0 ? float(sum / total) : 0.0f);
    }
}
