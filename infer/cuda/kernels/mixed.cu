// Linear layers with float inputs and quantized weights on Hopper: y[T, N] = x[T, K] w[N, K]^T (sm_90a only).
//
// As wgmma.cu, weight rows are the 64 rows of a warpgroup product and tokens its columns; but the rows come from
// registers, where int4 or int8 codes have just become bf16 (Machete's arrangement: weights are packed in the order in
// which threads hold a product's first operand, so that a stage is one contiguous copy and a thread reads 16 bytes of
// codes at once). A code is exact in bf16. Sums of inputs that share a scale are kept apart until the scale is applied,
// so results are those of float32 weights. Codes of the next inputs are widened while the products before them run.
//
// With 256 tokens there are no registers for that: there weights are rounded to 16 bits once, behind their scale.
//
// K is divided between SPLIT blocks of a cluster, and a block's stages between TEAMS of warpgroups. Sums are added
// through the cluster's shared memory in a fixed order, so results repeat, and each block stores its share. Blocks begin
// at different places of their K, so that they do not all ask for the same inputs at once.
//
// Macros: X (BF16 | F16), W (INT4 | INT8), OUT (F32 | BF16 | F16 | INT8 | E4M3), TOKENS (16 .. 256, a power of two), ROWS
// (64, 128 or 256 per block), TEAMS, DEPTH (inputs per stage: 128 or 256), STAGES, SPLIT, BLOCKS (per multiprocessor),
// GROUP (inputs that share a scale: 0 for one per row, 32, 64, or 128 for 128 and its multiples), ASYM (1: zero points;
// int4), GATED (1: rows are gate then up, whole tiles of each; y = silu(gate) * up has N / 2 columns).
#include "common.cuh"
#include "mma.cuh"
#include "hopper.cuh"
#include "mixed.cuh"
#include "tiles.cuh"

constexpr int kUnit = GROUP == 32 || TOKENS == 64 ? 32 : 64, kUnits = DEPTH / kUnit;  // inputs widened at a time; per stage
constexpr int kSteps = kUnit / 16, kWords = kSteps * kBits / 4;  // products and words of codes per unit
constexpr bool kParts = GROUP != 0 && TOKENS < 256, kRounded = GROUP != 0 && !kParts;

// Many tokens take more registers than a thread has at first: a whole warpgroup then copies, and lends its own.
constexpr bool kLends = TOKENS >= 128 && kConsumers == 256;
constexpr int kProducers = kLends ? 128 : 32;
struct __align__(1024) Stage {
    u8 x[DEPTH / 64][TOKENS * 128];
    u8 w[kGroups][kTiles * kTile];
};
struct Shared {
    Stage stages[STAGES];
    float scale[STAGES][kScales][GROUP ? ROWS : 4];
    int zero[STAGES][kScales][GROUP && ASYM ? ROWS : 4];
    u64 full[STAGES], empty[STAGES];
};
static_assert(sizeof(Stage) * STAGES >= TEAMS * TOKENS * kPad * 4, "the results must fit the stages");
static_assert(kUnits % 2 == 0, "fragments alternate between two sets of registers");

// What turns a row's codes into weights: minus (magic number + 8 + zero), and where weights are rounded their scale as
// the sum of two 16-bit floats; each twice in a word.
struct Turn {
    u32 offset, scale, rest;
    DEVICE Turn(int zero, float s) : offset(int4_offset<X>(zero)), scale(pack_two<X>(s, s)) {
        float left = s - (X == BF16 ? __uint_as_float(scale << 16) : f16_to_float(u16(scale)));
        rest = pack_two<X>(left, left);
    }
    DEVICE u32 times_scale(u32 codes) const {
        if constexpr (X == BF16) return fma_bf16x2(codes, scale, fma_bf16x2(codes, rest, 0x80008000u));
        else return fma_f16x2(codes, scale, multiply_f16x2(codes, rest));
    }
};

// Unit `unit` of a stage as the first operand of products: rows g and g + 8 of the warp's sixteen.
DEVICE void widen_unit(u32 (&a)[kSteps][4], const u8* codes, int unit, int thread, const Turn& low, const Turn& high) {
    u32 words[kWords];
    constexpr int kAtOnce = kWords < 4 ? kWords : 4;
#pragma unroll
    for (int i = 0; i < kWords; i += kAtOnce) {
        int word = unit * kWords + i;
        const u8* from = codes + word / 4 * kTile + thread * 16 + word % 4 * 4;
        if constexpr (kAtOnce == 4) *(uint4*)(words + i) = *(const uint4*)from;
        else *(uint2*)(words + i) = *(const uint2*)from;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            if constexpr (W == INT4) a[s][p] = widen_int4<X>(words[s], p, p % 2 ? high.offset : low.offset);
            else a[s][p] = widen<INT8, X>(words[2 * s + p % 2], p / 2 * 2, p / 2 * 2 + 1);
            if constexpr (kRounded) a[s][p] = (p % 2 ? high : low).times_scale(a[s][p]);
        }
}

KERNEL void __launch_bounds__(kConsumers + kProducers, BLOCKS)
#if SPLIT > 1
    __cluster_dims__(1, 1, SPLIT)
#endif
        linear_mixed(const __grid_constant__ TensorMap x_map, const u8* codes, const float* w_scale, const int* w_zero,
                     const float* bias, void* out, s64 out_stride, int out_column, int tokens, int rows, int group_size,
                     int groups, int slices, float out_scale, float* scale_written) {
    extern __shared__ u8 memory[];
    Shared& shared = *(Shared*)(memory + (-shared_of(memory) & 1023));
    Weight weight{codes, w_scale, w_zero, bias, rows, group_size, groups, slices};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_token = blockIdx.x * TOKENS, block = blockIdx.y;
    int rank = SPLIT > 1 ? int(blockIdx.z) : 0, begin = slices * rank / SPLIT, count = slices * (rank + 1) / SPLIT - begin;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) init_barrier(&shared.full[s], 1), init_barrier(&shared.empty[s], kGroups * 4);
        fence_barriers();
    }
    __syncthreads();
    let_successor_start();
    int turned = block * 5 % count;
    auto slice_of = [&](int i) { return begin + (i + turned < count ? i + turned : i + turned - count); };
    if (warp >= kConsumers / 32) {
        if constexpr (kLends) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == kConsumers / 32 && lane == 0) {
            u64 policy = gridDim.x == 1 ? kReadOnce : kKeep;
            auto copy_inputs = [&](int i) {
                for (int box = 0; box < DEPTH / 64; ++box)
                    copy_box(shared.stages[i % STAGES].x[box], &x_map, &shared.full[i % STAGES], slice_of(i) * DEPTH + box * 64, first_token, kKeep);
            };
            asm volatile("prefetch.tensormap [%0];" ::"l"(&x_map) : "memory");  // its first use would wait for it
            int ahead = min(count, STAGES);
            for (int i = 0; i < ahead; ++i) copy_weights(shared, weight, block, slice_of(i), i, sizeof(Stage::x), policy);
            wait_for_predecessor();
            for (int i = 0; i < ahead; ++i) copy_inputs(i);
            for (int i = ahead; i < count; ++i) {
                wait_phase(&shared.empty[i % STAGES], (i / STAGES + 1) & 1);
                copy_weights(shared, weight, block, slice_of(i), i % STAGES, sizeof(Stage::x), policy);
                copy_inputs(i);
            }
        }
        __syncwarp();
        wait_for_predecessor();
#if SPLIT > 1
        cluster_barrier();
        cluster_barrier();
#endif
        return;
    }
    if constexpr (kLends) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    int group = warp / 4 % kGroups, team = warp / 4 / kGroups, thread = threadIdx.x % 128, place = group * 64 + thread / 32 * 16 + lane / 4;
    int row_zero[2] = {};
    if constexpr (ASYM && GROUP == 0) {
        int row = tile_row(weight, block, group) + place % 64;
        row_zero[0] = w_zero[min(row, rows - 1)], row_zero[1] = w_zero[min(row + 8, rows - 1)];
    }
    float sum[TOKENS / 2], part[TOKENS / 2];
#pragma unroll
    for (int i = 0; i < TOKENS / 2; ++i) sum[i] = part[i] = 0;
    u32 a[2][kSteps][4];
    auto widen_next = [&](u32 (&to)[kSteps][4], int at, int unit) {
        int run = unit * kUnit / (GROUP ? GROUP : DEPTH), low = row_zero[0], high = row_zero[1];
        if constexpr (ASYM && GROUP != 0) low = shared.zero[at][run][place], high = shared.zero[at][run][place + 8];
        Turn turn_low(low, kRounded ? shared.scale[at][run][place] : 1.0f), turn_high(high, kRounded ? shared.scale[at][run][place + 8] : 1.0f);
        widen_unit(to, shared.stages[at].w[group], unit, thread, turn_low, turn_high);
    };
    auto apply_scales = [&](int at, int unit) {
        const float* scale = shared.scale[at][unit * kUnit / (GROUP ? GROUP : DEPTH)];
        float low = scale[place], high = scale[place + 8];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) sum[i] += part[i] * (i % 4 < 2 ? low : high);
    };
    int at = team, phase = 0;  // the stage to multiply
    auto step = [&]() {
        if ((at += TEAMS) >= STAGES) at -= STAGES, phase ^= 1;
    };
    constexpr int kEnd = kParts ? GROUP : DEPTH;  // inputs after which sums are taken out
    u32 first_inputs = u32(describe(shared.stages[0].x));
    if (team < count) {
        wait_phase(&shared.full[at], 0);
        widen_next(a[0], at, 0);
    }
    for (int i = team; i < count; i += TEAMS) {
        int own = at;
        step();
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
            u32 b = first_inputs + own * u32(sizeof(Stage) / 16) + u * kUnit / 64 * (TOKENS * 8) + u * kUnit % 64 / 8;
            begin_products();
#pragma unroll
            for (int s = 0; s < kSteps; ++s)  // 16 inputs are 32 bytes
                multiply_registers(kParts ? part : sum, a[u % 2][s], b + s * 2, !kParts || s || u * kUnit % kEnd);
            commit_products();
            wait_for_products<1>();  // the unit before has left its registers
            if (u + 1 < kUnits) {
                widen_next(a[(u + 1) % 2], own, u + 1);
            } else if (i + TEAMS < count) {
                wait_phase(&shared.full[at], phase);
                widen_next(a[0], at, 0);
            }
            if ((u + 1) * kUnit % kEnd) continue;
            wait_for_products<0>();
            if constexpr (kParts) {
#pragma unroll
                for (int j = 0; j < TOKENS / 2; ++j) asm volatile("" : "+f"(part[j])::"memory");
                apply_scales(own, u);
            }
        }
        __syncwarp();
        if (lane == 0) arrive(&shared.empty[own]);
    }
#pragma unroll
    for (int j = 0; j < TOKENS / 2; ++j) asm volatile("" : "+f"(sum[j])::"memory");
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");  // the stages are free: results go there, token by token
    float *results = (float*)shared.stages, *mine = results + team * (TOKENS * kPad);
    int column = lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < TOKENS / 8; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) mine[(n * 8 + column + c % 2) * kPad + place + c / 2 * 8] = sum[n * 4 + c];
#if SPLIT > 1
    cluster_barrier();
#else
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
#endif
    wait_for_predecessor();
    if (scale_written && blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) *scale_written = out_scale;
    store_results<TEAMS>({out, out_stride, out_column, tokens, out_scale}, weight, results, block, rank, first_token);
#if SPLIT > 1
    cluster_barrier();  // nobody leaves while others read its results
#endif
}
