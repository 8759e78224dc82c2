// Attention of one new token per sequence over its pages, read as stored: 16-bit floats, int8 or e4m3 codes.
//
// A block takes one KV head of one sequence, and of its pages those of one split; a warp takes 16 tokens of every page,
// which arrive in its own ring of stages by cp.async. Tokens (for scores) and head elements (for the result) are the 16
// rows of a tensor-core product, the query heads that share the KV head its 8 columns. Codes become f16 exactly and
// scales apply to scores and probabilities. Warps, and then splits (combine.cu), are joined by their maxima.
//
// FUSED: q is qkv as the linear layer left it. The block turns its own queries, and the warp that meets the new token
// puts its K and V into the cache and into its stage. Older pages are then asked for before the predecessor has
// finished: nothing that may still be running writes them or the indices (embed lets nobody start early).
//
// Macros: SIZE (head_dim, a multiple of 16), GROUP (q heads per KV head), IO (kind of q and out), CACHE (BF16 | F16 |
// INT8 | E4M3), PER_TOKEN (1: scales [pages, KV, 64], 0: [KV]), STAGES, FUSED, NORMS (1: RMS norm of q and k; FUSED).
#include "common.cuh"
#include "mma.cuh"
#include "rope.cuh"
#include "decode.cuh"

using Row = Head<32, 1>;  // a head in a warp

// Head `start` of qkv, normalized and turned.
DEVICE Row turned(const void* qkv, s64 start, const Angle<32, 1>& angle, const float* norm, double eps) {
    Row x;
    x.load(qkv, start);
    if constexpr (NORMS) x.normalize(norm, eps);
    x.rotate(angle);
    return x;
}

// Writes the new token, `row` of this warp's 16, into the cache and into the stage.
DEVICE void append(const Cache& c, const Row& k, const Row& v, s64 place, int row, u8* stage) {
    float k_scale = k.cache_scale(c.k_scale, c.head), v_scale = v.cache_scale(c.v_scale, c.head);
    k.store_cache(c.k, place * SIZE, k_scale);
    v.store_cache(c.v, place * SIZE, v_scale);
    k.store_cache(stage + row * kRow, 0, k_scale);
    v.store_cache(stage + kSide + row * kRow, 0, v_scale);
    if (PER_TOKEN && threadIdx.x % 32 == 0) {
        float* scales = (float*)(stage + 2 * kSide);
        c.k_scale[place] = scales[row] = k_scale;
        c.v_scale[place] = scales[kTokens + row] = v_scale;
    }
    __syncwarp();
}

// out: IO[rows, heads SIZE] where there is one split; else sums f32[S, splits, heads, SIZE] and their (maximum, total) in
// base 2. Sequences with more than one row are left to the prefill kernel.
KERNEL void __launch_bounds__(kWarps * 32)
    attention_decode(const void* q, const float* cosines, const float* sines, const float* q_norm, const float* k_norm,
                     double eps, const int* starts, const int* context, const int* tables, int table_width, u8* k, u8* v,
                     float* k_scale, float* v_scale, int window, void* out, float* sums, float2* parts) {
    extern __shared__ __align__(128) u8 memory[];
    let_successor_start();
    if constexpr (!FUSED) wait_for_predecessor();
    int split = blockIdx.x, kv_head = blockIdx.y, sequence = blockIdx.z, splits = gridDim.x, kv_heads = gridDim.y;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int first_row = starts[sequence], tokens = context[sequence];
    if (!FUSED && starts[sequence + 1] - first_row != 1) return;
    int from = window > 0 ? max(0, tokens - window) : 0, first_page = from / kPage, pages = (tokens + kPage - 1) / kPage;
    int each = (pages - first_page + splits - 1) / splits;
    int begin = first_page + split * each, end = min(pages, begin + each);
    Cache cache{k, v, k_scale, v_scale, kv_heads, kv_head};
    const int* table = tables + s64(sequence) * table_width;
    u8* ring = memory + warp * STAGES * kStage;
    auto request = [&](int page) {
        u32 stage = shared_address(ring + (page - begin) % STAGES * kStage);
        if (page < end) fetch(stage, cache, table[page], page * kPage + warp * kTokens, tokens);
        commit_copies();
    };
    for (int s = 0; s < STAGES - 1; ++s) request(begin + s);
    if constexpr (FUSED) wait_for_predecessor();

    s64 row = (s64(first_row) * kv_heads + kv_head) * GROUP * SIZE;  // of the result
    u32 queries[kTiles][kSteps][2];
    Row new_k, new_v;
    int newest = tokens - 1;  // the token that this step adds
    bool appends = FUSED && end == pages && newest >= 0 && newest % kPage / kTokens == warp;
    if constexpr (FUSED) {
        u16* heads = (u16*)(memory + kWarps * STAGES * kStage);
        s64 base = s64(first_row) * (GROUP + 2) * kv_heads * SIZE;
        Angle<32, 1> angle;
        angle.load(cosines, sines, max(newest, 0));
        for (int h = warp; h < GROUP; h += kWarps)
            turned(q, base + (kv_head * GROUP + h) * SIZE, angle, q_norm, eps).store<kKind>(heads, h * SIZE);
        if (appends) {
            new_k = turned(q, base + (GROUP * kv_heads + kv_head) * SIZE, angle, k_norm, eps);
            new_v.load(q, base + ((GROUP + 1) * kv_heads + kv_head) * SIZE);
        }
        __syncthreads();
        load_queries<kKind>(queries, heads, 0, lane);
    } else {
        load_queries<IO>(queries, q, row, lane);
    }
    float o[kSteps][kTiles][4] = {}, top[kTiles][2], total[kTiles][2] = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) top[n][0] = top[n][1] = kNone;
    float factor = rsqrtf(float(SIZE)) * 1.44269504f, v_top = kSmallestScale;  // PER_TOKEN: the largest of V's scales so far,
                                                                              // in whose units `o` is
    if constexpr (kCodes && !PER_TOKEN) factor *= k_scale[kv_head];

    for (int page = begin; page < end; ++page) {
        __syncwarp();  // every lane has left the stage that is filled next
        request(page + STAGES - 1);
        wait_for_copies<STAGES - 1>();
        __syncwarp();
        int first = page * kPage + warp * kTokens;
        if (first >= tokens || first + kTokens <= from) continue;
        u8* held = ring + (page - begin) % STAGES * kStage;
        u32 stage = shared_address(held);
        if (appends && page == pages - 1)
            append(cache, new_k, new_v, (s64(table[page]) * kv_heads + kv_head) * kPage + newest % kPage, newest % kTokens, held);
        float s[kTiles][4] = {}, ks[2] = {1.0f, 1.0f}, vs[2] = {1.0f, 1.0f}, v_shrink = 1.0f;
        score(s, stage, queries, lane);
        if constexpr (PER_TOKEN) {
            const float* scales = (const float*)(held + 2 * kSide);
            ks[0] = scales[g], ks[1] = scales[g + 8];
            vs[0] = first + g < tokens ? scales[kTokens + g] : 0.0f;
            vs[1] = first + g + 8 < tokens ? scales[kTokens + g + 8] : 0.0f;
            float before = v_top;
            v_top = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(fmaxf(before, fmaxf(vs[0], vs[1])))));
            v_shrink = __fdividef(before, v_top);
            vs[0] = __fdividef(vs[0], v_top), vs[1] = __fdividef(vs[1], v_top);
        }
        u32 p[kTiles][2];
        float shrink[kTiles][2];
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                int token = first + g + c / 2 * 8;
                s[n][c] = token < tokens && token >= from ? s[n][c] * (factor * ks[c / 2]) : kNone;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float highest = fmaxf(top[n][h], over_rows_max(fmaxf(s[n][h], s[n][2 + h])));
                shrink[n][h] = exp2f(top[n][h] - highest);
                top[n][h] = highest;
                s[n][h] = s[n][h] > kNone ? exp2f(s[n][h] - highest) : 0.0f;
                s[n][2 + h] = s[n][2 + h] > kNone ? exp2f(s[n][2 + h] - highest) : 0.0f;
                total[n][h] = total[n][h] * shrink[n][h] + s[n][h] + s[n][2 + h];
            }
            p[n][0] = transpose(pack_two<kKind>(s[n][0] * vs[0], s[n][1] * vs[0]));
            p[n][1] = transpose(pack_two<kKind>(s[n][2] * vs[1], s[n][3] * vs[1]));
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if constexpr (PER_TOKEN) shrink[n][h] *= v_shrink;
#pragma unroll
                for (int m = 0; m < kSteps; ++m) o[m][n][h] *= shrink[n][h], o[m][n][2 + h] *= shrink[n][h];
            }
        accumulate(o, stage + kSide, p, lane);
    }
    wait_for_copies<0>();
    __syncthreads();  // the stages are free: the warps' results go there
    float* exchange = (float*)memory;  // [warp][head][SIZE], then (maximum, total) of [warp][head]
    float2* ends = (float2*)(exchange + kWarps * kTiles * 8 * kPad);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            int place = warp * kTiles * 8 + n * 8 + 2 * t + h;
            float all = over_rows_sum(total[n][h]);
            if (g == 0) ends[place] = make_float2(top[n][h], all);
#pragma unroll
            for (int m = 0; m < kSteps; ++m) {
                exchange[place * kPad + element_of(m, g, 0)] = PER_TOKEN ? o[m][n][h] * v_top : o[m][n][h];
                exchange[place * kPad + element_of(m, g, 1)] = PER_TOKEN ? o[m][n][2 + h] * v_top : o[m][n][2 + h];
            }
        }
    __syncthreads();
    float v_factor = kCodes && !PER_TOKEN ? v_scale[kv_head] : 1.0f;
    for (int i = threadIdx.x; i < GROUP * SIZE; i += kWarps * 32) {
        int head = i / SIZE, element = i % SIZE;
        float highest = kNone, all = 0.0f, sum = 0.0f;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, ends[w * kTiles * 8 + head].x);
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            int place = w * kTiles * 8 + head;
            float share = exp2f(ends[place].x - highest);
            all += share * ends[place].y;
            sum += share * exchange[place * kPad + element];
        }
        sum *= v_factor;
        if (splits == 1) {
            store_one<IO>(out, row + i, all > 0.0f ? sum / all : 0.0f);
        } else {
            s64 place = ((s64(sequence) * splits + split) * kv_heads + kv_head) * GROUP + head;
            sums[place * SIZE + element] = sum;
            if (element == 0) parts[place] = make_float2(highest, all);
        }
    }
}
