// Linear layers of many tokens on Hopper: y[T, N] = x[T, K] w[N, K]^T by blocks that stay (sm_90a only).
//
// A block computes tiles of 128 tokens x ROWS weight rows, one after the other; tokens are the 64 rows of a product, weight
// rows its columns. One warp copies slices of 128 bytes of K into a ring of stages and runs ahead into the next tile while
// two warpgroups, which multiply 64 tokens each, finish their results. SHARE 2: two blocks of a cluster, neighbours in
// tokens, copy each half of the weights for both. SPLIT 2: two blocks divide K, and then the columns of the tile: each
// sends the other half of its sums through the cluster's shared memory. Tiles go by groups of 4096 tokens, so that what
// is used at the same time stays in the L2 cache. The first weights are requested before the predecessor has finished.
//
// Macros: ELEMENT (INT8 | E4M3 | BF16 | F16 of x and w), OUT (BF16 | F16 | INT8 | E4M3), ROWS (64 .. 256, as product.cuh
// has them), STAGES, SHARE, SPLIT, BIAS (1: there is one), GATED (1: rows are gate then up, half of a tile each; y =
// silu(gate) * up has N / 2 columns).
#define COLUMNS ROWS
#include "ring.cuh"
#include "product.cuh"

#if OUT == 3 || OUT == 5
typedef uint2 Eight;  // results, codes
#else
typedef uint4 Eight;
#endif
constexpr int kSent = SPLIT == 1 ? 0 : ROWS / 4;  // sums of a thread that the other block finishes
static_assert(sizeof(Stage) * STAGES >= kConsumers * kSent * 4, "they go where the stages were");

// Four 8 x 8 matrices of 16-bit elements, to the rows whose addresses the lanes give.
DEVICE void store_matrices(u32 address, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
#if ELEMENT == 3
DEVICE u32 bits_of(int sum) { return u32(sum); }
DEVICE int sum_of(u32 bits) { return int(bits); }
#else
DEVICE u32 bits_of(float sum) { return __float_as_uint(sum); }
DEVICE float sum_of(u32 bits) { return __uint_as_float(bits); }
#endif
template <int THREADS>
DEVICE void named_barrier(int name) {
    asm volatile("bar.sync %0, %1;" ::"r"(name), "n"(THREADS) : "memory");
}

// sum * (x_scale * w_scale) + bias, rounded one by one as the CPU does.
DEVICE float finish(sum_t sum, float x_scale, float w_scale, float bias) {
    float y = kScaled ? __fmul_rn(float(sum), __fmul_rn(x_scale, w_scale)) : float(sum);
    return BIAS ? __fadd_rn(y, bias) : y;
}

// What a warp needs to finish the results of its 16 tokens.
struct Finish {
    const float *scales, *biases;  // of the tile's rows
    float low, high;               // scales of the thread's two tokens
    float out_scale;

    DEVICE float2 one(const sum_t* d, int row, bool upper) const {  // two neighbours of one token
        float2 scale = kScaled ? *(const float2*)(scales + row) : make_float2(1, 1);
        float2 bias = BIAS ? *(const float2*)(biases + row) : make_float2(0, 0);
        float x = upper ? high : low;
        return make_float2(finish(d[2 * upper], x, scale.x, bias.x), finish(d[2 * upper + 1], x, scale.y, bias.y));
    }
    DEVICE float2 pair(const sum_t (&sum)[ROWS / 2], int tile, bool upper) const {  // of results 8 tile + 2 (lane % 4)
        int row = tile * 8 + threadIdx.x % 4 * 2;
        float2 y = one(sum + tile * 4, row, upper);
        if constexpr (GATED) {
            float2 up = one(sum + (tile + ROWS / 16) * 4, row + ROWS / 2, upper);
            y = make_float2(swiglu<false>(y.x, up.x), swiglu<false>(y.y, up.y));
        }
        return y;
    }
    // Two tiles of eight columns, in halves of a tile as `put` stores them: two results in a word, as codes in its lower half.
    DEVICE void make(const sum_t (&sum)[ROWS / 2], int tile, u32 (&words)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2 y = pair(sum, tile + i / 2, i % 2);
            if constexpr (kCodes) words[i] = encode<OUT>(y.x, out_scale) | u32(encode<OUT>(y.y, out_scale)) << 8;
            else words[i] = pack_two<OUT>(y.x, y.y);
        }
    }
};

// Those to the warp's place in shared memory, `column` columns into the chunk.
DEVICE void put(const u32 (&words)[4], u8* place, int column) {
    int lane = threadIdx.x % 32;
    if constexpr (kCodes) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            *(u16*)(place + (lane / 4 + i % 2 * 8) * kPlaceBytes + column + i / 2 * 8 + lane % 4 * 2) = u16(words[i]);
    } else {
        store_matrices(shared_of(place + lane % 16 * kPlaceBytes + (column + lane / 16 * 8) * 2), words[0], words[1], words[2], words[3]);
    }
}

// A chunk, eight results at a time, from the warp's place to y; `tokens` and `results`: how many there are from here.
DEVICE void store_chunk(const u8* place, u8* out, s64 stride, int width, int tokens, int results) {
    constexpr int kOne = sizeof(Eight) / 8;
#pragma unroll
    for (int i = 0; i < width / 16; ++i) {
        int piece = i * 32 + threadIdx.x % 32, token = piece / (width / 8), column = piece % (width / 8) * 8;
        if (token < tokens && column < results)
            *(Eight*)(out + (token * stride + column) * kOne) = *(const Eight*)(place + token * kPlaceBytes + column * kOne);
    }
}

// The scales and biases of a tile's rows, on their way from memory to shared memory: thread and thread + 128 of them.
struct RowFactors {
    float scales[2], biases[2];
    DEVICE RowFactors(const float* scale, const float* bias, int first, int rows, int thread) : scales{}, biases{} {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int within = thread + i * 128, row = first + within;
            if (GATED && within >= ROWS / 2) row += rows / 2 - ROWS / 2;
            if (kScaled) scales[i] = scale[min(row, rows - 1)];
            if (BIAS) biases[i] = bias[min(row, rows - 1)];
        }
    }
    DEVICE void put(Shared& shared, int group, int thread) const {
        named_barrier<128>(1 + group);  // those of the tile before were read
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int within = thread + i * 128;
            if (kScaled && within < ROWS) shared.scales[group][within] = scales[i];
            if (BIAS && within < ROWS) shared.biases[group][within] = biases[i];
        }
        named_barrier<128>(1 + group);
    }
};

// All slices of one tile for the 64 tokens of a warpgroup.
DEVICE void multiply(sum_t (&sum)[ROWS / 2], Shared& shared, Ring& ring, int slices) {
    int group = threadIdx.x / 128, before = 0;
    for (int k = 0; k < slices; ++k) {
        wait_phase(&shared.full[ring.stage], ring.turn & 1);
        const Stage& stage = shared.stages[ring.stage];
        u64 a = describe(stage.x + group * 64 * kSlice), b = describe(stage.w);
        begin_products();
#pragma unroll
        for (int step = 0; step < 4; ++step) product(sum, a + step * 2, b + step * 2, k + step > 0);  // 32 bytes further
        commit_products();
        wait_for_products<1>();  // the slice before is used up
        if (k > 0) release(shared, before);
        before = ring.stage;
        ring.advance();
    }
    wait_for_products<0>();
    release(shared, before);
    take_back(sum);
}

// The block keeps the sums of its half of the tile, in front, and adds what the other block has of them.
DEVICE void add_halves(sum_t (&sum)[ROWS / 2], Shared& shared, int part) {
    if constexpr (SPLIT > 1) {
        uint4* mine = (uint4*)shared.stages + threadIdx.x;
        named_barrier<kConsumers>(3);  // both groups are done with the stages
#pragma unroll
        for (int i = 0; i < kSent; i += 4) {
            u32 sent[4];
#pragma unroll
            for (int j = i; j < i + 4; ++j) {
                sum_t low = sum[j], high = sum[j + kSent];
                sum[j] = part == 0 ? low : high, sent[j - i] = bits_of(part == 0 ? high : low);
            }
            mine[i / 4 * kConsumers] = *(uint4*)sent;
        }
        exchange_barrier();
#pragma unroll
        for (int i = 0; i < kSent; i += 4) {
            uint4 four = load_from_block(shared_of(mine + i / 4 * kConsumers), 1 - part);
            sum[i] += sum_of(four.x), sum[i + 1] += sum_of(four.y), sum[i + 2] += sum_of(four.z), sum[i + 3] += sum_of(four.w);
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // copies go there next
        exchange_barrier();
    }
}

// The results of a warp's 16 tokens from (token, result) on; `out` stands there.
DEVICE void store_results(const sum_t (&sum)[ROWS / 2], const Finish& finish, u8* place, u8* out, s64 stride, int tokens, int results) {
#pragma unroll
    for (int from = 0; from < kOwn; from += kChunk) {
        int width = from + kChunk > kOwn ? kOwn - from : kChunk;
        u32 words[kChunk / 16][4];
#pragma unroll
        for (int column = 0; column < width; column += 16) finish.make(sum, (from + column) / 8, words[column / 16]);
#pragma unroll
        for (int column = 0; column < width; column += 16) put(words[column / 16], place, column);
        __syncwarp();
        store_chunk(place, out + from * (sizeof(Eight) / 8), stride, width, tokens, results - from);
        __syncwarp();
    }
}

KERNEL void __launch_bounds__(kConsumers + kCopiers, 1) __cluster_dims__(kCluster, 1, 1)
    linear_tiles(const __grid_constant__ TensorMap w_map, const __grid_constant__ TensorMap x_map, const float* x_scale, int x_step,
                 const float* w_scale, const float* bias, u8* out, s64 out_stride, int out_column, int tokens, int rows,
                 int slices, float out_scale, float* scale_written) {
    extern __shared__ u8 memory[];
    Shared& shared = *(Shared*)(memory + (-shared_of(memory) & 1023));
    int results = GATED ? rows / 2 : rows, group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
    Tiles tiles(tokens, results);
    int begin = slices * tiles.part / SPLIT, count = slices * (tiles.part + 1) / SPLIT - begin;
    if (threadIdx.x == 0) {
#pragma unroll
        for (int s = 0; s < STAGES; ++s) init_barrier(&shared.full[s], 1), init_barrier(&shared.empty[s], kGroups * SHARE);
        fence_barriers();
    }
    if (kCluster > 1) cluster_barrier();
    else __syncthreads();
    let_successor_start();
    if (group == kGroups) {
        give_registers<kWide ? 40 : 0>();
        Copies{shared, w_map, x_map, tiles, rows, begin, count}.run(thread == 0);
    } else {
        take_registers<kWide ? 232 : 0>();
        wait_for_predecessor();
        if (scale_written && blockIdx.x + threadIdx.x == 0) *scale_written = out_scale;
        sum_t sum[ROWS / 2];
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) sum[i] = 0;
        Ring ring;
        int own = tiles.part * kOwn;  // first result within the tile
        for (int number = tiles.first; number < tiles.count; number += tiles.stride) {
            int2 place = tiles.place(number);
            int token = place.x + group * 64 + thread / 32 * 16, result = place.y + own;  // the warp's first
            RowFactors factors(w_scale, bias, place.y, rows, thread);
            Finish finish = {shared.scales[group] + own, shared.biases[group] + own, 0, 0, out_scale};
            if (kScaled) finish.low = x_scale[x_step * min(token + lane / 4, tokens - 1)];
            if (kScaled) finish.high = x_scale[x_step * min(token + lane / 4 + 8, tokens - 1)];
            multiply(sum, shared, ring, count);
            add_halves(sum, shared, tiles.part);
            factors.put(shared, group, thread);
            u8* to = out + (token * out_stride + out_column + result) * s64(sizeof(Eight) / 8);
            store_results(sum, finish, shared.places[threadIdx.x / 32], to, out_stride, tokens - token, results - result);
        }
    }
}
