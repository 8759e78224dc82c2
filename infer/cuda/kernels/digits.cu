// Linear layers with float inputs and quantized weights for a few tokens on Hopper: y[T, N] = x[T, K] w[N, K]^T.
//
// Widening codes to floats (mixed.cu) takes longer than reading them when there are few tokens. Here codes stay integers:
// a block turns its inputs into fixed point once, 23 bits of the largest of a token, as three signed digits of eight bits,
// and int8 products (mma.sync) take codes as they are: int8 bytes, or nibbles in the upper half of a byte, which are
// signed codes times 16. Digits of tokens are columns of a product: three of eight columns for one token cost nothing.
// Integer sums are exact; what is lost of an input is less than 2^-22 of the token's largest.
//
// Weights come through a ring of stages, as in mixed.cu, and are asked for before the predecessor has finished. K is
// divided between SPLIT blocks of a cluster, and a block's stages between TEAMS of four warps; sums are added in a fixed
// order, so results repeat.
//
// Macros: X (BF16 | F16), W (INT4 | INT8), OUT (F32 | BF16 | F16 | INT8 | E4M3), TOKENS (at most, 1 .. 8), ROWS (64, 128 or
// 256 per block), TEAMS, DEPTH (inputs per stage: 128 or 256), STAGES, SPLIT, BLOCKS (per multiprocessor), GROUP (inputs
// that share a scale: 0 for one per row, 32, 64, or 128 for 128 and its multiples), ASYM (1: zero points; int4), GATED
// (1: rows are gate then up, whole tiles of each; y = silu(gate) * up has N / 2 columns).
#include "common.cuh"
#include "mma.cuh"
#include "hopper.cuh"
#include "tiles.cuh"

constexpr int kDigits = 3, kProducts = (TOKENS * kDigits + 7) / 8, kDigitColumns = kProducts * 8;
constexpr int kFraction = 21;        // bits below the leading one of the largest input
constexpr int kSteps = DEPTH / 32;   // products along a stage
constexpr bool kApart = GROUP != 0;  // sums are taken out after each group
constexpr int kMagic = 0x4b400000;   // as a float 1.5 * 2^23: integers below 2^22 added to it are floats at once

struct __align__(128) Stage {
    u8 w[kGroups][kTiles * kTile];
};
struct Shared {
    Stage stages[STAGES];
    float scale[STAGES][kScales][GROUP ? ROWS : 4];
    int zero[STAGES][kScales][GROUP && ASYM ? ROWS : 4];
    u64 full[STAGES], empty[STAGES];
    u32 top[8];  // the largest magnitude of each token, as float bits
};
static_assert(sizeof(Stage) * STAGES >= (TEAMS * kDigitColumns + TOKENS) * kPad * 4, "the results must fit the stages");

// Sixteen inputs of a token as floats; zeros beyond K, which is a multiple of eight.
DEVICE void load_inputs(float (&v)[16], const void* x, int token, int k, int columns) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float eight[8] = {};
        if (k + half * 8 < columns) load_vector<X>(x, s64(token) * columns + k + half * 8, eight);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[half * 8 + i] = eight[i];
    }
}

// What an input is multiplied by to become an integer: a power of two that follows from the largest's exponent.
DEVICE int exponent_of(u32 top) { return max(int(top >> 23), kFraction + 5); }  // its unit / 16 is a float, too

// Sixteen bytes of a digit's column: digits[K / 16][columns][16], columns moved about so that eight neighbours of either
// kind lie in different banks.
DEVICE u32 place_of(int chunk, int column) { return (chunk * kDigitColumns + (column & ~7) + ((column ^ chunk) & 7)) * 16; }

// The digits of sixteen inputs, in the order in which a thread of a product holds codes: those that thread t multiplies
// are inputs 2t, 2t + 8, 2t + 1, 2t + 9 (int4) or 2t, 2t + 1, 2t + 8, 2t + 9 (int8).
DEVICE void store_digits(u8* digits, const float (&v)[16], float multiplier, int chunk, int token) {
    u32 words[kDigits][4];
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        u32 u[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            int k = 2 * t + (W == INT4 ? j / 2 + j % 2 * 8 : j % 2 + j / 2 * 8);
            u[j] = u32(__float2int_rn(v[k] * multiplier) + 0x808080);  // digits are its bytes less 128
        }
        u32 low = permute_bytes(u[0], u[1], 0x5140), high = permute_bytes(u[2], u[3], 0x5140);
        words[0][t] = permute_bytes(low, high, 0x5410) ^ 0x80808080u;
        words[1][t] = permute_bytes(low, high, 0x7632) ^ 0x80808080u;
        words[2][t] = permute_bytes(permute_bytes(u[0], u[1], 0x6262), permute_bytes(u[2], u[3], 0x6262), 0x5410) ^ 0x80808080u;
    }
#pragma unroll
    for (int d = 0; d < kDigits; ++d)
        *(uint4*)(digits + place_of(chunk, token * kDigits + d)) = make_uint4(words[d][0], words[d][1], words[d][2], words[d][3]);
}

DEVICE void consumers_meet() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

// All consumers: inputs first .. first + count of every token as digits.
DEVICE void prepare_inputs(Shared& shared, u8* digits, const void* x, int first_token, int tokens, int first, int count, int columns) {
    int chunks = count / 16;
    for (int i = threadIdx.x; i < tokens * chunks; i += kConsumers) {
        float v[16];
        load_inputs(v, x, first_token + i / chunks, first + i % chunks * 16, columns);
        u32 top = 0;
#pragma unroll
        for (int j = 0; j < 16; ++j) top = max(top, __float_as_uint(v[j]) & 0x7fffffffu);
        u32 eight = 0xffu << (threadIdx.x & 24);  // threads of one token: `count` is a multiple of 128
#pragma unroll
        for (int step = 4; step; step >>= 1) top = max(top, __shfl_xor_sync(eight, top, step));
        if (threadIdx.x % 8 == 0) atomicMax(&shared.top[i / chunks], top);
    }
    consumers_meet();
    for (int i = threadIdx.x; i < tokens * chunks; i += kConsumers) {
        float v[16];
        load_inputs(v, x, first_token + i / chunks, first + i % chunks * 16, columns);
        float multiplier = __uint_as_float(u32(254 + kFraction - exponent_of(shared.top[i / chunks])) << 23);
        store_digits(digits, v, multiplier, i % chunks, i / chunks);
    }
    consumers_meet();
}

// The codes of 32 inputs of rows g and g + 8, as bytes. int4: `words` are two, and bytes are codes times 16.
DEVICE void take_codes(u32 (&a)[4], const u32* words) {
    if constexpr (W == INT8) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = words[i];
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            asm("lop3.b32 %0, %1, 0xf0f0f0f0, %2, 0x6a;" : "=r"(a[2 * i]) : "r"(words[i] << 4), "r"(0x80808080u));
            asm("lop3.b32 %0, %1, 0xf0f0f0f0, %2, 0x6a;" : "=r"(a[2 * i + 1]) : "r"(words[i]), "r"(0x80808080u));
        }
    }
}

typedef int Sums[kProducts][4];

// What a group adds: sums less zero points, times scales.
DEVICE void apply_scales(float (&sum)[kProducts][4], const Sums& part, const Sums& inputs, const Shared& shared, int at, int run, int place) {
    float low = shared.scale[at][run][place], high = shared.scale[at][run][place + 8];
    int low_zero = 0, high_zero = 0;
    if constexpr (ASYM) low_zero = 16 * shared.zero[at][run][place], high_zero = 16 * shared.zero[at][run][place + 8];
#pragma unroll
    for (int n = 0; n < kProducts; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            float value;
            if constexpr (ASYM) value = float(part[n][c] - (c < 2 ? low_zero : high_zero) * inputs[n][c % 2]);
            else value = __int_as_float(part[n][c]) - __int_as_float(kMagic);
            sum[n][c] += value * (c < 2 ? low : high);
        }
}

KERNEL void __launch_bounds__(kConsumers + 32, BLOCKS)
#if SPLIT > 1
    __cluster_dims__(1, 1, SPLIT)
#endif
        linear_digits(const void* x, const u8* codes, const float* w_scale, const int* w_zero, const float* bias, void* out,
                      s64 out_stride, int out_column, int tokens, int rows, int columns, int group_size, int groups,
                      int slices, float out_scale, float* scale_written) {
    extern __shared__ __align__(128) u8 memory[];
    Shared& shared = *(Shared*)memory;
    u8* digits = memory + (sizeof(Shared) + 127) / 128 * 128;
    Weight weight{codes, w_scale, w_zero, bias, rows, group_size, groups, slices};
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_token = blockIdx.x * TOKENS, block = blockIdx.y;
    int rank = SPLIT > 1 ? int(blockIdx.z) : 0, begin = slices * rank / SPLIT, count = slices * (rank + 1) / SPLIT - begin;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) init_barrier(&shared.full[s], 1), init_barrier(&shared.empty[s], kGroups * 4);
        fence_barriers();
    }
    if (threadIdx.x < 8) shared.top[threadIdx.x] = 0;
    __syncthreads();
    let_successor_start();
    if (warp == kConsumers / 32) {
        if (lane == 0) {
            for (int i = 0; i < count; ++i) {
                if (i >= STAGES) wait_phase(&shared.empty[i % STAGES], (i / STAGES + 1) & 1);
                copy_weights(shared, weight, block, begin + i, i % STAGES, 0, kReadOnce);
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
    int group = warp / 4 % kGroups, team = warp / 4 / kGroups, thread = threadIdx.x % 128;
    int place = group * 64 + thread / 32 * 16 + lane / 4;
    wait_for_predecessor();
    prepare_inputs(shared, digits, x, first_token, min(TOKENS, tokens - first_token), begin * DEPTH, count * DEPTH, columns);
    float sum[kProducts][4] = {};
    Sums part, inputs;
    auto start = [&](int value) {
#pragma unroll
        for (int n = 0; n < kProducts; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) part[n][c] = value, inputs[n][c] = 0;
    };
    constexpr int kStart = kApart && !ASYM ? kMagic : 0;
    start(kStart);
    int at = team, phase = 0;
    for (int i = team; i < count; i += TEAMS) {
        wait_phase(&shared.full[at], phase);
        u32 words[4];
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            constexpr int kEach = W == INT4 ? 2 : 1;  // products per 16 bytes of codes
            if (s % kEach == 0) *(uint4*)words = *(const uint4*)(shared.stages[at].w[group] + s / kEach * kTile + thread * 16);
            u32 a[4], ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
            take_codes(a, words + s % kEach * 2);
#pragma unroll
            for (int n = 0; n < kProducts; ++n) {
                int chunk = i * (DEPTH / 16) + s * 2 + lane / 8 % 2;
                u32 b0, b1;
                load_two_matrices(b0, b1, shared_of(digits) + place_of(chunk, n * 8 + lane % 8));
                mma_codes(part[n], a[0], a[1], a[2], a[3], b0, b1);
                if constexpr (ASYM) mma_codes(inputs[n], ones[0], ones[1], ones[2], ones[3], b0, b1);
            }
            if (kApart && (s + 1) * 32 % (GROUP ? GROUP : DEPTH) == 0) {
                apply_scales(sum, part, inputs, shared, at, s * 32 / (GROUP ? GROUP : DEPTH), place);
                start(kStart);
            }
        }
        __syncwarp();
        if (lane == 0) arrive(&shared.empty[at]);
        if ((at += TEAMS) >= STAGES) at -= STAGES, phase ^= 1;
    }
    int low_zero = 0, high_zero = 0;
    if constexpr (ASYM && !kApart) {
        int row = tile_row(weight, block, group) + place % 64;
        low_zero = 16 * w_zero[min(row, rows - 1)], high_zero = 16 * w_zero[min(row + 8, rows - 1)];
    }
    consumers_meet();  // the stages are free: sums go there, column by column
    float* results = (float*)shared.stages;  // [TOKENS][kPad], behind them the columns of the teams
    float* mine = results + (TOKENS + team * kDigitColumns) * kPad;
#pragma unroll
    for (int n = 0; n < kProducts; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            int column = n * 8 + lane % 4 * 2 + c % 2, token = min(column / kDigits, TOKENS - 1), exponent = exponent_of(shared.top[token]);
            float unit = __uint_as_float(u32(exponent - kFraction + column % kDigits * 8 - (W == INT4 ? 4 : 0)) << 23);
            float value = kApart ? sum[n][c] : float(part[n][c] - (ASYM ? (c < 2 ? low_zero : high_zero) * inputs[n][c % 2] : 0));
            mine[column * kPad + place + c / 2 * 8] = value * unit;
        }
    consumers_meet();
    for (int i = threadIdx.x; i < TOKENS * ROWS; i += kConsumers) {
        int token = i / ROWS, row = i % ROWS;
        float total = 0.0f;
#pragma unroll
        for (int t = 0; t < TEAMS; ++t)
#pragma unroll
            for (int d = 0; d < kDigits; ++d) total += results[(TOKENS + t * kDigitColumns + token * kDigits + d) * kPad + row];
        results[token * kPad + row] = total;
    }
#if SPLIT > 1
    cluster_barrier();
#else
    consumers_meet();
#endif
    if (scale_written && blockIdx.x + blockIdx.y + blockIdx.z + threadIdx.x == 0) *scale_written = out_scale;
    store_results<1>({out, out_stride, out_column, tokens, out_scale}, weight, results, block, rank, first_token);
#if SPLIT > 1
    cluster_barrier();  // nobody leaves while others read its results
#endif
}
