// Linear layers of any combination of kinds and any shape: y[T, N] = x[T, K] w[N, K]^T in float32 (int32 where both are
// int8 codes with one scale per row), on ordinary arithmetic units. Slow; tensor-core kernels take the common cases.
//
// Macros: X, W (kinds), OUT (F32 | BF16 | F16), ASYM (1: zero points), EXACT (1: int32 sums, scales afterwards),
// DOUBLE (1: sums in double, and inputs of bf16 weights rounded to bf16, as the reference does).
#include "common.cuh"

constexpr int kSide = 64, kStep = 16, kEach = 4;  // a block makes 64 x 64 results, a thread 4 x 4

#ifndef DOUBLE
#define DOUBLE 0
#endif
template <bool INTEGER> struct Sum { typedef Real<DOUBLE>::type type; };
template <> struct Sum<true> { typedef int type; };
typedef Sum<EXACT != 0>::type sum_t;

DEVICE float input(const void* x, s64 at) {
    float value = load_one<X>(x, at);
    return DOUBLE && W == BF16 ? bf16_to_float(u16(pack_bf16(value, value))) : value;
}

// int4 words hold codes 0 2 4 6 1 3 5 7 of eight neighbours; the words of 128 inputs are ordered 0 4 8 12 1 5 ...
DEVICE int int4_code(const u8* row, int k) {
    int in = k % 128, place = in % 32 / 8 * 4 + in / 32, nibble = in % 2 * 4 + in % 8 / 2;
    return int((((const u32*)row)[k / 128 * 16 + place] >> (4 * nibble)) & 15u) - 8;
}

DEVICE float weight(const u8* w, s64 row_bytes, int n, int k, const float* scale, const int* zero, int rows, int group) {
    const u8* row = w + n * row_bytes;
    float code;
    if constexpr (W == INT4) code = float(int4_code(row, k));
    else code = load_one<W>(row, k);
    if constexpr (EXACT) return code;
    s64 at = s64(k / group) * rows + n;
    if constexpr (ASYM) code -= float(zero[at]);
    return scale ? code * scale[at] : code;
}

KERNEL void __launch_bounds__(256) linear_plain(const void* x, const float* x_scale, int x_step, const u8* w,
                                                const float* w_scale, const int* w_zero, const float* bias, void* out,
                                                s64 out_stride, int out_column, int tokens, int rows, int columns,
                                                s64 row_bytes, int group) {
    __shared__ float xs[kStep][kSide + 1], ws[kStep][kSide + 1];
    let_successor_start();
    wait_for_predecessor();
    int first_row = blockIdx.x * kSide, first_token = blockIdx.y * kSide;
    int r = threadIdx.x % 16, t = threadIdx.x / 16;
    sum_t sum[kEach][kEach] = {};
    for (int k0 = 0; k0 < columns; k0 += kStep) {
        for (int i = threadIdx.x; i < kSide * kStep; i += 256) {
            int k = k0 + i % kStep, n = first_row + i / kStep, token = first_token + i / kStep;
            xs[i % kStep][i / kStep] = k < columns && token < tokens ? input(x, s64(token) * columns + k) : 0.0f;
            ws[i % kStep][i / kStep] = k < columns && n < rows ? weight(w, row_bytes, n, k, w_scale, w_zero, rows, group) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < kStep; ++k)
#pragma unroll
            for (int i = 0; i < kEach; ++i)
#pragma unroll
                for (int j = 0; j < kEach; ++j) sum[i][j] += sum_t(xs[k][t + 16 * i]) * sum_t(ws[k][r + 16 * j]);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
            int token = first_token + t + 16 * i, n = first_row + r + 16 * j;
            if (token >= tokens || n >= rows) continue;
            float scale = EXACT ? w_scale[n] : 1.0f;
            if (x_scale) scale = __fmul_rn(x_scale[x_step * token], scale);
            float y = __fmul_rn(float(sum[i][j]), scale);
            if (bias) y = __fadd_rn(y, bias[n]);
            store_one<OUT>(out, token * out_stride + out_column + n, y);
        }
}

// The weight itself as bf16 [N, K], for products of many tokens: eight neighbours per thread, K a multiple of 8.
KERNEL void __launch_bounds__(256) widen_weight(const u8* w, const float* scale, const int* zero, u16* out, int rows, int columns,
                                                s64 row_bytes, int group) {
    let_successor_start();
    wait_for_predecessor();
    int n = blockIdx.y, k = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (k >= columns) return;
    float v[8];
    if constexpr (W == INT4) {
        int place = k % 32 / 8 * 4 + k % 128 / 32;
        u32 word = ((const u32*)(w + n * row_bytes))[k / 128 * 16 + place];
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = float(int((word >> (4 * (i % 2 * 4 + i / 2))) & 15u) - 8);
    } else {
        uint2 codes = *(const uint2*)(w + n * row_bytes + k);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = load_one<W>(&codes, i);
    }
    s64 at = s64(k / group) * rows + n;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        if (group % 8) at = s64((k + i) / group) * rows + n;
        if constexpr (ASYM) v[i] -= float(zero[at]);
        v[i] *= scale[at];
    }
    store_vector<BF16>(out, s64(n) * columns + k, v);
}
