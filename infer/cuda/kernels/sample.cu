// From logits f32[R, V] to token ids and log-probabilities. Nothing is sorted: a cut through the falling order of weights
// is found digit by digit, from counts and masses of weights per digit. Masses are integers (weight * 2^40, each at most
// 2^40), so their sums do not depend on the order of additions and a seed gives the same tokens every time.
#include "common.cuh"

constexpr int kThreads = 1024;
constexpr double kUnit = 1099511627776.0;  // 2^40: the mass of the largest weight, which is 1

constexpr u32 kBadLogits = 2;              // bit of the word that the host looks at once a step
#define kInfinity __int_as_float(0x7f800000)

// A float's bits in an order that integers compare like the floats.
DEVICE u32 ordered(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Part `blockIdx.x` of row `blockIdx.y`: the largest logit and, of equal ones, the lowest id.
KERNEL void __launch_bounds__(256) argmax_parts(const float* logits, int vocabulary, u64* best, u32* bad) {
    __shared__ u64 shared[8];
    let_successor_start();
    wait_for_predecessor();
    const float* row = logits + s64(blockIdx.y) * vocabulary;
    u64 top = 0;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < vocabulary; i += gridDim.x * 256) {
        u64 key = u64(ordered(row[i])) << 32 | u32(~i);
        top = key > top ? key : top;
        if (!(row[i] < kInfinity)) atomicOr(bad, kBadLogits);
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        u64 other = __shfl_xor_sync(~0u, top, step);
        top = other > top ? other : top;
    }
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < 8; ++w) top = shared[w] > top ? shared[w] : top;
        best[s64(blockIdx.y) * gridDim.x + blockIdx.x] = top;
    }
}

KERNEL void argmax_merge(const u64* best, int parts, int* ids, u32* bad) {  // one warp per row
    let_successor_start();
    wait_for_predecessor();
    u64 top = 0;
    for (int i = threadIdx.x; i < parts; i += 32) {
        u64 key = best[s64(blockIdx.x) * parts + i];
        top = key > top ? key : top;
    }
#pragma unroll
    for (int step = 16; step; step >>= 1) {
        u64 other = __shfl_xor_sync(~0u, top, step);
        top = other > top ? other : top;
    }
    if (threadIdx.x != 0) return;
    ids[blockIdx.x] = int(~u32(top));
    if (u32(top >> 32) <= ordered(-kInfinity)) atomicOr(bad, kBadLogits);
}

DEVICE float row_maximum(const float* row, int vocabulary, u32* bad) {
    __shared__ u32 shared[32];
    u32 top = 0;
    for (int i = threadIdx.x; i < vocabulary; i += kThreads) {
        top = max(top, ordered(row[i]));
        if (!(row[i] < kInfinity)) atomicOr(bad, kBadLogits);
    }
    top = block_max<kThreads>(top, shared);
    __syncthreads();
    if (threadIdx.x == 0 && top <= ordered(-kInfinity)) atomicOr(bad, kBadLogits);
    return __uint_as_float(top & 0x80000000u ? top & 0x7fffffffu : ~top);
}

// log softmax of each row at its target.
KERNEL void __launch_bounds__(kThreads) logprobs(const float* logits, const int* targets, int vocabulary, float* out,
                                                 u32* bad) {
    __shared__ double shared[32];
    let_successor_start();
    wait_for_predecessor();
    const float* row = logits + s64(blockIdx.x) * vocabulary;
    float top = row_maximum(row, vocabulary, bad);
    double sum = 0;
    for (int i = threadIdx.x; i < vocabulary; i += kThreads) sum += double(expf(row[i] - top));
    sum = block_sum<kThreads>(sum, shared);
    if (threadIdx.x == 0) out[blockIdx.x] = float(double(row[targets[blockIdx.x]]) - double(top) - log(sum));
}

// exp(logit / temperature - largest): what a token weighs, in [0, 1].
struct Weights {
    const float* row;
    float temperature, top;
    DEVICE float of(int i) const { return expf(__fdiv_rn(row[i], temperature) - top); }
};
DEVICE u64 mass_of(u32 bits) { return u64(double(__uint_as_float(bits)) * kUnit); }

// A place in the falling order of weights: all weights above `bits`, and the first `ties` equal ones in order of id.
struct Cut {
    u32 bits;
    int ties;
    u64 above;  // mass of the weights above
};

// The shortest head of the falling order whose count reaches `count` (BY_MASS: whose mass exceeds or reaches `mass`).
// Every thread returns the same. `at_least`: mass >= `mass` is enough; otherwise it has to exceed it.
template <bool BY_MASS>
DEVICE Cut cut(const Weights& weights, int vocabulary, int count, u64 mass, bool at_least) {
    __shared__ u32 counts[256];
    __shared__ u64 masses[256];
    __shared__ u32 digit_found;
    __shared__ u64 mass_above;
    __shared__ int count_above;
    u32 prefix = 0, mask = 0;
    if (threadIdx.x == 0) mass_above = 0, count_above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) counts[threadIdx.x] = 0, masses[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < vocabulary; i += kThreads) {
            u32 bits = __float_as_uint(weights.of(i));
            if ((bits & mask) != prefix) continue;
            atomicAdd(&counts[bits >> shift & 255u], 1u);
            atomicAdd(&masses[bits >> shift & 255u], mass_of(bits));
        }
        __syncthreads();
        if (threadIdx.x == 0) {  // from the heaviest digit down to the one that reaches the goal, at the latest the last
            u32 last = 0, digit = 256;
            for (int d = 0; d < 256; ++d)
                if (counts[d]) { last = d; break; }
            while (--digit > last) {
                if (!counts[digit]) continue;
                u64 reached = mass_above + masses[digit];
                if (BY_MASS ? (reached > mass || (at_least && reached == mass)) : count_above + int(counts[digit]) >= count) break;
                mass_above = reached;
                count_above += int(counts[digit]);
            }
            digit_found = digit;
        }
        __syncthreads();
        prefix |= digit_found << shift;
        mask |= 255u << shift;
    }
    int equal = int(counts[prefix & 255u]), ties;
    u64 each = mass_of(prefix);
    if constexpr (BY_MASS) {
        u64 missing = mass > mass_above ? mass - mass_above : 0;
        u64 needed = each == 0 ? u64(equal) : missing / each + (at_least && missing % each == 0 && missing > 0 ? 0 : 1);
        ties = int(needed < u64(equal) ? needed : u64(equal));
    } else {
        ties = min(count - count_above, equal);
    }
    Cut found{prefix, max(ties, 1), mass_above};
    __syncthreads();
    return found;
}

// The id of the `nth` (from 1) token, in order of id, that `chosen` accepts.
template <class Accept>
DEVICE int nth_token(int vocabulary, int nth, Accept accept) {
    __shared__ int warps[32];
    __shared__ int found;
    int each = (vocabulary + kThreads - 1) / kThreads, first = threadIdx.x * each, mine = 0;
    for (int i = first; i < min(first + each, vocabulary); ++i) mine += accept(i);
    int before = mine;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        int other = __shfl_up_sync(~0u, before, step);
        if (threadIdx.x % 32 >= step) before += other;
    }
    if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = before;
    if (threadIdx.x == 0) found = 0;
    __syncthreads();
    for (int w = 0; w < int(threadIdx.x / 32); ++w) before += warps[w];
    before -= mine;
    if (before < nth && nth <= before + mine) {
        for (int i = first; i < min(first + each, vocabulary); ++i) {
            before += accept(i);
            if (before == nth) { found = i; break; }
        }
    }
    __syncthreads();
    return found;
}

// In order of id: the first token at which the running mass exceeds `mass`.
DEVICE int token_at_mass(const Weights& weights, int vocabulary, double share) {
    __shared__ u64 warps[32];
    __shared__ int found;
    int each = (vocabulary + kThreads - 1) / kThreads, first = threadIdx.x * each, stop = min(first + each, vocabulary);
    u64 mine = 0;
    for (int i = first; i < stop; ++i) mine += mass_of(__float_as_uint(weights.of(i)));
    u64 before = mine;
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) {
        u64 other = __shfl_up_sync(~0u, before, step);
        if (threadIdx.x % 32 >= step) before += other;
    }
    if (threadIdx.x % 32 == 31) warps[threadIdx.x / 32] = before;
    if (threadIdx.x == 0) found = vocabulary - 1;
    __syncthreads();
    u64 total = 0;
    for (int w = 0; w < 32; ++w) {
        if (w < int(threadIdx.x / 32)) before += warps[w];
        total += warps[w];
    }
    before -= mine;
    u64 mass = u64(share * double(total));
    if (before <= mass && mass < before + mine) {
        for (int i = first; i < stop; ++i) {
            before += mass_of(__float_as_uint(weights.of(i)));
            if (before > mass) { found = i; break; }
        }
    }
    __syncthreads();
    return found;
}

// One block per row: temperature, then top-k, then top-p of what remains (Holtzman et al. 2020, section 3.1), then one
// draw by inverse transform of `uniform` in [0, 1). Temperature 0 takes the largest logit. top_k 0 and top_p 1 do nothing.
KERNEL void __launch_bounds__(kThreads) sample(const float* logits, const float* temperature, const int* top_k,
                                               const float* top_p, const float* uniform, int vocabulary, int* ids,
                                               u32* bad) {
    let_successor_start();
    wait_for_predecessor();
    const float* row = logits + s64(blockIdx.x) * vocabulary;
    float top = row_maximum(row, vocabulary, bad);
    int r = blockIdx.x;
    if (temperature[r] == 0.0f) {
        int id = nth_token(vocabulary, 1, [&](int i) { return row[i] == top; });
        if (threadIdx.x == 0) ids[r] = id;
        return;
    }
    Weights weights{row, temperature[r], __fdiv_rn(top, temperature[r])};
    int count = top_k[r] > 0 ? min(top_k[r], vocabulary) : vocabulary;
    if (count == vocabulary && top_p[r] >= 1.0f) {
        int id = token_at_mass(weights, vocabulary, double(uniform[r]));
        if (threadIdx.x == 0) ids[r] = id;
        return;
    }
    Cut end = cut<false>(weights, vocabulary, count, 0, false);
    u64 total = end.above + u64(end.ties) * mass_of(end.bits);
    if (top_p[r] < 1.0f) {
        Cut nucleus = cut<true>(weights, vocabulary, 0, u64(double(top_p[r]) * double(total)), true);
        if (nucleus.bits > end.bits || (nucleus.bits == end.bits && nucleus.ties < end.ties)) end = nucleus;
        total = end.above + u64(end.ties) * mass_of(end.bits);
    }
    u64 goal = u64(double(uniform[r]) * double(total));
    Cut drawn = cut<true>(weights, vocabulary, 0, goal, false);
    if (drawn.bits < end.bits || (drawn.bits == end.bits && drawn.ties > end.ties)) drawn = end;
    int id = nth_token(vocabulary, drawn.ties, [&](int i) { return __float_as_uint(weights.of(i)) == drawn.bits; });
    if (threadIdx.x == 0) ids[r] = id;
}
