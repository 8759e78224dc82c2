// What mixed.cu and digits.cu share: how tiles of codes and their scales come into a ring of stages, and how sums become
// results. Macros as there.
//
// A tile is 64 rows x 256 / bits inputs, 16 bytes for each of 128 threads (mixed.py); `codes` is [N / 64][K / inputs of a
// tile] tiles, scales and zero points are [K / group, N].

constexpr int kGroups = ROWS / 64, kConsumers = kGroups * TEAMS * 128, kBits = W == INT4 ? 4 : 8;
constexpr int kTile = 2048, kTileInputs = 256 / kBits, kTiles = DEPTH / kTileInputs;  // per stage and 64 rows
constexpr int kScales = GROUP ? DEPTH / GROUP : 1;                                    // per row and stage
constexpr int kColumns = GATED ? ROWS / 2 : ROWS;                                     // results per token
constexpr int kPad = ROWS + 4;
static_assert(STAGES % TEAMS == 0, "a stage always has the same team: a barrier tells only two fillings apart");

struct Weight {
    const u8* codes;
    const float* scale;
    const int* zero;
    const float* bias;
    int rows, group, groups, slices;  // inputs per scale, scales of a row, slices of DEPTH inputs
};

// Bytes of global memory, both ends and the size aligned to 16, counted by `barrier`.
DEVICE void copy_bytes(void* to, const void* from, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
        ::"r"(shared_of(to)), "l"(from), "r"(bytes), "r"(shared_of(barrier)), "l"(policy) : "memory");
}

// First weight row of the block's 64 rows `group`; tiles beyond the last row repeat the last tile.
DEVICE int tile_row(const Weight& w, int block, int group) {
    int row = GATED ? (group < kGroups / 2 ? block * kColumns + group * 64 : w.rows / 2 + block * kColumns + (group - kGroups / 2) * 64)
                    : block * ROWS + group * 64;
    return min(row, (w.rows - 1) / 64 * 64);
}

// Codes and scales of `slice` into stage `at`, whose barrier expects `others` bytes besides.
template <class SHARED>
DEVICE void copy_weights(SHARED& shared, const Weight& w, int block, int slice, int at, u32 others, u64 policy) {
    u64* barrier = &shared.full[at];
    u32 bytes = others + kGroups * kTiles * kTile;
    if constexpr (GROUP != 0) {
        for (int g = 0; g < kGroups; ++g) bytes += min(64, w.rows - tile_row(w, block, g)) * 4 * kScales * (ASYM ? 2 : 1);
    }
    expect_bytes(barrier, bytes);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
        int row = tile_row(w, block, g);
        const u8* from = w.codes + (s64(row / 64) * w.slices + slice) * (kTiles * kTile);
        copy_bytes(shared.stages[at].w[g], from, kTiles * kTile, barrier, policy);
        if constexpr (GROUP != 0) {
            u32 count = min(64, w.rows - row) * 4;
#pragma unroll
            for (int s = 0; s < kScales; ++s) {
                s64 place = s64(min((slice * DEPTH + s * GROUP) / w.group, w.groups - 1)) * w.rows + row;
                copy_bytes(&shared.scale[at][s][g * 64], w.scale + place, count, barrier, policy);
                if constexpr (ASYM) copy_bytes(&shared.zero[at][s][g * 64], w.zero + place, count, barrier, policy);
            }
        }
    }
}

// Four rows' sums of a token over the blocks of the cluster, and PARTS of each `step` floats apart, in that order.
template <int PARTS>
DEVICE Four gather(const float* first, int step) {
    Four total{};
#pragma unroll
    for (int i = 0; i < SPLIT * PARTS; ++i) {
        const float* at = first + i % PARTS * step;
        uint4 part = SPLIT == 1 ? *(const uint4*)at : load_from_block(shared_of(at), i / PARTS);
        total.v[0] += __uint_as_float(part.x), total.v[1] += __uint_as_float(part.y);
        total.v[2] += __uint_as_float(part.z), total.v[3] += __uint_as_float(part.w);
    }
    return total;
}

DEVICE void finish(Four& four, const Weight& w, int row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (GROUP == 0) four.v[i] = __fmul_rn(four.v[i], w.scale[row + i]);
        if (w.bias) four.v[i] = __fadd_rn(four.v[i], w.bias[row + i]);
    }
}

struct Output {
    void* y;
    s64 stride;
    int column, tokens;
    float scale;
};

// The block's share of the results of `tokens` tokens, their sums as results[PARTS][TOKENS][kPad] in every block.
template <int PARTS>
DEVICE void store_results(const Output& out, const Weight& w, const float* results, int block, int rank, int first_token) {
    int limit = GATED ? w.rows / 2 : w.rows, first_row = block * kColumns, tokens = min(TOKENS, out.tokens - first_token);
    for (int i = rank * kConsumers + int(threadIdx.x); i < tokens * (kColumns / 4); i += kConsumers * SPLIT) {
        int token = i / (kColumns / 4), from = i % (kColumns / 4) * 4;
        if (first_row + from >= limit) continue;
        Four four = gather<PARTS>(results + token * kPad + from, TOKENS * kPad);
        finish(four, w, first_row + from);
        if constexpr (GATED) {
            Four up = gather<PARTS>(results + token * kPad + kColumns + from, TOKENS * kPad);
            finish(up, w, w.rows / 2 + first_row + from);
#pragma unroll
            for (int j = 0; j < 4; ++j) four.v[j] = swiglu<OUT == F32>(four.v[j], up.v[j]);
        }
        store_four<OUT>(out.y, (first_token + token) * out.stride + out.column + first_row + from, four, out.scale);
    }
}
