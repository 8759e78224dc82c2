// Linear layers for few tokens: y[T, N] = x[T, K] w[N, K]^T, limited by reading w once.
//
// A warp streams 16 weight rows straight from memory into tensor-core registers (no shared memory: a lane reads 16 bytes
// of rows g and g + 8 and the tokens' matching inputs). The warps of a block share the rows and divide K; their partial
// sums are added in a fixed order, so results repeat. Blocks walk over the row tiles and ask for the next tile's weights
// before the current is finished; the first weights are asked for before the predecessor has finished.
//
// Macros: X (INT8 | E4M3 codes; F32 | BF16 | F16 values), W (kind of the weights; with codes in X the same kind),
// HELD (1: the block first copies its tokens' inputs into shared memory: from there they do not queue behind weights that
// are still on their way; 0: they are too many), OUT (F32 | BF16 | F16 | INT8 | E4M3), TILES (of 8 tokens), GROUP (inputs per weight scale, 0: one per row),
// ASYM (1: int4 zero points), GATED (1: rows are gate then up; y = silu(gate) * up has N / 2 columns).
#include "common.cuh"
#include "mma.cuh"

constexpr bool kCodes = X == INT8 || X == E4M3;
constexpr int kWarps = 8, kDepth = TILES >= 4 || (GROUP != 0 && GROUP < 128) ? 2 : 4;  // steps asked for ahead
constexpr int kWeightBits = W == INT4 ? 4 : W == INT8 || W == E4M3 ? 8 : 16;
constexpr int kLaneInputs = 128 / kWeightBits, kBlock = 4 * kLaneInputs;  // inputs per 16 bytes; per step of a warp
constexpr int kKind = X == F16 ? F16 : BF16;                             // of the 16-bit products
constexpr int kSub = GROUP && GROUP < kBlock ? GROUP : kBlock;           // inputs that share a scale within a step
constexpr int kPad = 20;                                                 // floats per token in the exchange: no bank twice

template <bool INTEGER> struct Sum { typedef float type; };
template <> struct Sum<true> { typedef int type; };
typedef Sum<X == INT8>::type sum_t;

constexpr int kSubs = kBlock / kSub, kGroup = GROUP ? GROUP : 1;

struct Weights {
    uint4 low, high;                           // rows g and g + 8
    float low_scale[kSubs], high_scale[kSubs]; // of each run of inputs that shares one, where GROUP
    u32 low_offset[kSubs], high_offset[kSubs]; // what takes an int4 code's zero away
};

struct Linear {
    const void* x;
    const float* x_scale;
    int x_step;  // 1: one scale per token, 0: one for all
    const u8* w;
    const float* w_scale;  // [K / GROUP, N]
    const int* w_zero;
    const float* bias;
    void* out;
    s64 out_stride;
    int out_column, tokens, rows, columns;
    s64 row_bytes;
    float out_scale;
    int first_token;
};

constexpr int kInput = kCodes ? 1 : X == F32 ? 4 : 2, kSkew = 64;  // bytes; held rows start in different banks
constexpr int kExchange = kWarps * 8 * TILES * kPad * 4, kScales = 8 * TILES * 4;  // bytes before the held inputs
extern __shared__ __align__(16) u8 memory[];

// 16 bytes of the inputs of a token of this block, at element k.
DEVICE uint4 input(const Linear& l, int token, int k) {
    if constexpr (HELD) return *(const uint4*)(memory + kExchange + kScales + min(token, l.tokens - l.first_token - 1) * (l.columns * kInput + kSkew) + k * kInput);
    else return *(const uint4*)((const u8*)l.x + (s64(min(l.first_token + token, l.tokens - 1)) * l.columns + k) * kInput);
}

DEVICE void hold_inputs(const Linear& l) {
    int row = l.columns * kInput, count = min(8 * TILES, l.tokens - l.first_token);
    const u8* from = (const u8*)l.x + s64(l.first_token) * row;
    for (int i = threadIdx.x * 16; i < count * row; i += kWarps * 32 * 16)
        *(uint4*)(memory + kExchange + kScales + i / row * (row + kSkew) + i % row) = *(const uint4*)(from + i);
    __syncthreads();
}

DEVICE int row_of(const Linear& l, int tile, int place) {  // place 0..15 of a tile; beyond the last row: the last
    int half = l.rows / 2;
    if constexpr (GATED) return place < 8 ? min(tile * 8 + place, half - 1) : half + min(tile * 8 + place - 8, half - 1);
    else return min(tile * 16 + place, l.rows - 1);
}

DEVICE uint4 load_stream(const void* p) {  // read once: leaves the caches to others
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

DEVICE u32 offset_of(const Linear& l, s64 at) { return int4_offset<kKind>(ASYM ? l.w_zero[at] : 0); }

// 16 bytes of each of two rows, at step `block` of K, and their scales; zeros beyond the end of a row.
DEVICE Weights load_weights(const Linear& l, int tile, int block, int end, int lane) {
    Weights w{};
    s64 byte = (s64(block) * 4 + lane % 4) * 16;
    if (block >= end || byte >= l.row_bytes) return w;
    int low = row_of(l, tile, lane / 4), high = row_of(l, tile, lane / 4 + 8);
    w.low = load_stream(l.w + low * l.row_bytes + byte);
    w.high = load_stream(l.w + high * l.row_bytes + byte);
#pragma unroll
    for (int s = 0; s < kSubs; ++s) {
        if constexpr (GROUP != 0) {  // asked for now: waiting for them later would cost a trip to memory each time
            s64 group = min((block * kBlock + s * kSub) / kGroup, (l.columns - 1) / kGroup) * s64(l.rows);
            w.low_scale[s] = l.w_scale[group + low], w.high_scale[s] = l.w_scale[group + high];
            if constexpr (ASYM) w.low_offset[s] = offset_of(l, group + low), w.high_offset[s] = offset_of(l, group + high);
        }
    }
    return w;
}

DEVICE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// Register `pair` (0..3) of octet `octet`: inputs 2 pair and 2 pair + 1 of the lane's eight, as 16-bit floats.
DEVICE u32 weight_pair(const uint4& row, int octet, int pair, u32 offset) {
    if constexpr (W == INT4) return widen_int4<kKind>(word(row, octet), pair, offset);
    else if constexpr (W == BF16 || W == F16) return word(row, pair);
    else return widen<W, kKind>(word(row, octet * 2 + pair / 2), pair % 2 * 2, pair % 2 * 2 + 1);
}

// The lane's inputs `octet` of a step, of one token: four registers, and for float inputs what bf16 left over.
struct Inputs {
    uint4 high, rest;
};
DEVICE Inputs load_inputs(const Linear& l, int token, int block, int end, int octet, int lane) {
    int t = lane % 4, k = block * kBlock + (W == INT4 ? octet * 32 + t * 8 : t * kLaneInputs + octet * 8);
    Inputs in{};
    if (block >= end || k >= l.columns) return in;
    in.high = input(l, token, k);
    if constexpr (X == F32) {
        uint4 second = input(l, token, k + 4);
        u32 v[8] = {in.high.x, in.high.y, in.high.z, in.high.w, second.x, second.y, second.z, second.w};
        u32 high[4], rest[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float a = __uint_as_float(v[2 * i]), b = __uint_as_float(v[2 * i + 1]);
            high[i] = pack_bf16(a, b);
            rest[i] = pack_bf16(a - __uint_as_float(high[i] << 16), b - __uint_as_float(high[i] & 0xffff0000u));
        }
        in.high = make_uint4(high[0], high[1], high[2], high[3]);
        in.rest = make_uint4(rest[0], rest[1], rest[2], rest[3]);
    }
    return in;
}

// One step of codes by codes: 16 bytes of each row against 16 bytes of each token.
template <class S>
DEVICE void multiply_codes(const Linear& l, const Weights& w, int block, int end, int lane, S (&sum)[TILES][4]) {
    int k = (block * 4 + lane % 4) * 16;
#pragma unroll
    for (int n = 0; n < TILES; ++n) {
        uint4 x = make_uint4(0, 0, 0, 0);
        if (block < end && k < l.columns) x = input(l, n * 8 + lane / 4, k);
        mma_codes(sum[n], w.low.x, w.high.x, w.low.y, w.high.y, x.x, x.y);
        mma_codes(sum[n], w.low.z, w.high.z, w.low.w, w.high.w, x.z, x.w);
    }
}

// One step of 16-bit products. Sums of inputs that share a scale are kept apart until the scale is applied. Beyond `end`
// inputs are zeros, so that nothing is added whatever the weights.
DEVICE void multiply_values(const Linear& l, const Weights& w, int tile, int block, int end, int lane, float (&sum)[TILES][4]) {
    constexpr int kOctets = kSub / 32;
    u32 row_offset[2] = {int4_offset<kKind>(0), int4_offset<kKind>(0)};
    if constexpr (ASYM && GROUP == 0) {
        row_offset[0] = offset_of(l, row_of(l, tile, lane / 4));
        row_offset[1] = offset_of(l, row_of(l, tile, lane / 4 + 8));
    }
#pragma unroll
    for (int s = 0; s < kSubs; ++s) {
        u32 low_offset = ASYM && GROUP ? w.low_offset[s] : row_offset[0];
        u32 high_offset = ASYM && GROUP ? w.high_offset[s] : row_offset[1];
        u32 a[kOctets][4], b[kOctets][4];
#pragma unroll
        for (int o = 0; o < kOctets; ++o)
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                a[o][p] = weight_pair(w.low, s * kOctets + o, p, low_offset);
                b[o][p] = weight_pair(w.high, s * kOctets + o, p, high_offset);
            }
#pragma unroll
        for (int n = 0; n < TILES; ++n) {
            float part[4] = {};
            float(&to)[4] = GROUP ? part : sum[n];
#pragma unroll
            for (int o = 0; o < kOctets; ++o) {
                Inputs x = load_inputs(l, n * 8 + lane / 4, block, end, s * kOctets + o, lane);
                mma_16bit<kKind>(to, a[o][0], b[o][0], a[o][1], b[o][1], x.high.x, x.high.y);
                mma_16bit<kKind>(to, a[o][2], b[o][2], a[o][3], b[o][3], x.high.z, x.high.w);
                if constexpr (X == F32) {
                    mma_16bit<kKind>(to, a[o][0], b[o][0], a[o][1], b[o][1], x.rest.x, x.rest.y);
                    mma_16bit<kKind>(to, a[o][2], b[o][2], a[o][3], b[o][3], x.rest.z, x.rest.w);
                }
            }
            if constexpr (GROUP != 0) {
                sum[n][0] += part[0] * w.low_scale[s], sum[n][1] += part[1] * w.low_scale[s];
                sum[n][2] += part[2] * w.high_scale[s], sum[n][3] += part[3] * w.high_scale[s];
            }
        }
    }
}

template <bool CODES, class S>
DEVICE void multiply(const Linear& l, const Weights& w, int tile, int block, int end, int lane, S (&sum)[TILES][4]) {
    if constexpr (CODES) multiply_codes(l, w, block, end, lane, sum);
    else multiply_values(l, w, tile, block, end, lane, sum);
}

// What finishes the results of a row; asked for before the next tile's weights, so that it does not queue behind them.
struct Finish {
    float scale, bias;
    DEVICE Finish(const Linear& l, int row) : scale(GROUP || !l.w_scale ? 1.0f : l.w_scale[row]), bias(l.bias ? l.bias[row] : 0.0f) {}
    // Products and sums are rounded one by one, as the CPU does.
    DEVICE float of(const Linear& l, float total, float x_scale) const {
        float y = __fmul_rn(total, kCodes ? __fmul_rn(x_scale, scale) : scale);
        return l.bias ? __fadd_rn(y, bias) : y;
    }
};

constexpr int kColumns = GATED ? 8 : 16;  // results of a tile, per token

DEVICE void store_tile(const Linear& l, int tile, const sum_t* exchange, const float* x_scales, const Finish& own, const Finish& up) {
    int place = threadIdx.x % kColumns, column = tile * kColumns + place;
    if (column >= (GATED ? l.rows / 2 : l.rows)) return;
    for (int token = threadIdx.x / kColumns; token < min(8 * TILES, l.tokens - l.first_token); token += kWarps * 32 / kColumns) {
        sum_t total = 0, second = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) {
            const sum_t* part = exchange + (w * 8 * TILES + token) * kPad;
            total += part[place];
            if constexpr (GATED) second += part[place + 8];
        }
        float y = own.of(l, float(total), x_scales[token]);
        if constexpr (GATED) y = swiglu<X == F32>(y, up.of(l, float(second), x_scales[token]));
        s64 at = s64(l.first_token + token) * l.out_stride + l.out_column + column;
        if constexpr (OUT == INT8 || OUT == E4M3) ((u8*)l.out)[at] = encode<OUT>(y, l.out_scale);
        else store_one<OUT>(l.out, at, y);
    }
}

KERNEL void __launch_bounds__(kWarps * 32, TILES < 8 && GROUP != 32 ? 2 : 1)
    linear_stream(const void* x, const float* x_scale, int x_step, const u8* w, const float* w_scale, const int* w_zero,
                  const float* bias, void* out, s64 out_stride, int out_column, int tokens, int rows, int columns,
                  s64 row_bytes, float out_scale, float* scale_written) {
    sum_t* exchange = (sum_t*)memory;
    float* x_scales = (float*)(memory + kExchange);
    Linear l{x, x_scale, x_step, w, w_scale, w_zero, bias, out, out_stride, out_column, tokens, rows, columns, row_bytes,
             out_scale, int(blockIdx.y) * 8 * TILES};
    let_successor_start();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int tiles = GATED ? (rows / 2 + 7) / 8 : (rows + 15) / 16, blocks = (columns + kBlock - 1) / kBlock;
    int begin = blocks * warp / kWarps, end = blocks * (warp + 1) / kWarps;
    int batches = ((blocks + kWarps - 1) / kWarps + kDepth - 1) / kDepth;
    int mine = (tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);  // tiles of this block
    Weights next[kDepth];
#pragma unroll
    for (int d = 0; d < kDepth; ++d) next[d] = load_weights(l, blockIdx.x, begin + d, end, lane);
    wait_for_predecessor();
    if (scale_written && blockIdx.x + blockIdx.y + threadIdx.x == 0) *scale_written = out_scale;
    if (threadIdx.x < 8 * TILES)
        x_scales[threadIdx.x] = kCodes ? x_scale[x_step * min(l.first_token + int(threadIdx.x), tokens - 1)] : 1.0f;
    if constexpr (HELD) hold_inputs(l);
    for (int m = 0; m < mine; ++m) {
        int tile = blockIdx.x + m * gridDim.x, place = threadIdx.x % kColumns;
        Finish own(l, row_of(l, tile, place)), up(l, row_of(l, tile, GATED ? place + 8 : place));
        sum_t sum[TILES][4] = {};
        for (int batch = 0; batch < batches; ++batch) {
            Weights current[kDepth];
            bool last = batch + 1 == batches;
            int next_tile = last ? tile + gridDim.x : tile, next_block = begin + (last ? 0 : (batch + 1) * kDepth);
#pragma unroll
            for (int d = 0; d < kDepth; ++d) {
                current[d] = next[d];
                next[d] = load_weights(l, next_tile, next_block + d, last && m + 1 == mine ? 0 : end, lane);
            }
#pragma unroll
            for (int d = 0; d < kDepth; ++d)
                multiply<kCodes>(l, current[d], tile, begin + batch * kDepth + d, end, lane, sum);
        }
        sum_t* part = exchange + warp * 8 * TILES * kPad;
#pragma unroll
        for (int n = 0; n < TILES; ++n)
#pragma unroll
            for (int c = 0; c < 4; ++c) part[(n * 8 + lane % 4 * 2 + c % 2) * kPad + lane / 4 + c / 2 * 8] = sum[n][c];
        __syncthreads();
        store_tile(l, tile, exchange, x_scales, own, up);
        __syncthreads();
    }
}
