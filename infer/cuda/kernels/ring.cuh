// Tiles, the ring of stages and what fills it: the part of wgmma_tiles.cu that is not arithmetic. Its macros are told there.
#include "common.cuh"
#include "hopper.cuh"

constexpr int kTokens = 128, kGroups = 2, kConsumers = kGroups * 128, kSlice = 128;
constexpr int kElement = ELEMENT == INT8 || ELEMENT == E4M3 ? 1 : 2, kSliceInputs = kSlice / kElement;
constexpr bool kScaled = kElement == 1, kCodes = OUT == INT8 || OUT == E4M3;
constexpr int kResults = GATED ? ROWS / 2 : ROWS;  // columns of a tile of y
constexpr int kOwn = kResults / SPLIT;             // of them a block finishes
constexpr bool kWide = ROWS > 224;                 // sums leave few registers: a whole group copies, and gives its own
constexpr int kCopiers = kWide ? 128 : 32;         // threads; one warp leaves room for the predecessor's last blocks
constexpr int kChunk = GATED && !kWide ? 32 : 64;  // of kOwn are finished together
constexpr int kPlaceBytes = kChunk * 2 + 16;       // of a token's chunk; padded: eight rows use different banks
constexpr int kHigh = 4096 / (kTokens * SHARE);    // tiles of a column that are computed together
constexpr int kCluster = SHARE * SPLIT;
static_assert(!GATED || SPLIT == 1, "gate and up of a result must meet");
static_assert(kCluster <= 2, "larger clusters leave multiprocessors idle");

struct __align__(1024) Stage {
    u8 w[ROWS * kSlice], x[kTokens * kSlice];
};
struct Shared {
    Stage stages[STAGES];
    u8 places[kConsumers / 32][16 * kPlaceBytes];
    float scales[kGroups][ROWS], biases[kGroups][BIAS ? ROWS : 1];
    u64 full[STAGES], empty[STAGES];
};

// Where the ring stands: `turn` says how often it went round.
struct Ring {
    int stage = 0, turn = 0;
    DEVICE void advance() {
        if (++stage == STAGES) stage = 0, ++turn;
    }
};

// The tiles of this block: numbers first, first + stride .. of `count`, which clusters take together.
struct Tiles {
    int first, stride, count, across, down;  // `down` and `across`: of a column and a row of tiles
    int sharer, part;                        // the block among those that share weights, and of those that split K
    DEVICE Tiles(int tokens, int results) {
        int rank = blockIdx.x % kCluster;
        first = blockIdx.x / kCluster, stride = gridDim.x / kCluster, sharer = rank % SHARE, part = rank / SHARE;
        down = (tokens + kTokens * SHARE - 1) / (kTokens * SHARE), across = (results + kResults - 1) / kResults, count = down * across;
    }
    DEVICE int2 place(int number) const {  // first token and first result
        int group = number / (kHigh * across), within = number % (kHigh * across), high = min(kHigh, down - group * kHigh);
        int token = group * kHigh + within % high, row = within / high;
        return make_int2((token * SHARE + sharer) * kTokens, row * kResults);
    }
};

// At the end of a tile whose K is split, all threads of both blocks come here twice: sums are there, and were read.
DEVICE void exchange_barrier() {
    if (SPLIT > 1) cluster_barrier();
}

// Copies slices begin .. begin + slices of all tiles of this block into the ring: one thread does, the others of its
// group look on.
struct Copies {
    Shared& shared;
    const TensorMap &w_map, &x_map;
    const Tiles& tiles;
    int rows, begin, slices;

    DEVICE void weights(int2 place, int slice, int s) const {
        u64 policy = tiles.down == 1 ? kReadOnce : kKeep;
        int column = (begin + slice) * kSliceInputs;
        expect_bytes(&shared.full[s], sizeof(Stage));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            u8* to = shared.stages[s].w + half * (ROWS / 2) * kSlice;
            int row = place.y + (half == 0 ? 0 : GATED ? rows / 2 : ROWS / 2);
            if (SHARE == 1) copy_box(to, &w_map, &shared.full[s], column, row, policy);
            else if (half == tiles.sharer) copy_box_to(u16(3), to, &w_map, &shared.full[s], column, row, policy);
        }
    }
    DEVICE void run(bool copies) const {
        int early = copies ? min(slices, STAGES) : 0;  // slices whose weights come before the predecessor has finished
        for (int k = 0; k < early; ++k) weights(tiles.place(tiles.first), k, k);
        wait_for_predecessor();
        Ring ring;
        for (int number = tiles.first; number < tiles.count; number += tiles.stride) {
            int2 place = tiles.place(number);
            for (int k = 0; copies && k < slices; ++k, ring.advance()) {
                if (number != tiles.first || k >= early) {
                    wait_phase(&shared.empty[ring.stage], (ring.turn + 1) & 1);
                    weights(place, k, ring.stage);
                }
                copy_box(shared.stages[ring.stage].x, &x_map, &shared.full[ring.stage], (begin + k) * kSliceInputs, place.x, kKeep);
            }
            if (SPLIT > 1) __syncwarp();
            exchange_barrier();
            exchange_barrier();
        }
        for (int s = 0; copies && SHARE > 1 && s < STAGES; ++s, ring.advance())  // nobody leaves while others may arrive here
            wait_phase(&shared.empty[ring.stage], (ring.turn + 1) & 1);
    }
};

// A warpgroup tells every block that copies into this stage that it is used up.
DEVICE void release(Shared& shared, int stage) {
    int thread = threadIdx.x % 128;
    if (SHARE == 1 && thread == 0) arrive(&shared.empty[stage]);
    if (SHARE > 1 && thread < SHARE) arrive_at(&shared.empty[stage], thread);
}
