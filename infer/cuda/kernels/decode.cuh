// The pieces of attention_decode: how a warp's 16 tokens of a page come into a stage, and the two products with them.
// Macros as in decode.cu.

constexpr bool kCodes = CACHE == INT8 || CACHE == E4M3;
constexpr int kKind = CACHE == BF16 ? BF16 : F16;  // of the products
constexpr int kElement = kCodes ? 1 : 2, kWarps = 4, kTokens = 16;
constexpr int kRowBytes = SIZE * kElement, kRow = kRowBytes + 16;  // padded, so that eight rows use different banks
constexpr int kSteps = SIZE / 16, kTiles = (GROUP + 7) / 8;        // products along a head; of 8 query heads
constexpr int kSide = kTokens * kRow, kStage = 2 * kSide + (PER_TOKEN ? 2 * kTokens * 4 : 0);
constexpr int kPad = SIZE + 4;
constexpr float kNone = -1.0e30f;  // a score below every other

struct Cache {
    u8 *k, *v;
    float *k_scale, *v_scale;
    int heads, head;
};

// The warp's 16 tokens of a page into a stage; zeros for tokens at or beyond `tokens`.
DEVICE void fetch(u32 stage, const Cache& c, s64 page, int first_token, int tokens) {
    int lane = threadIdx.x % 32;
    s64 place = (page * c.heads + c.head) * kPage + threadIdx.x / 32 * kTokens;
#pragma unroll
    for (int i = lane; i < 2 * kTokens * (kRowBytes / 16); i += 32) {
        int side = i / (kTokens * (kRowBytes / 16)), j = i % (kTokens * (kRowBytes / 16));
        int token = j / (kRowBytes / 16), chunk = j % (kRowBytes / 16);
        const u8* from = (side ? c.v : c.k) + (place + token) * kRowBytes + chunk * 16;
        copy_chunk(stage + side * kSide + token * kRow + chunk * 16, from, first_token + token < tokens);
    }
    if constexpr (PER_TOKEN) {
        if (lane < 8) copy_chunk(stage + 2 * kSide + lane * 16, (lane < 4 ? c.k_scale : c.v_scale) + place + lane % 4 * 4, true);
    }
}

// Register pair `step` of the queries: column g is query head tile * 8 + g, elements as the keys' registers hold them.
template <int FROM>
DEVICE void load_queries(u32 (&b)[kTiles][kSteps][2], const void* q, s64 row, int lane) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
        for (int s = 0; s < kSteps; ++s)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int head = n * 8 + lane / 4, i = s * 16 + (kCodes ? lane % 4 * 4 + half * 2 : lane % 4 * 2 + half * 8);
                float low = 0.0f, high = 0.0f;
                if (head < GROUP) {
                    low = load_one<FROM>(q, row + head * SIZE + i);
                    high = load_one<FROM>(q, row + head * SIZE + i + 1);
                }
                b[n][s][half] = pack_two<kKind>(low, high);
            }
}

// Scores of the warp's 16 tokens: s[n] holds tokens g and g + 8 (rows), heads 2t and 2t + 1 of tile n.
DEVICE void score(float (&s)[kTiles][4], u32 keys, const u32 (&q)[kTiles][kSteps][2], int lane) {
    constexpr int kTwice = kCodes ? 2 : 1;  // 16 bytes of a row are 8 or 16 elements
#pragma unroll
    for (int i = 0; i < kSteps; i += kTwice) {
        u32 r[4];
        int chunk = kCodes ? min(i + lane / 16, kSteps - 1) : i * 2 + lane / 16;
        load_matrices(r, keys + lane % 16 * kRow + chunk * 16);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            if constexpr (kCodes) {
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    if (i + j < kSteps)
                        mma_16bit<kKind>(s[n], widen<CACHE, kKind>(r[2 * j], 0, 1), widen<CACHE, kKind>(r[2 * j + 1], 0, 1),
                                         widen<CACHE, kKind>(r[2 * j], 2, 3), widen<CACHE, kKind>(r[2 * j + 1], 2, 3),
                                         q[n][i + j][0], q[n][i + j][1]);
            } else {
                mma_16bit<kKind>(s[n], r[0], r[1], r[2], r[3], q[n][i][0], q[n][i][1]);
            }
        }
    }
}

// Adds probabilities times values: o[m][n] holds elements `element_of(m, ..)` (rows), heads 2t and 2t + 1 of tile n.
DEVICE void accumulate(float (&o)[kSteps][kTiles][4], u32 values, const u32 (&p)[kTiles][2], int lane) {
    constexpr int kTwice = kCodes ? 2 : 1;
#pragma unroll
    for (int i = 0; i < kSteps; i += kTwice) {
        u32 r[4];  // codes: 16 elements x tokens 0-7, 8-15, twice; floats: tokens 0-7 x 8 elements, twice, then 8-15
        int token = kCodes ? lane % 16 : lane / 16 * 8 + lane % 8;
        int chunk = kCodes ? min(i + lane / 16, kSteps - 1) : i * 2 + lane / 8 % 2;
        load_transposed(r, values + token * kRow + chunk * 16);
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            if constexpr (kCodes) {
#pragma unroll
                for (int j = 0; j < 2; ++j)
                    if (i + j < kSteps)
                        mma_16bit<kKind>(o[i + j][n], widen<CACHE, kKind>(r[2 * j], 0, 2), widen<CACHE, kKind>(r[2 * j], 1, 3),
                                         widen<CACHE, kKind>(r[2 * j + 1], 0, 2), widen<CACHE, kKind>(r[2 * j + 1], 1, 3),
                                         p[n][0], p[n][1]);
            } else {
                mma_16bit<kKind>(o[i][n], r[0], r[1], r[2], r[3], p[n][0], p[n][1]);
            }
        }
    }
}
DEVICE int element_of(int step, int g, int second) {  // of row g, or of row g + 8
    return step * 16 + (kCodes ? 2 * g + second : g + 8 * second);
}

DEVICE float over_rows_max(float x) {  // over the lanes that hold the same heads
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}
DEVICE float over_rows_sum(float x) {
#pragma unroll
    for (int step = 4; step < 32; step <<= 1) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
