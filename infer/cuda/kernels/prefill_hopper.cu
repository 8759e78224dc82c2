// Causal attention of many new tokens per sequence over its pages, with Hopper's warpgroup products (sm_90a; heads of 64
// and 128). The same computation as prefill.cu (FlashAttention-2, Dao 2023, algorithm 1).
//
// A block is one warpgroup: 64 rows of one sequence and query head. Keys and values of a page lie in shared memory as
// rows of 128 bytes (64 elements), 16-byte chunks at chunk ^ (row % 8): the layout that products read, keys along K,
// values along N. Probabilities stay in registers. Two blocks share a multiprocessor: one's softmax meets the other's
// products.
//
// Macros: SIZE (64 | 128), GROUP (q heads per KV head), IO (kind of q and out), CACHE (BF16 | F16 | INT8 | E4M3),
// PER_TOKEN (1: scales [pages, KV, 64], 0: [KV]), ELEMENT (of the products: BF16 for BF16 pages, else F16).
#define TOKENS 64  // keys per product: the columns of the scores
#include "common.cuh"
#include "mma.cuh"
#include "hopper.cuh"
#include "product.cuh"

constexpr bool kCodes = CACHE == INT8 || CACHE == E4M3;
constexpr int kRows = 64, kKeys = kPage, kThreads = 128;
constexpr int kHalves = SIZE / 64, kPart = 64 * 128;                 // parts of 64 rows x 64 elements
constexpr int kSide = kHalves * kPart;                               // bytes of a page's keys, or values, as 16-bit numbers
constexpr int kStage = 2 * (kCodes ? kPage * SIZE : kSide), kStages = 2;
constexpr float kNone = -1.0e30f;

struct Cache {
    const u8 *k, *v;
    const float *k_scale, *v_scale;
    int heads, head;
};

DEVICE float exp2_fast(float x) {  // 0 below 2^-126
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Place of elements chunk * 8 .. + 8 of row `row` in a side.
DEVICE u32 place(int row, int chunk) { return chunk / 8 * kPart + row * 128 + ((chunk % 8) ^ (row % 8)) * 16; }

// A page's keys and values into a stage; zeros for tokens at or beyond `tokens`.
DEVICE void fetch(u32 stage, const Cache& c, s64 page, int first, int tokens) {
    constexpr int kChunks = SIZE * (kCodes ? 1 : 2) / 16;
    s64 from = (page * c.heads + c.head) * kPage;
    for (int i = threadIdx.x; i < 2 * kPage * kChunks; i += kThreads) {
        int side = i / (kPage * kChunks), token = i / kChunks % kPage, chunk = i % kChunks;
        u32 to = kCodes ? (side * kPage + token) * SIZE + chunk * 16 : side * kSide + place(token, chunk);
        copy_chunk(stage + to, (side ? c.v : c.k) + ((from + token) * kChunks + chunk) * 16, first + token < tokens);
    }
}

// A stage of codes as f16. Values with a scale per token take it here; every other scale is applied later.
DEVICE void widen_stage(u8* to, const u8* from, const Cache& c, s64 page) {
    constexpr int kChunks = SIZE / 8;
    for (int i = threadIdx.x; i < 2 * kPage * kChunks; i += kThreads) {
        int side = i / (kPage * kChunks), token = i / kChunks % kPage, chunk = i % kChunks;
        uint2 codes = *(const uint2*)(from + (side * kPage + token) * SIZE + chunk * 8);
        u32 wide[4] = {widen<CACHE, F16>(codes.x, 0, 1), widen<CACHE, F16>(codes.x, 2, 3), widen<CACHE, F16>(codes.y, 0, 1),
                       widen<CACHE, F16>(codes.y, 2, 3)};
        if constexpr (PER_TOKEN) {
            if (side) {
                float scale = c.v_scale[(page * c.heads + c.head) * kPage + token];
#pragma unroll
                for (int w = 0; w < 4; ++w)
                    wide[w] = pack_f16(f16_to_float(u16(wide[w])) * scale, f16_to_float(u16(wide[w] >> 16)) * scale);
            }
        }
        *(uint4*)(to + side * kSide + place(token, chunk)) = *(uint4*)wide;
    }
}

// Descriptor of values: rows of K (tokens) of 128 bytes along N, eight rows 1024 bytes apart, 64 elements further kPart.
DEVICE u64 describe_values(u32 address) {
    return u64((address & 0x3ffff) >> 4) | (u64(kPart / 16) << 16) | (64ull << 32) | (1ull << 62);
}

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
DEVICE void finish_products(float (&d)[N]) {  // after this the registers may be read
    wait_for_products<0>();
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

DEVICE float over_quad_max(float x) {  // over the lanes of one row
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

KERNEL void __launch_bounds__(kThreads, 2)
    attention_prefill(const void* q, const int* starts, const int* context, const int* tables, int table_width, const u8* k,
                      const u8* v, const float* k_scale, const float* v_scale, int kv_heads, int window, void* out) {
    extern __shared__ u8 unaligned[];
    let_successor_start();
    wait_for_predecessor();
    u8* memory = (u8*)((u64(unaligned) + 1023) & ~1023ull);
    int head = blockIdx.y, sequence = blockIdx.z, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int first_row = starts[sequence], rows = starts[sequence + 1] - first_row, tokens = context[sequence];
    int tile = gridDim.x - 1 - blockIdx.x;  // the longest first
    if (rows < 2 || tile * kRows >= rows) return;
    int heads = kv_heads * GROUP, position = tokens - rows + tile * kRows;  // of the block's first row
    int end = (min(tokens, position + kRows) + kPage - 1) / kPage;
    int begin = window > 0 ? max(0, position - window + 1) / kPage : 0;
    Cache cache{k, v, k_scale, v_scale, kv_heads, head / GROUP};
    const int* table = tables + s64(sequence) * table_width;
    u8 *queries = memory, *wide = memory + kHalves * kPart, *ring = wide + (kCodes ? 2 * kSide : 0);
    auto request = [&](int page) {
        u32 stage = shared_of(ring + (page - begin) % kStages * kStage);
        if (page < end) fetch(stage, cache, table[page], page * kPage, tokens);
        commit_copies();
    };
    request(begin);
    for (int i = threadIdx.x; i < kRows * (SIZE / 8); i += kThreads) {
        int row = i / (SIZE / 8), chunk = i % (SIZE / 8), source = min(tile * kRows + row, rows - 1);
        float x[8];
        load_vector<IO>(q, (s64(first_row + source) * heads + head) * SIZE + chunk * 8, x);
        u32 packed[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) packed[w] = pack_two<ELEMENT>(x[2 * w], x[2 * w + 1]);
        *(uint4*)(queries + place(row, chunk)) = *(uint4*)packed;
    }
    float o[SIZE / 2] = {}, top[2] = {kNone, kNone}, total[2] = {};
    float factor = rsqrtf(float(SIZE)) * 1.44269504f;
    if constexpr (kCodes && !PER_TOKEN) factor *= k_scale[head / GROUP];
    for (int page = begin; page < end; ++page) {
        __syncthreads();  // all warps have left the stage that is filled next, and the widened one
        request(page + 1);
        wait_for_copies<1>();
        u8* stage = ring + (page - begin) % kStages * kStage;
        if constexpr (kCodes) {
            __syncthreads();
            widen_stage(wide, stage, cache, table[page]);
            stage = wide;
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // what was stored is seen by products
        __syncthreads();
        float s[kKeys / 2] = {};
        begin_products();
#pragma unroll
        for (int i = 0; i < SIZE / 16; ++i) {
            int at = i / 4 * kPart + i % 4 * 32;
            product(s, describe(queries) + at / 16, describe(stage) + at / 16);
        }
        commit_products();
        finish_products(s);
        int own = position + warp * 16 + g, first = page * kPage;
        if constexpr (PER_TOKEN) {
            const float* scales = k_scale + (s64(table[page]) * kv_heads + head / GROUP) * kPage;
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) s[n * 4 + c] *= scales[n * 8 + 2 * t + c % 2];
        }
        if (first + kKeys > position + 1 || window > 0) {  // else every row sees every key
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    int key = first + n * 8 + 2 * t + c % 2, row = own + c / 2 * 8;
                    if (key > row || key >= tokens || (window > 0 && key <= row - window)) s[n * 4 + c] = kNone;
                }
        }
        float shrink[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float highest = top[h];
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n) highest = fmaxf(highest, fmaxf(s[n * 4 + 2 * h], s[n * 4 + 2 * h + 1]));
            highest = over_quad_max(highest);
            shrink[h] = exp2_fast((top[h] - highest) * factor);
            top[h] = highest;
            total[h] *= shrink[h];
            float base = highest == kNone ? 0.0f : highest * factor;  // a row that has seen nothing yet keeps zeros
#pragma unroll
            for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
                for (int c = 2 * h; c < 2 * h + 2; ++c) {
                    s[n * 4 + c] = exp2_fast(s[n * 4 + c] * factor - base);
                    total[h] += s[n * 4 + c];
                }
        }
#pragma unroll
        for (int n = 0; n < SIZE / 8; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) o[n * 4 + c] *= shrink[c / 2];
        u32 p[kKeys / 16][4];
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) p[i][j] = pack_two<ELEMENT>(s[i * 8 + j * 2], s[i * 8 + j * 2 + 1]);
        begin_products();
#pragma unroll
        for (int i = 0; i < kKeys / 16; ++i) add_values(o, p[i], describe_values(shared_of(stage + kSide) + i * 2048));
        commit_products();
        finish_products(o);
    }
    wait_for_copies<0>();
    float v_factor = kCodes && !PER_TOKEN ? v_scale[head / GROUP] : 1.0f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        total[h] += __shfl_xor_sync(~0u, total[h], 1);
        total[h] += __shfl_xor_sync(~0u, total[h], 2);
        int row = tile * kRows + warp * 16 + g + 8 * h;
        if (row >= rows) continue;
        float inverse = total[h] > 0.0f ? v_factor / total[h] : 0.0f;
        s64 at = (s64(first_row + row) * heads + head) * SIZE;
#pragma unroll
        for (int n = 0; n < SIZE / 8; ++n) {
            float low = o[n * 4 + 2 * h] * inverse, high = o[n * 4 + 2 * h + 1] * inverse;
            if constexpr (IO == F32) *(float2*)((float*)out + at + n * 8 + 2 * t) = make_float2(low, high);
            else *(u32*)((u16*)out + at + n * 8 + 2 * t) = pack_two<IO>(low, high);
        }
    }
}
