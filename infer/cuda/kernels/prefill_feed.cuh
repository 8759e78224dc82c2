// The warps of prefill_hopper.cu that do not multiply: what they share with the others, the list of tiles, and how keys,
// values and queries come into shared memory. Macros as there.
constexpr int kGroups = 2, kRows = 64 * kGroups, kKeys = COLUMNS, kTokens = kRows / GROUP;  // warpgroups; rows, tokens of a tile
constexpr int kAskers = 96, kWideners = 128, kHelpers = 128 + (kCodes ? kWideners : 0), kThreads = kHelpers + kGroups * 128;
constexpr int kGiven = kCodes && !PER_TOKEN ? 64 : 56;  // registers of a thread that copies or widens
constexpr int kTaken = kCodes ? 256 - kGiven : 224;      // and of one that multiplies
constexpr int kHalves = SIZE / 64, kPages = kKeys / kPage;
constexpr int kPart = kKeys * 128, kSide = kHalves * kPart;  // bytes of a stage's keys (or values): 64 elements of each; all
constexpr int kStages = SIZE == 64 ? 4 : 2, kRaw = SIZE == 64 ? 8 : PER_TOKEN ? 3 : 4;
constexpr int kQueryPart = 64 * 128, kRawPage = kPage * SIZE + (PER_TOKEN ? kPage * 4 : 0);

struct __align__(16) Tile {
    int sequence, row, left, position;  // of the first token: its row of q, the sequence's tokens from there on, its position
    int head, last, blocks;             // KV head; the last kKeys tokens that are seen, and how many times kKeys; 0: no more
    float factor, v_factor;             // of scores, in base 2, and of results
};

struct __align__(1024) Shared {
    u8 q[2][kGroups * kHalves * kQueryPart], k[kStages][kSide], v[kStages][kSide];
    __align__(128) u8 raw[kCodes ? kRaw : 1][kCodes ? kRawPage : 128];
    float scales[2][kStages][PER_TOKEN ? kKeys : 1];  // of keys, of values
    u64 q_full[2], q_empty[2], k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
    u64 raw_full[kRaw], raw_empty[kRaw];
    Tile tiles[2];  // whose queries are in q
};
static_assert(sizeof(Shared) <= 227 << 10, "a block has a multiprocessor for itself");

struct Given {
    const void* q;
    const int* tables;
    int table_width;
    const float *k_scale, *v_scale;
    int kv_heads, window;
    void* out;
};

struct Tiles {
    const int4* list;
    int count, kv_heads, window;

    // The block's tile of a round, or false where there are no more. Rounds alternate in direction: who had the longest
    // tile of one gets the shortest of the next.
    DEVICE bool find(int round, Tile& tile) const {
        int id = round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
        if (id >= count * kv_heads) return false;
        int4 found = list[id / kv_heads];
        tile.sequence = found.x, tile.row = found.y, tile.left = found.z, tile.position = found.w;
        tile.head = id % kv_heads;
        tile.last = (tile.position + min(tile.left, kTokens) - 1) / kKeys;
        tile.blocks = tile.last + 1 - (window > 0 ? max(0, tile.position - window + 1) / kKeys : 0);
        return true;
    }
};

// Calls visit(values, i) for keys and values of a tile's blocks, newest first, in the order in which they are needed.
template <typename F>
DEVICE void in_order(int blocks, F visit) {
    for (int i = 0; i <= blocks; ++i) {
        if (i < blocks) visit(false, i);
        if (i > 0) visit(true, i - 1);
    }
}

DEVICE void fence_for_products() {  // what was stored is seen by them
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
DEVICE u32 place_of_query(int row, int chunk) {
    return (row / 64 * kHalves + chunk / 8) * kQueryPart + row % 64 * 128 + ((chunk % 8) ^ (row % 8)) * 16;
}
DEVICE void copy_bytes(void* to, const void* from, u32 bytes, u64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_of(to)),
                 "l"(from), "r"(bytes), "r"(shared_of(barrier)) : "memory");
}

// One lane: keys and values of every tile into the ring, or as codes, page by page, beside it.
DEVICE void copy_pages(Shared& shared, const Given& in, const Tiles& tiles, const TensorMap* k_map, const TensorMap* v_map) {
    Tile tile;
    int number = 0, raw = 0;
    for (int round = 0; tiles.find(round, tile); ++round) {
        const int* table = in.tables + s64(tile.sequence) * in.table_width;
        int newest = (tile.position + tile.left - 1) / kPage;
        in_order(tile.blocks, [&](bool values, int i) {
            int slot = (number + i) % kStages, use = (number + i) / kStages;
            const TensorMap* map = values ? v_map : k_map;
            u64* full = values ? &shared.v_full[slot] : &shared.k_full[slot];
            if constexpr (!kCodes) {
                wait_phase(values ? &shared.v_empty[slot] : &shared.k_empty[slot], (use + 1) & 1);
                expect_bytes(full, kSide);
            }
#pragma unroll
            for (int p = 0; p < kPages; ++p) {
                int row = (table[min((tile.last - i) * kPages + p, newest)] * in.kv_heads + tile.head) * kPage;
                if constexpr (kCodes) {
                    u8* to = shared.raw[raw % kRaw];
                    full = &shared.raw_full[raw % kRaw];
                    wait_phase(&shared.raw_empty[raw % kRaw], (raw / kRaw + 1) & 1);
                    expect_bytes(full, kRawPage);
                    copy_box(to, map, full, 0, row, kKeep);
                    if (PER_TOKEN) copy_bytes(to + kPage * SIZE, (values ? in.v_scale : in.k_scale) + row, kPage * 4, full);
                    ++raw;
                } else {
                    u8* to = values ? shared.v[slot] : shared.k[slot];
                    for (int half = 0; half < kHalves; ++half)
                        copy_box(to + half * kPart + p * kPage * 128, map, full, half * 64, row, kKeep);
                }
            }
        });
        number += tile.blocks;
    }
}

// kAskers threads: the queries of every tile, a tile ahead, as elements of the products; and what the tile is.
DEVICE void copy_queries(Shared& shared, const Given& in, const Tiles& tiles) {
    constexpr int kChunks = SIZE / 8;
    Tile tile;
    int thread = threadIdx.x - 32;
    bool found = true;
    for (int round = 0; found; ++round) {
        u8* to = shared.q[round % 2];
        found = tiles.find(round, tile);
        wait_phase(&shared.q_empty[round % 2], (round / 2 + 1) & 1);
#pragma unroll 4
        for (int i = thread; i < (found ? kRows * kChunks : 0); i += kAskers) {
            int row = i / kChunks, chunk = i % kChunks, token = tile.row + min(row / GROUP, tile.left - 1);
            s64 from = (s64(token) * in.kv_heads * GROUP + tile.head * GROUP + row % GROUP) * SIZE + chunk * 8;
            copy_chunk(shared_of(to) + place_of_query(row, chunk), (const u16*)in.q + from, true);
        }
        tile.factor = rsqrtf(float(SIZE)) * 1.44269504f, tile.v_factor = 1.0f;
        if (kCodes && !PER_TOKEN && found) tile.factor *= in.k_scale[tile.head], tile.v_factor = in.v_scale[tile.head];
        if (!found) tile.blocks = 0;
        if (thread == 0) shared.tiles[round % 2] = tile;
        commit_copies();
        wait_for_copies<0>();
        if constexpr (ELEMENT != IO) {
#pragma unroll 4
            for (int i = thread; i < (found ? kRows * kChunks : 0); i += kAskers) {
                u8* chunk = to + place_of_query(i / kChunks, i % kChunks);
                float x[8];
                load_vector<IO>(chunk, 0, x);
                store_vector<ELEMENT>(chunk, 0, x);
            }
        }
        fence_for_products();
        __syncwarp();
        if (thread % 32 == 0) arrive(&shared.q_full[round % 2]);
    }
}

// Four codes as f16.
DEVICE void widen_four(u32 (&wide)[2], u32 codes) {
    if constexpr (CACHE == INT8) {  // 1024 + (code + 128), less 1152
        codes ^= 0x80808080u;
        wide[0] = subtract_f16x2(permute_bytes(codes, 0x64646464u, 0x4140), 0x64806480u);
        wide[1] = subtract_f16x2(permute_bytes(codes, 0x64646464u, 0x4342), 0x64806480u);
    } else {
        wide[0] = e4m3x2_to_f16x2(codes), wide[1] = e4m3x2_to_f16x2(codes >> 16);
    }
}

// A page's codes as f16; zeros for tokens from `seen` on. A thread's loads are under way together.
DEVICE void widen_page(u8* to, const u8* from, int seen, int thread) {
    constexpr int kChunks = SIZE / 8, kTurns = kPage * kChunks / kWideners;
    int chunk = thread % kChunks;
    uint2 codes[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) codes[i] = *(const uint2*)(from + (i * kWideners + thread) * 8);
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
        int token = (i * kWideners + thread) / kChunks;
        u32 low[2], high[2];
        widen_four(low, token < seen ? codes[i].x : 0), widen_four(high, token < seen ? codes[i].y : 0);
        *(uint4*)(to + chunk / 8 * kPart + token * 128 + ((chunk % 8) ^ (token % 8)) * 16) = make_uint4(low[0], low[1], high[0], high[1]);
    }
}

// A warpgroup: codes into the ring, and their scales.
DEVICE void widen_pages(Shared& shared, const Tiles& tiles) {
    Tile tile;
    int number = 0, raw = 0, thread = threadIdx.x - 128;
    for (int round = 0; tiles.find(round, tile); ++round) {
        in_order(tile.blocks, [&](bool values, int i) {
            int slot = (number + i) % kStages, use = (number + i) / kStages;
            int seen = tile.position + tile.left - (tile.last - i) * kKeys;  // tokens of the block that the sequence has
            u8* to = values ? shared.v[slot] : shared.k[slot];
            wait_phase(values ? &shared.v_empty[slot] : &shared.k_empty[slot], (use + 1) & 1);
#pragma unroll
            for (int p = 0; p < kPages; ++p) {
                const u8* from = shared.raw[raw % kRaw];
                wait_phase(&shared.raw_full[raw % kRaw], raw / kRaw & 1);
                widen_page(to + p * kPage * 128, from, seen - p * kPage, thread);
                if (PER_TOKEN && thread < kPage) {
                    float scale = ((const float*)(from + kPage * SIZE))[thread];
                    shared.scales[values][slot][p * kPage + thread] = p * kPage + thread < seen ? scale : 0.0f;
                }
                __syncwarp();
                if (thread % 32 == 0) arrive(&shared.raw_empty[raw % kRaw]);
                ++raw;
            }
            fence_for_products();
            __syncwarp();
            if (thread % 32 == 0) arrive(values ? &shared.v_full[slot] : &shared.k_full[slot]);
        });
        number += tile.blocks;
    }
}

DEVICE void prepare(Shared& shared) {
    for (int i = 0; i < 2; ++i) init_barrier(&shared.q_full[i], kAskers / 32), init_barrier(&shared.q_empty[i], kGroups);
    for (int i = 0; i < kStages; ++i) {
        init_barrier(&shared.k_full[i], kCodes ? kWideners / 32 : 1), init_barrier(&shared.k_empty[i], kGroups);
        init_barrier(&shared.v_full[i], kCodes ? kWideners / 32 : 1), init_barrier(&shared.v_empty[i], kGroups);
    }
    for (int i = 0; i < kRaw; ++i) init_barrier(&shared.raw_full[i], 1), init_barrier(&shared.raw_empty[i], kWideners / 32);
    fence_barriers();
}
