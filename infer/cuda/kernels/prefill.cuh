// What both kernels of prompt attention share.
constexpr bool kCodes = CACHE == INT8 || CACHE == E4M3;
constexpr float kNone = -1.0e30f;  // a score below every other

DEVICE float exp2_fast(float x) {  // 0 below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float over_quad_max(float x) {  // over the lanes of one row
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
DEVICE float over_quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// Stores a row at element `at` of out: lane t of its quad holds elements 8 n + 2t and + 1 of every n, which `pair` gives
// packed. Four such are exchanged at a time, so that a lane stores sixteen bytes; all lanes call, also for rows not `valid`.
template <typename F>
DEVICE void store_row(void* out, s64 at, bool valid, F pair) {
    int t = threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < SIZE / 8; n += 4) {
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) w[j] = n + j < SIZE / 8 ? pair(n + j) : 0;
#pragma unroll
        for (int step = 1; step < 4; step *= 2)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (j & step) continue;
                u32 sent = __shfl_xor_sync(~0u, t & step ? w[j] : w[j + step], step);
                if (t & step) w[j] = sent;
                else w[j + step] = sent;
            }
        if (valid && n + t < SIZE / 8) *(uint4*)((u16*)out + at + (n + t) * 8) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}
