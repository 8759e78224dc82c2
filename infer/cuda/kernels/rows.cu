// Operations on rows of activations: add + RMS norm, quantize, SwiGLU. One block per row, the row in registers; where there
// are few wide rows a cluster of PARTS blocks per row, which agree on its largest value (not add_norm).
//
// Macros: WIDTH (columns of the result), PARTS (1, or blocks per row on Hopper), THREADS (of a block), IO (F32 | BF16 | F16: floats between operations), FORMAT (0: stay
// float, INT8, E4M3), STATIC (1: `given` is the scale of every row; 0: one scale per row is computed and stored),
// KEEP (1: floats are stored beside the codes), DOUBLE (1: SwiGLU in double, rounded once).
#include "common.cuh"
#include "hopper.cuh"

#ifndef PARTS
#define PARTS 1
#endif
#ifndef STATIC
#define STATIC 0
#endif
#ifndef DOUBLE
#define DOUBLE 0
#endif
#ifndef KEEP
#define KEEP 0
#endif

constexpr int V = WIDTH % 8 == 0 ? 8 : WIDTH % 4 == 0 ? 4 : 1;
constexpr int kPart = WIDTH / PARTS, kVectors = kPart / V, kChunks = (kVectors + THREADS - 1) / THREADS;

#if PARTS > 1
#define CLUSTER __cluster_dims__(PARTS, 1, 1)
#else
#define CLUSTER
#endif

struct Row {
    float v[kChunks][V];
    DEVICE float at(int chunk, int j) const { return v[chunk][j]; }
};
struct Stored {  // a row as it came: half the registers
    Held<IO, V> v[kChunks];
    DEVICE float at(int chunk, int j) const { return v[chunk].at(j); }
};

DEVICE int row_number() { return blockIdx.x / PARTS; }
DEVICE int first_column() { return blockIdx.x % PARTS * kPart; }
DEVICE bool holds(int chunk) { return chunk * THREADS + int(threadIdx.x) < kVectors; }
DEVICE int column(int chunk) { return (chunk * THREADS + int(threadIdx.x)) * V; }

// Stores the row as the macros say. Codes follow the reference: absmax / 127 (448), division, round half to even.
template <typename ROW>
DEVICE void emit(const ROW& row, s64 start, void* values, u8* codes, float* scales, float given, u32* bad) {
    __shared__ u32 shared[32];
    auto take = [&](int chunk, float(&v)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = row.at(chunk, j);
    };
    if constexpr (FORMAT == 0 || KEEP) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            float v[V];
            take(c, v);
            if (holds(c)) store_vector<IO>(values, start + column(c), v);
        }
    }
    if constexpr (FORMAT != 0) {
        u32 top = 0;  // of the magnitudes' bits: NaN and infinity compare above every number
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
            for (int j = 0; j < V; ++j)
                if (holds(c)) top = max(top, __float_as_uint(row.at(c, j)) & 0x7fffffffu);
        float scale = given;
        if constexpr (!STATIC) {
            top = block_max<THREADS>(top, shared);
#if PARTS > 1
            top = cluster_max<PARTS>(top);
#endif
            scale = dynamic_scale<FORMAT>(__uint_as_float(top));
            if (threadIdx.x == 0 && first_column() == 0) scales[row_number()] = scale;
        } else if (blockIdx.x == 0 && threadIdx.x == 0) {
            scales[0] = given;
        }
        if (top >= 0x7f800000u) atomicOr(bad, 1u);
        float inverse = __frcp_rn(scale);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
            float v[V];
            u8 q[V];
            take(c, v);
            encode_all<FORMAT>(v, scale, inverse, q);
            if (holds(c)) store_codes<V>(codes, start + column(c), q);
        }
    }
}

// x += delta (delta may be null); RMS norm (Zhang & Sennrich 2019) of x times weight; x f32[T, WIDTH].
KERNEL void __launch_bounds__(THREADS) add_norm(float* x, const void* delta, const float* weight, double eps, void* values,
                                                u8* codes, float* scales, float given, u32* bad) {
    __shared__ double shared[32];
    Row row;
    float w[kChunks][V];
    s64 start = s64(blockIdx.x) * WIDTH;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
        if (holds(c)) load_vector<F32>(weight, column(c), w[c]);
    wait_for_predecessor();
    let_successor_start();  // not before: blocks that come too early crowd some multiprocessors
    double sum = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        if (!holds(c)) continue;
        load_vector<F32>(x, start + column(c), row.v[c]);
        if (delta) {
            float d[V];
            load_vector<IO>(delta, start + column(c), d);
#pragma unroll
            for (int j = 0; j < V; ++j) row.v[c][j] += d[j];
            store_vector<F32>(x, start + column(c), row.v[c]);
        }
#pragma unroll
        for (int j = 0; j < V; ++j) sum += double(row.v[c][j]) * double(row.v[c][j]);
    }
    float inverse = inverse_root(block_sum<THREADS>(sum, shared) / WIDTH + eps);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int j = 0; j < V; ++j) row.v[c][j] = row.v[c][j] * inverse * w[c][j];
    emit(row, start, values, codes, scales, given, bad);
}

// x IO[T, WIDTH] to codes.
KERNEL void __launch_bounds__(THREADS) CLUSTER quantize(const void* x, u8* codes, float* scales, float given, u32* bad) {
    let_successor_start();
    wait_for_predecessor();
    Stored row;
    s64 start = s64(row_number()) * WIDTH + first_column();
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
        if (holds(c)) row.v[c].load(x, start + column(c));
    emit(row, start, nullptr, codes, scales, given, bad);
}

// silu(first half) * second half of gate_up IO[T, 2 WIDTH] (SwiGLU, Shazeer 2020).
KERNEL void __launch_bounds__(THREADS) CLUSTER silu_mul(const void* gate_up, void* values, u8* codes, float* scales, float given,
                                                u32* bad) {
    let_successor_start();
    wait_for_predecessor();
    Row row;
    s64 start = s64(row_number()) * WIDTH + first_column(), gates = s64(row_number()) * 2 * WIDTH + first_column();
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        if (!holds(c)) continue;
        float gate[V], up[V];
        load_vector<IO>(gate_up, gates + column(c), gate);
        load_vector<IO>(gate_up, gates + WIDTH + column(c), up);
#pragma unroll
        for (int j = 0; j < V; ++j)
            row.v[c][j] = DOUBLE ? float(gate[j] / (1 + exp(-double(gate[j]))) * up[j]) : swiglu<IO == F32>(gate[j], up[j]);
    }
    emit(row, start, values, codes, scales, given, bad);
}
