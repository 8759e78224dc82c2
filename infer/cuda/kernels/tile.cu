// Linear layers for many tokens on any GPU since sm_80: y[T, N] = x[T, K] w[N, K]^T, both of one kind.
//
// A block makes 128 weight rows x TOKENS tokens. Slices of 128 bytes of K arrive by cp.async in a ring of three stages;
// 16-byte chunks are placed at chunk ^ (row % 8), so that ldmatrix finds eight rows in eight different banks.
//
// Macros: ELEMENT (INT8 | E4M3 | BF16 | F16 of x and w), OUT (F32 | BF16 | F16), TOKENS (64 | 128),
// WRAP (1: x is [T, 2K], what split_bf16 makes of float32; its second half meets the same weights again).
#include "common.cuh"
#include "mma.cuh"

constexpr int kRows = 128, kStages = 3, kSlice = 128, kWarps = 8;
constexpr int kElement = ELEMENT == INT8 || ELEMENT == E4M3 ? 1 : 2;
constexpr int kRowTiles = 2, kTokenTiles = TOKENS / 16;  // of 16 and 8, per warp: warps stand 4 (rows) x 2 (tokens)
constexpr int kStageBytes = (kRows + TOKENS) * kSlice, kPad = kRows + 4;

template <bool INTEGER> struct Sum { typedef float type; };
template <> struct Sum<true> { typedef int type; };
typedef Sum<ELEMENT == INT8>::type sum_t;

// Address of a 16-byte chunk of a row of a stage.
DEVICE u32 place(u32 base, int row, int chunk) { return base + row * kSlice + ((chunk ^ (row % 8)) * 16); }

// Slice `slice` of `count` rows into shared memory.
DEVICE void copy_rows(u32 to, const u8* from, int first, int count, int limit, s64 row_bytes, s64 byte) {
    for (int i = threadIdx.x; i < count * 8; i += kWarps * 32) {
        int row = i / 8, chunk = i % 8;
        bool valid = first + row < limit && byte + chunk * 16 < row_bytes;
        const u8* source = from + (valid ? (first + row) * row_bytes + byte + chunk * 16 : 0);
        copy_chunk(place(to, row, chunk), source, valid);
    }
}

template <class S>
DEVICE void multiply(S (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if constexpr (kElement == 1) mma_codes(c, a[0], a[1], a[2], a[3], b0, b1);
    else mma_16bit<ELEMENT>(c, a[0], a[1], a[2], a[3], b0, b1);
}

DEVICE void multiply_stage(u32 stage, int row_warp, int token_warp, sum_t (&sum)[kRowTiles][kTokenTiles][4]) {
    int lane = threadIdx.x % 32;
    u32 tokens = stage + kRows * kSlice;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
        u32 a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
            load_matrices(a[i], place(stage, row_warp * 32 + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int j = 0; j < kTokenTiles; j += 2) {
            u32 b[4];
            load_matrices(b, place(tokens, token_warp * (TOKENS / 2) + j * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < kRowTiles; ++i) {
                multiply(sum[i][j], a[i], b[0], b[1]);
                multiply(sum[i][j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

KERNEL void __launch_bounds__(kWarps * 32, 1)
    linear_tile(const u8* x, const float* x_scale, int x_step, const u8* w, const float* w_scale, const float* bias, void* out,
                s64 out_stride, int out_column, int tokens, int rows, int columns) {
    extern __shared__ __align__(128) u8 memory[];
    let_successor_start();
    wait_for_predecessor();
    int first_token = blockIdx.x * TOKENS, first_row = blockIdx.y * kRows;  // neighbours share weight rows
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_warp = warp % 4, token_warp = warp / 4;
    s64 w_bytes = s64(columns) * kElement, x_bytes = w_bytes * (WRAP ? 2 : 1);
    int half = int((w_bytes + kSlice - 1) / kSlice), slices = half * (WRAP ? 2 : 1);
    u32 base = shared_address(memory);
    auto fetch = [&](int slice) {
        if (slice < slices) {
            u32 stage = base + slice % kStages * kStageBytes;
            s64 byte = s64(slice % half) * kSlice, x_byte = byte + slice / half * w_bytes;
            copy_rows(stage, w, first_row, kRows, rows, w_bytes, byte);
            copy_rows(stage + kRows * kSlice, x, first_token, TOKENS, tokens, x_bytes, x_byte);
        }
        commit_copies();
    };
    sum_t sum[kRowTiles][kTokenTiles][4] = {};
    for (int s = 0; s < kStages - 1; ++s) fetch(s);
    for (int slice = 0; slice < slices; ++slice) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this slice is there, and all warps have left the one before it
        fetch(slice + kStages - 1);
        multiply_stage(base + slice % kStages * kStageBytes, row_warp, token_warp, sum);
    }
    wait_for_copies<0>();
    __syncthreads();
    sum_t* exchange = (sum_t*)memory;  // [tokens][rows], so that stores run along rows
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c)
                exchange[(token_warp * (TOKENS / 2) + j * 8 + lane % 4 * 2 + c % 2) * kPad + row_warp * 32 + i * 16 + lane / 4 +
                         c / 2 * 8] = sum[i][j][c];
    __syncthreads();
    for (int i = threadIdx.x; i < TOKENS * kRows; i += kWarps * 32) {
        int row = first_row + i % kRows, token = first_token + i / kRows;
        if (row >= rows || token >= tokens) continue;
        float scale = w_scale ? w_scale[row] : 1.0f;
        if (x_scale) scale = __fmul_rn(x_scale[x_step * token], scale);
        float y = __fmul_rn(float(exchange[i / kRows * kPad + i % kRows]), scale);
        if (bias) y = __fadd_rn(y, bias[row]);
        store_one<OUT>(out, token * out_stride + out_column + row, y);
    }
}
