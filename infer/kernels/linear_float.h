// Linear layers with float32 activations: y = a @ w.T for weights in f32, bf16, f16, int8, int4 or e4m3.
//
// Every output element is one chain of fused multiply-adds over k in ascending order, whatever the number of tokens,
// the tile or the thread: a token alone and a token in a batch get the same bits. Parallelism comes from computing
// several panels or tokens at once. With scales per group of inputs it is one chain per group, on the codes themselves,
// and one of the groups' sums times their scales: a code is never scaled by itself. Zero points are taken off the sums,
// as many times as the inputs of the group add up to.
#pragma once

#include "simd.h"
#include "table.h"

namespace quantbench::QB_ISA {

constexpr int kColumns = 2 * W;                       // columns of a register tile
constexpr int kRows = W == 16 ? 12 : W == 8 ? 6 : 4;  // tokens of a register tile
constexpr int64_t kDepth = 384;                       // k of a block: a decoded panel block is 48 KiB
constexpr int64_t kTokens = 192;                      // tokens of a block: 288 KiB of activations, within L2
constexpr int64_t kAhead = 1024;                      // bytes of a panel asked for before they are needed

// One token waits for memory, and decoding fills the window of instructions in flight before the next lines are asked
// for: each cache line of a panel is asked for `kAhead` bytes early. Past the end of a panel the next one begins.
template <int64_t bytes>
QB_INLINE void prefetch_lines(const uint8_t* at) {
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(at + line + kAhead);
}

// How a weight is decoded: `bytes` per input of a panel; `at` gives W channels of input k, from `column` on.
struct DecodeF32 {
    static constexpr int64_t bytes = 128;
    QB_INLINE vf at(const uint8_t* panel, int64_t k, int64_t column) { return load((const float*)panel + k * kPanel + column); }
};
struct DecodeBF16 {  // pairs of inputs: the even one is the low half
    static constexpr int64_t bytes = 64;
    QB_INLINE vf at(const uint8_t* panel, int64_t k, int64_t column) {
        vi pair = (vi)load((const float*)(panel + (k >> 1) * 2 * bytes) + column);
        return bits_to_float((pair << (k & 1 ? 0 : 16)) & (int32_t)0xffff0000);
    }
};
struct DecodeF16 {
    static constexpr int64_t bytes = 64;
    QB_INLINE vf at(const uint8_t* panel, int64_t k, int64_t column) { return load_f16(panel + k * bytes + 2 * column); }
};
struct DecodeInt8 {
    static constexpr int64_t bytes = 32;
    QB_INLINE vf at(const uint8_t* panel, int64_t k, int64_t column) { return to_float(load_i8(panel + k * bytes + column)); }
};
struct DecodeE4M3 {  // a 256th of the value; the scale was multiplied by 256 when packed. Pairs of inputs
    static constexpr int64_t bytes = 32;
    QB_INLINE vf at(const uint8_t* panel, int64_t k, int64_t column) {
        return load_e4m3_pairs_over_256(panel + (k >> 1) * 2 * bytes + 2 * column, int(k & 1));
    }
};
struct DecodeInt4 {  // eight inputs in a word
    static constexpr int64_t bytes = 16;
    QB_INLINE vf at(const uint8_t* panel, int64_t k, int64_t column) {
        vi word = (vi)load((const float*)(panel + (k >> 3) * 8 * bytes) + column) >> int(16 * (k & 1) + 2 * (k & 6));
#if defined(QB_AVX512)
        const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps((__m512i)word, codes);  // reads the low 4 bits
#else
        return to_float((word & 15) - 8);
#endif
    }
};

// y = (acc - zero * sum of the inputs) * (activation scale * channel scale) + bias, each step rounded, so that every
// instruction set agrees.
QB_INLINE void finish(const Linear& l, int64_t token, int64_t column, vf acc) {
    const Weight& w = l.w;
    if (w.groups == 1 && w.scale) {
        if (w.offset) acc = fma(set1(l.a_sums[token]), load(w.offset + column), acc);
        vf scale = load(w.scale + column);
        acc = acc * (l.a_scale ? scale * l.a_scale[token * l.a_scale_step] : scale);
    } else if (l.a_scale) {
        acc = acc * l.a_scale[token * l.a_scale_step];
    }
    if (w.bias) acc = acc + load(w.bias + column);
    float* y = l.y + token * l.ldy + column;
    if (column + W <= w.rows) store(y, acc);
    else if (column < w.rows) store_part(y, acc, w.rows - column);
}

// Sums of a register tile over k in [from, to): M tokens, P panels side by side, kColumns columns of each.
template <class Decode, int M, int P>
struct Tile {
    vf acc[M][P][2];

    QB_INLINE void clear(Tile& t) {
        QB_UNROLL
        for (int m = 0; m < M; ++m)
            QB_UNROLL
            for (int p = 0; p < P; ++p) t.acc[m][p][0] = t.acc[m][p][1] = vf{};
    }

    QB_INLINE void step(Tile& t, const float* a, int64_t lda, const uint8_t* panel, int64_t panel_bytes, int64_t column,
                        int64_t k) {
        vf b[P][2];
        QB_UNROLL
        for (int p = 0; p < P; ++p)
            QB_UNROLL
            for (int h = 0; h < 2; ++h) b[p][h] = Decode::at(panel + p * panel_bytes, k, column + h * W);
        QB_UNROLL
        for (int m = 0; m < M; ++m) {
            vf x = set1(a[m * lda + k]);
            QB_UNROLL
            for (int p = 0; p < P; ++p)
                QB_UNROLL
                for (int h = 0; h < 2; ++h) t.acc[m][p][h] = fma(x, b[p][h], t.acc[m][p][h]);
        }
    }

    QB_INLINE void add(Tile& t, const float* a, int64_t lda, const uint8_t* panel, int64_t panel_bytes, int64_t column,
                       int64_t from, int64_t to) {
        int64_t k = from;
        if constexpr (M == 1) {  // unrolled: whole cache lines of every panel per turn
            constexpr int64_t run = Decode::bytes == 16 ? 8 : Decode::bytes < 64 ? 64 / Decode::bytes : 1;
            for (; k + run <= to; k += run) {
                QB_UNROLL
                for (int p = 0; p < P; ++p)
                    prefetch_lines<run * Decode::bytes>(panel + p * panel_bytes + k * Decode::bytes);
                QB_UNROLL
                for (int64_t j = 0; j < run; ++j) step(t, a, lda, panel, panel_bytes, column, k + j);
            }
        }
        for (; k < to; ++k) step(t, a, lda, panel, panel_bytes, column, k);
    }
};

// total += (sum - zero * sum of the inputs) * scale of the group
template <int M, int P>
QB_INLINE void add_group(const Linear& l, int64_t token, int64_t panel, int64_t group, int64_t column, vf (*sum)[P][2],
                         vf (*total)[P][2]) {
    const Weight& w = l.w;
    QB_UNROLL
    for (int p = 0; p < P; ++p)
        QB_UNROLL
        for (int h = 0; h < 2; ++h) {
            int64_t at = ((panel + p) * w.groups + group) * kPanel + column + h * W;
            vf scale = load(w.scale + at);
            if (w.offset) {
                vf offset = load(w.offset + at);
                QB_UNROLL
                for (int m = 0; m < M; ++m)
                    sum[m][p][h] = fma(set1(l.a_sums[(token + m) * w.groups + group]), offset, sum[m][p][h]);
            }
            QB_UNROLL
            for (int m = 0; m < M; ++m) total[m][p][h] = fma(sum[m][p][h], scale, total[m][p][h]);
        }
}

// Few tokens: weights are decoded in registers, once for all M tokens. `scaled`: the sum of each group by itself.
template <class Decode, bool scaled, int M, int P>
static void direct_tile(const Linear& l, int64_t token, int64_t panel, int64_t column) {
    using T = Tile<Decode, M, P>;
    const Weight& w = l.w;
    const uint8_t* codes = w.codes + panel * w.panel_bytes;
    const float* a = (const float*)l.a + token * w.columns;
    T total;
    T::clear(total);
    if constexpr (!scaled) {
        T::add(total, a, w.columns, codes, w.panel_bytes, column, 0, w.columns);
    } else {
        for (int64_t g = 0; g < w.groups; ++g) {
            int64_t from = g * w.group_size, to = smaller(from + w.group_size, w.columns);
            T sum;
            T::clear(sum);
            T::add(sum, a, w.columns, codes, w.panel_bytes, column, from, to);
            add_group<M, P>(l, token, panel, g, column, sum.acc, total.acc);
        }
    }
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int p = 0; p < P; ++p)
            QB_UNROLL
            for (int h = 0; h < 2; ++h)
                finish(l, token + m, (panel + p) * kPanel + column + h * W, total.acc[m][p][h]);
}

template <class Decode, bool scaled, int M>
static void direct(const Linear& l, int64_t token, int64_t first, int64_t last) {
    constexpr int P = M == 1 ? 4 : M == 2 ? 2 : 1;
    int64_t panel = first;
    for (; panel + P <= last; panel += P)
        for (int64_t c = 0; c < kPanel; c += kColumns) direct_tile<Decode, scaled, M, P>(l, token, panel, c);
    for (; panel < last; ++panel)
        for (int64_t c = 0; c < kPanel; c += kColumns) direct_tile<Decode, scaled, M, 1>(l, token, panel, c);
}

template <class Decode, bool scaled, int M = kRows>
static void direct_rows(const Linear& l, int64_t token, int64_t rows, int64_t first, int64_t last) {
    if constexpr (M > 1) {
        if (rows < M) return direct_rows<Decode, scaled, M - 1>(l, token, rows, first, last);
    }
    direct<Decode, scaled, M>(l, token, first, last);
}

// Many tokens: a block of a panel is decoded into `block` [depth][32] and used by every token of the token block.
template <class Decode>
static void decode_block(const Weight& w, int64_t panel, int64_t from, int64_t to, float* block) {
    const uint8_t* codes = w.codes + panel * w.panel_bytes;
    for (int64_t c = 0; c < kPanel; c += W)
        for (int64_t k = from; k < to; ++k) store(block + (k - from) * kPanel + c, Decode::at(codes, k, c));
}

// One tile over a block of k; the sums so far lie in y.
template <bool scaled, int M>
static void block_tile(const Linear& l, int64_t token, int64_t panel, int64_t column, int64_t from, int64_t to,
                       const float* block) {
    using T = Tile<DecodeF32, M, 1>;
    const Weight& w = l.w;
    const float* a = (const float*)l.a + token * w.columns + from;
    const auto* b = (const uint8_t*)block;
    int64_t n = panel * kPanel + column;
    T total;
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int h = 0; h < 2; ++h) {
            int64_t at = n + h * W, valid = w.rows - at;
            const float* y = l.y + (token + m) * l.ldy + at;
            total.acc[m][0][h] = from == 0 || valid <= 0 ? vf{} : valid >= W ? load(y) : load_part(y, valid);
        }
    if constexpr (!scaled) {
        T::add(total, a, w.columns, b, 0, column, 0, to - from);
    } else {
        for (int64_t k = from; k < to; k += w.group_size) {
            T sum;
            T::clear(sum);
            T::add(sum, a, w.columns, b, 0, column, k - from, smaller(k + w.group_size, to) - from);
            add_group<M, 1>(l, token, panel, k / w.group_size, column, sum.acc, total.acc);
        }
    }
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int h = 0; h < 2; ++h) {
            int64_t at = n + h * W, valid = w.rows - at;
            float* y = l.y + (token + m) * l.ldy + at;
            if (to == w.columns) finish(l, token + m, at, total.acc[m][0][h]);
            else if (valid >= W) store(y, total.acc[m][0][h]);
            else if (valid > 0) store_part(y, total.acc[m][0][h], valid);
        }
}

template <bool scaled, int M = kRows>
static void block_rows(const Linear& l, int64_t token, int64_t rows, int64_t panel, int64_t from, int64_t to,
                       const float* block) {
    if constexpr (M > 1) {
        if (rows < M) return block_rows<scaled, M - 1>(l, token, rows, panel, from, to, block);
    }
    for (int64_t c = 0; c < kPanel; c += kColumns) block_tile<scaled, M>(l, token, panel, c, from, to, block);
}

// Blocks of k end where groups end.
template <class Decode, bool scaled>
static void blocked(const Linear& l, int64_t first, int64_t last) {
    alignas(64) float block[kDepth * kPanel];
    const Weight& w = l.w;
    int64_t depth = scaled ? kDepth / w.group_size * w.group_size : kDepth;
    for (int64_t t0 = 0; t0 < l.t; t0 += kTokens)
        for (int64_t from = 0; from < w.columns; from += depth) {
            int64_t to = smaller(from + depth, w.columns), t1 = smaller(t0 + kTokens, l.t);
            for (int64_t panel = first; panel < last; ++panel) {
                const float* source = block;
                if (w.kind == Kind::f32) source = (const float*)(w.codes + panel * w.panel_bytes) + from * kPanel;
                else decode_block<Decode>(w, panel, from, to, block);
                for (int64_t t = t0; t < t1; t += kRows)
                    block_rows<scaled>(l, t, smaller(kRows, t1 - t), panel, from, to, source);
            }
        }
}

template <class Decode, bool scaled = false>
static void linear_by_tokens(const Linear& l, int64_t first, int64_t last) {
    bool deep = scaled && l.w.group_size > kDepth;  // such a group has no place in a block
    if (l.t > kRows && !deep) return blocked<Decode, scaled>(l, first, last);
    for (int64_t t = 0; t < l.t; t += kRows) direct_rows<Decode, scaled>(l, t, smaller(kRows, l.t - t), first, last);
}

template <class Decode>
static void linear_by_groups(const Linear& l, int64_t first, int64_t last) {
    if (l.w.groups > 1) linear_by_tokens<Decode, true>(l, first, last);
    else linear_by_tokens<Decode>(l, first, last);
}

// Forms that linear_bf16.h hardly ever leaves over, one token at a time.
template <class Decode>
[[maybe_unused]] static void linear_rare(const Linear& l, int64_t first, int64_t last) {
    for (int64_t t = 0; t < l.t; ++t) {
        if (l.w.groups > 1) direct<Decode, true, 1>(l, t, first, last);
        else direct<Decode, false, 1>(l, t, first, last);
    }
}

static void linear_float(const Linear& l, int64_t first, int64_t last) {
    switch (l.w.kind) {
        case Kind::f32: return linear_by_tokens<DecodeF32>(l, first, last);
        case Kind::f16: return linear_by_tokens<DecodeF16>(l, first, last);
        case Kind::int8: return linear_by_groups<DecodeInt8>(l, first, last);
#if defined(QB_AMX)
        case Kind::int4: return linear_by_groups<DecodeInt4>(l, first, last);
        case Kind::e4m3: return linear_by_groups<DecodeE4M3>(l, first, last);
#elif defined(QB_BF16)
        case Kind::int4: return linear_rare<DecodeInt4>(l, first, last);
        case Kind::e4m3: return linear_rare<DecodeE4M3>(l, first, last);
#else
        case Kind::bf16: return linear_by_tokens<DecodeBF16>(l, first, last);
        case Kind::int4: return linear_by_groups<DecodeInt4>(l, first, last);
        case Kind::e4m3: return linear_by_groups<DecodeE4M3>(l, first, last);
#endif
        default: return;  // has products of its own
    }
}

}  // namespace quantbench::QB_ISA
