// Causal attention of many new tokens per sequence over its pages, read as stored (FlashAttention-2, Dao 2023, algorithm 1).
//
// A block takes 64 rows of one sequence and one query head; a warp 16 rows. Keys arrive KEYS at a time by cp.async, the
// next ones while the current are used; codes are widened to f16 in shared memory first. Probabilities go from the
// first product's result registers straight into the second product's operand registers.
//
// Macros: SIZE (head_dim, a multiple of 16), GROUP (q heads per KV head), IO (kind of q and out), CACHE (BF16 | F16 |
// INT8 | E4M3), PER_TOKEN (1: scales [pages, KV, 64], 0: [KV]), KEYS (32 | 64), STAGES (of the ring: 1 | 2).
#include "common.cuh"
#include "mma.cuh"
#include "prefill.cuh"

constexpr int kKind = CACHE == BF16 ? BF16 : F16, kWarps = 4, kRows = 64;
constexpr int kRow = SIZE * 2 + 16;                               // bytes of a padded 16-bit row: eight use different banks
constexpr int kRawRow = kCodes ? SIZE : kRow, kRaw = 2 * KEYS * kRawRow;  // a stage of the ring: keys, then values
constexpr int kSteps = SIZE / 16;

struct Cache {
    const u8 *k, *v;
    const float *k_scale, *v_scale;
    int heads, head;
};

// Keys and values of tokens first .. first + KEYS of a page into a stage; zeros for tokens at or beyond `tokens`.
DEVICE void fetch(u32 stage, const Cache& c, s64 page, int first, int tokens) {
    constexpr int kChunks = SIZE * (kCodes ? 1 : 2) / 16;
    s64 place = (page * c.heads + c.head) * kPage + first % kPage;
    for (int i = threadIdx.x; i < 2 * KEYS * kChunks; i += kWarps * 32) {
        int side = i / (KEYS * kChunks), token = i / kChunks % KEYS, chunk = i % kChunks;
        const u8* from = (side ? c.v : c.k) + ((place + token) * kChunks + chunk) * 16;
        copy_chunk(stage + (side * KEYS + token) * kRawRow + chunk * 16, from, first + token < tokens);
    }
}

// A stage of codes as f16 rows. Values with a scale per token take it here; every other scale is applied later.
DEVICE void widen_stage(u8* to, const u8* from, const Cache& c, s64 page, int first) {
    constexpr int kChunks = SIZE / 8;
    for (int i = threadIdx.x; i < 2 * KEYS * kChunks; i += kWarps * 32) {
        int token = i / kChunks, chunk = i % kChunks;  // keys are tokens 0 .. KEYS, values follow
        uint2 codes = *(const uint2*)(from + token * SIZE + chunk * 8);
        u32 wide[4] = {widen<CACHE, F16>(codes.x, 0, 1), widen<CACHE, F16>(codes.x, 2, 3), widen<CACHE, F16>(codes.y, 0, 1),
                       widen<CACHE, F16>(codes.y, 2, 3)};
        if constexpr (PER_TOKEN) {
            if (token >= KEYS) {
                float scale = c.v_scale[(page * c.heads + c.head) * kPage + (first + token - KEYS) % kPage];
#pragma unroll
                for (int w = 0; w < 4; ++w)
                    wide[w] = pack_f16(f16_to_float(u16(wide[w])) * scale, f16_to_float(u16(wide[w] >> 16)) * scale);
            }
        }
        *(uint4*)(to + token * kRow + chunk * 16) = *(uint4*)wide;
    }
}

KERNEL void __launch_bounds__(kWarps * 32)
    attention_prefill(const void* q, const int* starts, const int* context, const int* tables, int table_width, const u8* k,
                      const u8* v, const float* k_scale, const float* v_scale, int kv_heads, int window, void* out) {
    extern __shared__ __align__(128) u8 memory[];
    let_successor_start();
    wait_for_predecessor();
    int head = blockIdx.y, sequence = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int first_row = starts[sequence], rows = starts[sequence + 1] - first_row, tokens = context[sequence];
    int tile = gridDim.x - 1 - blockIdx.x;  // the longest first
    if (rows < 2 || tile * kRows >= rows) return;
    int heads = kv_heads * GROUP, position = tokens - rows + tile * kRows;  // of the block's first row
    int last = min(tokens, position + kRows);                              // keys that any of its rows sees end here
    int from = window > 0 ? max(0, position - window + 1) / KEYS * KEYS : 0;
    Cache cache{k, v, k_scale, v_scale, kv_heads, head / GROUP};
    const int* table = tables + s64(sequence) * table_width;
    u8 *queries = memory, *wide = memory + kRows * kRow, *ring = wide + (kCodes ? 2 * KEYS * kRow : 0);

    for (int i = threadIdx.x; i < kRows * (SIZE / 8); i += kWarps * 32) {
        int row = i / (SIZE / 8), chunk = i % (SIZE / 8), source = min(tile * kRows + row, rows - 1);
        float x[8];
        load_vector<IO>(q, (s64(first_row + source) * heads + head) * SIZE + chunk * 8, x);
        u32 packed[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) packed[w] = pack_two<kKind>(x[2 * w], x[2 * w + 1]);
        *(uint4*)(queries + row * kRow + chunk * 16) = *(uint4*)packed;
    }
    float o[SIZE / 8][4] = {}, top[2] = {kNone, kNone}, total[2] = {};
    float factor = rsqrtf(float(SIZE)) * 1.44269504f;
    if constexpr (kCodes && !PER_TOKEN) factor *= k_scale[head / GROUP];
    auto request = [&](int first) {
        if (first < last) fetch(shared_address(ring) + (first - from) / KEYS % STAGES * kRaw, cache, table[first / kPage], first, tokens);
        commit_copies();
    };
    for (int s = 0; s < STAGES - 1; ++s) request(from + s * KEYS);
    for (int first = from; first < last; first += KEYS) {
        __syncthreads();  // all warps have left the stage that is filled next, and the widened one
        request(first + (STAGES - 1) * KEYS);
        wait_for_copies<STAGES - 1>();
        __syncthreads();
        u8* stage = ring + (first - from) / KEYS % STAGES * kRaw;
        if constexpr (kCodes) {
            widen_stage(wide, stage, cache, table[first / kPage], first);
            stage = wide;
            __syncthreads();
        }
        u32 keys = shared_address(stage), values = keys + KEYS * kRow;
        float s[KEYS / 8][4] = {};
#pragma unroll
        for (int i = 0; i < kSteps; ++i) {
            u32 a[4];
            load_matrices(a, shared_address(queries) + (warp * 16 + lane % 16) * kRow + (i * 2 + lane / 16) * 16);
#pragma unroll
            for (int n = 0; n < KEYS / 8; n += 2) {
                u32 b[4];
                load_matrices(b, keys + (n * 8 + lane / 16 * 8 + lane % 8) * kRow + (i * 2 + lane / 8 % 2) * 16);
                mma_16bit<kKind>(s[n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_16bit<kKind>(s[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
        float highest[2] = {top[0], top[1]}, shrink[2];
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                int key = first + n * 8 + 2 * t + c % 2, own = position + warp * 16 + g + c / 2 * 8;
                bool seen = key <= own && key < tokens && (window <= 0 || key > own - window);
                float scale = factor;
                if constexpr (PER_TOKEN)
                    scale *= k_scale[(s64(table[first / kPage]) * kv_heads + head / GROUP) * kPage + key % kPage];
                s[n][c] = seen ? s[n][c] * scale : kNone;
                highest[c / 2] = fmaxf(highest[c / 2], s[n][c]);
            }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            highest[h] = over_quad_max(highest[h]);
            shrink[h] = exp2f(top[h] - highest[h]);
            top[h] = highest[h];
            total[h] *= shrink[h];
        }
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                s[n][c] = s[n][c] > kNone ? exp2f(s[n][c] - highest[c / 2]) : 0.0f;
                total[c / 2] += s[n][c];
            }
#pragma unroll
        for (int n = 0; n < SIZE / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) o[n][c] *= shrink[c / 2];
#pragma unroll
        for (int i = 0; i < KEYS / 16; ++i) {
            u32 a[4] = {pack_two<kKind>(s[2 * i][0], s[2 * i][1]), pack_two<kKind>(s[2 * i][2], s[2 * i][3]),
                        pack_two<kKind>(s[2 * i + 1][0], s[2 * i + 1][1]), pack_two<kKind>(s[2 * i + 1][2], s[2 * i + 1][3])};
#pragma unroll
            for (int n = 0; n < SIZE / 8; n += 2) {
                u32 b[4];
                load_transposed(b, values + (i * 16 + lane % 16) * kRow + (n + lane / 16) * 16);
                mma_16bit<kKind>(o[n], a[0], a[1], a[2], a[3], b[0], b[1]);
                mma_16bit<kKind>(o[n + 1], a[0], a[1], a[2], a[3], b[2], b[3]);
            }
        }
    }
    wait_for_copies<0>();
    float v_factor = kCodes && !PER_TOKEN ? v_scale[head / GROUP] : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        int row = tile * kRows + warp * 16 + g + 8 * h;
        float all = over_quad_sum(total[h]), inverse = all > 0.0f ? v_factor / all : 0.0f;
        store_row(out, (s64(first_row + row) * heads + head) * SIZE, row < rows,
                  [&](int n) { return pack_two<IO>(o[n][2 * h] * inverse, o[n][2 * h + 1] * inverse); });
    }
}
