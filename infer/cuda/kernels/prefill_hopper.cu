// Causal attention of many new tokens per sequence over its pages with Hopper's own instructions (sm_90a; heads of 64 and
// 128), after FlashAttention-3 (Shah et al. 2024, sections 3.1 and 3.2): copies, products and softmax run side by side.
//
// A tile is 128 rows: some tokens of a sequence, each with the query heads that share a KV head. A block stays on its
// multiprocessor and takes tile after tile of a list, the longest first. One of its warps copies keys and values (TMA, 128
// tokens at a time, from the newest to the oldest) into a ring, three the queries of the next tile; codes (INT8, E4M3) land
// beside the ring, and a warpgroup widens them into it as f16, once for all rows. Two warpgroups multiply, 64 rows each:
// they issue the scores of the next keys, then the sums with the last probabilities, and do their softmax meanwhile.
//
// Shared memory holds rows of 128 bytes (64 elements), 16-byte chunks at chunk ^ (row % 8), as products read them: queries
// and keys along K, values along N. Probabilities stay in registers.
//
// Macros: SIZE (64 | 128), GROUP (q heads per KV head, at most 64), IO (kind of q and out, 16 bits), CACHE (BF16 | F16 |
// INT8 | E4M3), PER_TOKEN (1: scales [pages, KV, 64], 0: [KV]), ELEMENT (of the products: BF16 for BF16 pages, else F16).
#define COLUMNS 128
#include "common.cuh"
#include "mma.cuh"
#include "hopper.cuh"
#include "product.cuh"
#include "prefill.cuh"
#include "prefill_feed.cuh"

#if ELEMENT == 1
#define FLOATS "bf16.bf16"
#else
#define FLOATS "f16.f16"
#endif
// o += a b: 64 rows of probabilities (registers) by 16 tokens' values, given along N.
DEVICE void add_values(float (&o)[SIZE / 2], const u32 (&a)[4], u64 b) {
#if SIZE == 128
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." FLOATS " {" LIST_64
                 "}, {%64, %65, %66, %67}, %68, add, 1, 1, 1; }"
                 : HELD_64("+f", o, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
    asm volatile("{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." FLOATS " {" LIST_32
                 "}, {%32, %33, %34, %35}, %36, add, 1, 1, 1; }"
                 : HELD_32("+f", o, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}
template <int N>
DEVICE void hold(float (&d)[N]) {  // what a wait made ready is read after it
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Issues s = q k^T for 64 rows.
DEVICE void issue_scores(float (&s)[kKeys / 2], const u8* q, const u8* k) {
    begin_products();
#pragma unroll
    for (int i = 0; i < SIZE / 16; ++i)
        product(s, describe(q) + (i / 4 * kQueryPart + i % 4 * 32) / 16, describe(k) + (i / 4 * kPart + i % 4 * 32) / 16, i > 0);
    commit_products();
}

// Issues o += p v. Rows of K (tokens) are 128 bytes along N, eight rows 1024 bytes apart, 64 elements further kPart.
DEVICE void issue_sums(float (&o)[SIZE / 2], const u32 (&p)[kKeys / 16][4], const u8* v) {
    u64 b = u64((shared_of(v) & 0x3ffff) >> 4) | (u64(kPart / 16) << 16) | (64ull << 32) | (1ull << 62);
    begin_products();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) add_values(o, p[i], b + i * (16 * 128 / 16));
    commit_products();
}

// What a warpgroup of those that multiply keeps of its 64 rows: a lane has two, eight apart.
struct Softmax {
    float top[2], total[2], shrink[2];
    float highest;  // scale of values (PER_TOKEN): sums are of values less it

    DEVICE void begin() { top[0] = top[1] = kNone, total[0] = total[1] = 0.0f, highest = 0.0f; }

    // Scores to probabilities less a common factor, by which what was summed before has to shrink. False: by none.
    DEVICE bool soften(float (&s)[kKeys / 2], float factor) {
        float seen[2] = {top[0], top[1]};
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h) seen[h] = fmaxf(seen[h], fmaxf(s[n * 4 + 2 * h], s[n * 4 + 2 * h + 1]));
        seen[0] = over_quad_max(seen[0]), seen[1] = over_quad_max(seen[1]);
        bool grown = __any_sync(~0u, fmaxf(seen[0] - top[0], seen[1] - top[1]) * factor > 8.0f);  // probabilities reach 2^8
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            shrink[h] = grown ? exp2_fast((top[h] - seen[h]) * factor) : 1.0f;
            if (grown) top[h] = seen[h];
            float base = top[h] == kNone ? 0.0f : top[h] * factor, sum = 0.0f;  // a row that has seen nothing yet keeps zeros
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; ++c) sum += s[n * 4 + c] = exp2_fast(fmaf(s[n * 4 + c], factor, -base));
            total[h] = total[h] * shrink[h] + sum;
        }
        return grown;
    }
};

// Scores of keys that a row does not see become kNone. Most blocks of keys are seen by all rows.
DEVICE void hide(float (&s)[kKeys / 2], const Tile& tile, int row, int first, int window) {
    int t = threadIdx.x % 4;
    if (first + kKeys > tile.position + 1) {
        int last[2] = {tile.position + row / GROUP - first - 2 * t, tile.position + (row + 8) / GROUP - first - 2 * t};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i)
            if (i / 4 * 8 + i % 2 > last[i / 2 % 2]) s[i] = kNone;
    }
    if (window > 0 && first <= tile.position + kTokens - 1 - window) {
        int before = tile.position - window - first - 2 * t, last[2] = {before + row / GROUP, before + (row + 8) / GROUP};
#pragma unroll
        for (int i = 0; i < kKeys / 2; ++i)
            if (i / 4 * 8 + i % 2 <= last[i / 2 % 2]) s[i] = kNone;
    }
}

template <int N>
DEVICE void scale_columns(float (&s)[N], const float* scales, float factor) {  // scales of kKeys columns
#pragma unroll
    for (int n = 0; n < N / 4; ++n) {
        float2 two = *(const float2*)(scales + n * 8 + threadIdx.x % 4 * 2);
        s[n * 4] *= two.x * factor, s[n * 4 + 1] *= two.y * factor, s[n * 4 + 2] *= two.x * factor, s[n * 4 + 3] *= two.y * factor;
    }
}

DEVICE void pack_probabilities(u32 (&p)[kKeys / 16][4], const float (&s)[kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) p[i][j] = pack_two<ELEMENT>(s[i * 8 + j * 2], s[i * 8 + j * 2 + 1]);
}

// Sums over probabilities to results, stored.
DEVICE void write(const float (&o)[SIZE / 2], const Given& in, const Tile& tile, int row, const float (&totals)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float total = over_quad_sum(totals[h]), inverse = total > 0.0f ? tile.v_factor / total : 0.0f;
        int own = row + 8 * h, token = own / GROUP;
        s64 at = (s64(tile.row + token) * in.kv_heads * GROUP + tile.head * GROUP + own % GROUP) * SIZE;
        store_row(in.out, at, token < min(tile.left, kTokens), [&](int n) {
            return pack_two<IO>(o[n * 4 + 2 * h] * inverse, o[n * 4 + 2 * h + 1] * inverse);
        });
    }
}

DEVICE void release(u64* barrier) {  // by a warpgroup
    if (threadIdx.x % 128 == 0) arrive(barrier);
}

// Probabilities take the scales of their tokens' values, less the highest so far.
DEVICE void scale_probabilities(float (&s)[kKeys / 2], Softmax& softmax, const float* scales) {
    float found = softmax.highest;
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
        float2 two = *(const float2*)(scales + n * 8 + threadIdx.x % 4 * 2);
        found = fmaxf(found, fmaxf(two.x, two.y));
    }
    found = fmaxf(over_quad_max(found), kSmallestScale);
    float less = softmax.highest / found;
    softmax.shrink[0] *= less, softmax.shrink[1] *= less, softmax.highest = found;
    scale_columns(s, scales, 1.0f / found);
}

// One warpgroup: 64 rows of every tile. The scores of the next block of keys are issued before the sums of this one, and its
// softmax runs while they are made.
DEVICE void read(Shared& shared, const Given& in, int group) {
    int row = group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4, number = 0;
    for (int round = 0;; ++round) {
        wait_phase(&shared.q_full[round % 2], round / 2 & 1);
        Tile tile = shared.tiles[round % 2];
        if (tile.blocks == 0) break;
        float o[SIZE / 2] = {}, s[kKeys / 2];
        u32 p[kKeys / 16][4];
        Softmax softmax;
        softmax.begin();
        for (int i = 0; i < tile.blocks; ++i, ++number) {
            int slot = number % kStages, last = (number - 1) % kStages;
            wait_phase(&shared.k_full[slot], number / kStages & 1);
            issue_scores(s, shared.q[round % 2] + group * kHalves * kQueryPart, shared.k[slot]);
            if (i > 0) {
                wait_phase(&shared.v_full[last], (number - 1) / kStages & 1);
                issue_sums(o, p, shared.v[last]);
                wait_for_products<1>();
            } else {
                wait_for_products<0>();
            }
            hold(s);
            if (PER_TOKEN) scale_columns(s, shared.scales[0][slot], 1.0f);
            release(&shared.k_empty[slot]);
            if (i + 1 == tile.blocks) release(&shared.q_empty[round % 2]);
            hide(s, tile, row, (tile.last - i) * kKeys, in.window);
            bool shrinks = softmax.soften(s, tile.factor);
            if (PER_TOKEN) {
                wait_phase(&shared.v_full[slot], number / kStages & 1);
                scale_probabilities(s, softmax, shared.scales[1][slot]);
            }
            if (i > 0) {
                wait_for_products<0>();
                hold(o);
                release(&shared.v_empty[last]);
                if (shrinks || PER_TOKEN) {
#pragma unroll
                    for (int j = 0; j < SIZE / 2; ++j) o[j] *= softmax.shrink[j / 2 % 2];
                }
            }
            pack_probabilities(p, s);
        }
        int last = (number - 1) % kStages;
        wait_phase(&shared.v_full[last], (number - 1) / kStages & 1);
        issue_sums(o, p, shared.v[last]);
        wait_for_products<0>();
        hold(o);
        release(&shared.v_empty[last]);
        if (PER_TOKEN) tile.v_factor = softmax.highest;
        write(o, in, tile, row, softmax.total);
    }
}

// tiles: (sequence, row, left, position) of each, see Tile. Sequences of one row have none: they are left to decode.cu.
KERNEL void __launch_bounds__(kThreads, 1)
    attention_prefill(const __grid_constant__ TensorMap k_map, const __grid_constant__ TensorMap v_map, const void* q,
                      const int4* tiles, int count, const int* tables, int table_width, const float* k_scale,
                      const float* v_scale, int kv_heads, int window, void* out) {
    extern __shared__ __align__(1024) u8 memory[];
    Shared& shared = *(Shared*)memory;
    if (threadIdx.x == 0) prepare(shared);
    __syncthreads();
    let_successor_start();
    wait_for_predecessor();
    Given given{q, tables, table_width, k_scale, v_scale, kv_heads, window, out};
    Tiles all{tiles, count, kv_heads, window};
    int warp = threadIdx.x / 32;
    if (warp < kHelpers / 32) {
        give_registers<kGiven>();
        if (threadIdx.x == 0) copy_pages(shared, given, all, &k_map, &v_map);
        if (warp > 0 && warp <= kAskers / 32) copy_queries(shared, given, all);
        if (kCodes && warp > 3) widen_pages(shared, all);
    } else {
        take_registers<kTaken>();
        read(shared, given, (warp - kHelpers / 32) / 4);
    }
}
