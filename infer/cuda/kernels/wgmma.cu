// Linear layers of few tokens on Hopper: y[T, N] = x[T, K] w[N, K]^T with warpgroup products and bulk tensor copies (sm_90a only).
//
// Weight rows are the 64 rows of a product and tokens its columns, so that few tokens waste nothing. One warp copies
// slices of 128 bytes of K into a ring of stages, weights before the predecessor has finished (nobody writes them); each
// warpgroup multiplies 64 rows. SPLIT blocks of a cluster divide K; their sums are added through the cluster's shared
// memory in a fixed order, so results repeat, and each block stores its share.
//
// Macros: ELEMENT (INT8 | E4M3 | BF16 | F16 of x and w), OUT (F32 | BF16 | F16 | INT8 | E4M3), TOKENS (8 .. 256, a power of
// two), ROWS (64, 128 or 256 per block), STAGES, SPLIT, BLOCKS (per multiprocessor), GATED (1: rows are gate then up;
// y = silu(gate) * up has N / 2 columns).
#include "common.cuh"
#include "hopper.cuh"
#include "product.cuh"

constexpr int kGroups = ROWS / 64, kConsumers = kGroups * 128, kSlice = 128;
constexpr int kElement = ELEMENT == INT8 || ELEMENT == E4M3 ? 1 : 2, kSliceInputs = kSlice / kElement;
constexpr int kColumns = GATED ? ROWS / 2 : ROWS;  // results per token
constexpr int kPad = ROWS + 4;

struct __align__(1024) Stage {
    u8 w[ROWS * kSlice], x[TOKENS * kSlice];
};
struct Shared {
    Stage stages[STAGES];
    u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Stage) * STAGES >= TOKENS * kPad * 4, "the results must fit the stages");

// Four rows' sums of a token over the blocks of the cluster, in order of rank.
DEVICE Four gather(const sum_t* at) {
    sum_t total[4] = {};
#pragma unroll
    for (int rank = 0; rank < SPLIT; ++rank) {
        uint4 part = SPLIT == 1 ? *(const uint4*)at : load_from_block(shared_of(at), rank);
        u32 words[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if constexpr (ELEMENT == INT8) total[i] += sum_t(int(words[i]));
            else total[i] += __uint_as_float(words[i]);
        }
    }
    return {{float(total[0]), float(total[1]), float(total[2]), float(total[3])}};
}

// sum * (x_scale * w_scale) + bias, rounded one by one as the CPU does.
DEVICE void finish(Four& four, float x_scale, const float* w_scale, const float* bias, int row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (w_scale) four.v[i] = __fmul_rn(four.v[i], __fmul_rn(x_scale, w_scale[row + i]));
        if (bias) four.v[i] = __fadd_rn(four.v[i], bias[row + i]);
    }
}

KERNEL void __launch_bounds__(kConsumers + 32, BLOCKS)
#if SPLIT > 1
    __cluster_dims__(1, 1, SPLIT)
#endif
        linear_wgmma(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const float* x_scale, int x_step,
                     const float* w_scale, const float* bias, void* out, s64 out_stride, int out_column, int tokens, int rows,
                     int slices, float out_scale, float* scale_written) {
    extern __shared__ u8 memory[];
    Shared& shared = *(Shared*)(memory + (-shared_of(memory) & 1023));
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_token = blockIdx.x * TOKENS;
    int first_row = blockIdx.y * kColumns, second_row = rows / 2 + first_row, rank = SPLIT > 1 ? int(blockIdx.z) : 0;
    int begin = slices * rank / SPLIT, count = slices * (rank + 1) / SPLIT - begin;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) init_barrier(&shared.full[s], 1), init_barrier(&shared.empty[s], kGroups);
        fence_barriers();
    }
    __syncthreads();
    let_successor_start();
    if (warp == kGroups * 4) {
        if (lane == 0) {
            u64 policy = gridDim.x == 1 ? kReadOnce : kKeep;
            auto copy_weights = [&](int i) {
                Stage& stage = shared.stages[i % STAGES];
                u64* barrier = &shared.full[i % STAGES];
                expect_bytes(barrier, sizeof(Stage));
                int column = (begin + i) * kSliceInputs;
                copy_box(stage.w, &w_map, barrier, column, first_row, policy);
                if (GATED) copy_box(stage.w + kColumns * kSlice, &w_map, barrier, column, second_row, policy);
            };
            auto copy_inputs = [&](int i) {
                copy_box(shared.stages[i % STAGES].x, &x_map, &shared.full[i % STAGES], (begin + i) * kSliceInputs, first_token, kKeep);
            };
            int ahead = min(count, STAGES);
            for (int i = 0; i < ahead; ++i) copy_weights(i);
            wait_for_predecessor();
            for (int i = 0; i < ahead; ++i) copy_inputs(i);
            for (int i = ahead; i < count; ++i) {
                wait_phase(&shared.empty[i % STAGES], (i / STAGES + 1) & 1);
                copy_weights(i);
                copy_inputs(i);
            }
        }
        __syncwarp();
        wait_for_predecessor();
#if SPLIT > 1
        cluster_barrier();
        leave_together();
#endif
        return;
    }
    int group = warp / 4, thread = threadIdx.x % 128;
    sum_t sum[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sum[i] = 0;
    for (int i = 0; i < count; ++i) {
        wait_phase(&shared.full[i % STAGES], (i / STAGES) & 1);
        const Stage& stage = shared.stages[i % STAGES];
        u64 a = describe(stage.w + group * 64 * kSlice), b = describe(stage.x);
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; ++step) product(sum, a + step * 2, b + step * 2);  // 32 bytes further
        commit_products();
        wait_for_products<1>();  // the slice before is used up
        if (i > 0 && thread == 0) arrive(&shared.empty[(i - 1) % STAGES]);
    }
    wait_for_products<0>();
    take_back(sum);
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // the stages are free: results go there, token by token
    sum_t* results = (sum_t*)shared.stages;
    int row = group * 64 + thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) results[(n * 8 + column + c % 2) * kPad + row + c / 2 * 8] = sum[n * 4 + c];
#if SPLIT > 1
    cluster_barrier();
#else
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
#endif
    wait_for_predecessor();
    if (scale_written && blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) *scale_written = out_scale;
    int limit = GATED ? rows / 2 : rows;
    for (int i = rank * kConsumers + int(threadIdx.x); i < min(TOKENS, tokens - first_token) * (kColumns / 4); i += kConsumers * SPLIT) {
        int token = i / (kColumns / 4), place = i % (kColumns / 4) * 4;
        if (first_row + place >= limit) continue;
        float scale = x_scale ? x_scale[x_step * (first_token + token)] : 1.0f;
        Four four = gather(results + token * kPad + place);
        finish(four, scale, w_scale, bias, first_row + place);
        if constexpr (GATED) {
            Four up = gather(results + token * kPad + kColumns + place);
            finish(up, scale, w_scale, bias, second_row + place);
#pragma unroll
            for (int j = 0; j < 4; ++j) four.v[j] = swiglu<OUT == F32>(four.v[j], up.v[j]);
        }
        store_four<OUT>(out, (first_token + token) * out_stride + out_column + first_row + place, four, out_scale);
    }
#if SPLIT > 1
    leave_together();
#endif
}
