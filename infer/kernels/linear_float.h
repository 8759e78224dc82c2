// Linear layers with float32 activations: y = a @ w.T for weights in f32, bf16, f16, int8, int4 or e4m3.
//
// Every output element is one chain of fused multiply-adds over k in ascending order, whatever the number of tokens,
// the tile or the thread: a token alone and a token in a batch get the same bits. Parallelism comes from computing
// several panels or tokens at once.
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
template <int64_t row_bytes>
QB_INLINE void prefetch_row(const uint8_t* panel, int64_t k) {
    constexpr int64_t every = row_bytes < 64 ? 64 / row_bytes : 1;
    if (k % every == 0)
        for (int64_t line = 0; line < row_bytes; line += 64) __builtin_prefetch(panel + k * row_bytes + line + kAhead);
}

struct DecodeF32 {
    static constexpr int64_t row_bytes = 128;
    QB_INLINE vf at(const uint8_t* row, int64_t column) { return load((const float*)row + column); }
};
struct DecodeBF16 {
    static constexpr int64_t row_bytes = 64;
    QB_INLINE vf at(const uint8_t* row, int64_t column) { return load_bf16(row + 2 * column); }
};
struct DecodeF16 {
    static constexpr int64_t row_bytes = 64;
    QB_INLINE vf at(const uint8_t* row, int64_t column) { return load_f16(row + 2 * column); }
};
struct DecodeInt8 {
    static constexpr int64_t row_bytes = 32;
    QB_INLINE vf at(const uint8_t* row, int64_t column) { return to_float(load_i8(row + column)); }
};
struct DecodeE4M3 {  // a 256th of the value; the scale was multiplied by 256 when packed
    static constexpr int64_t row_bytes = 32;
    QB_INLINE vf at(const uint8_t* row, int64_t column) { return load_e4m3_over_256(row + column); }
};
struct DecodeInt4 {
    static constexpr int64_t row_bytes = 16;
    QB_INLINE vf at(const uint8_t* row, int64_t column) {
        vi both = load_u8(row + (column & 15));
#if defined(QB_AVX512)
        const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
        return _mm512_permutexvar_ps((__m512i)(column < 16 ? both : both >> 4), codes);  // reads the low 4 bits
#else
        return to_float((column < 16 ? both & 15 : both >> 4) - 8);
#endif
    }
};

// y = acc * (activation scale * channel scale) + bias, each step rounded, so that every instruction set agrees.
QB_INLINE void finish(const Linear& l, int64_t token, int64_t column, vf acc) {
    const Weight& w = l.w;
    if (!w.scale_at_load && w.scale) {
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
template <class Decode, bool Scaled, int M, int P>
struct Tile {
    vf acc[M][P][2];

    QB_INLINE void clear(Tile& t) {
        QB_UNROLL
        for (int m = 0; m < M; ++m)
            QB_UNROLL
            for (int p = 0; p < P; ++p) t.acc[m][p][0] = t.acc[m][p][1] = vf{};
    }

    QB_INLINE void add(Tile& t, const float* a, int64_t lda, const uint8_t* panel, int64_t panel_bytes, int64_t column,
                       int64_t from, int64_t to, const vf (*scale)[2], const vf (*offset)[2]) {
        for (int64_t k = from; k < to; ++k) {
            if constexpr (M == 1 && P > 1) {
                QB_UNROLL
                for (int p = 0; p < P; ++p) prefetch_row<Decode::row_bytes>(panel + p * panel_bytes, k);
            }
            vf b[P][2];
            QB_UNROLL
            for (int p = 0; p < P; ++p)
                QB_UNROLL
                for (int h = 0; h < 2; ++h) {
                    b[p][h] = Decode::at(panel + p * panel_bytes + k * Decode::row_bytes, column + h * W);
                    if (Scaled) b[p][h] = fma(b[p][h], scale[p][h], offset[p][h]);
                }
            QB_UNROLL
            for (int m = 0; m < M; ++m) {
                vf x = set1(a[m * lda + k]);
                QB_UNROLL
                for (int p = 0; p < P; ++p)
                    QB_UNROLL
                    for (int h = 0; h < 2; ++h) t.acc[m][p][h] = fma(x, b[p][h], t.acc[m][p][h]);
            }
        }
    }
};

// Scale and offset of the group that holds k, for P panels.
template <int P>
QB_INLINE void load_scales(const Weight& w, int64_t panel, int64_t group, int64_t column, vf (*scale)[2], vf (*offset)[2]) {
    QB_UNROLL
    for (int p = 0; p < P; ++p)
        QB_UNROLL
        for (int h = 0; h < 2; ++h) {
            int64_t at = ((panel + p) * w.groups + group) * kPanel + column + h * W;
            scale[p][h] = load(w.scale + at);
            offset[p][h] = w.offset ? load(w.offset + at) : vf{};
        }
}

// Few tokens: weights are decoded in registers, once for all M tokens.
template <class Decode, bool Scaled, int M, int P>
static void direct_tile(const Linear& l, int64_t token, int64_t panel, int64_t column) {
    using T = Tile<Decode, Scaled, M, P>;
    const Weight& w = l.w;
    const uint8_t* codes = w.codes + panel * w.panel_bytes;
    const float* a = l.a + token * w.columns;
    T t;
    T::clear(t);
    vf scale[P][2], offset[P][2];
    if (!Scaled) {
        T::add(t, a, w.columns, codes, w.panel_bytes, column, 0, w.columns, nullptr, nullptr);
    } else {
        for (int64_t g = 0; g < w.groups; ++g) {
            load_scales<P>(w, panel, g, column, scale, offset);
            int64_t from = g * w.group_size;
            T::add(t, a, w.columns, codes, w.panel_bytes, column, from, smaller(from + w.group_size, w.columns), scale,
                   offset);
        }
    }
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int p = 0; p < P; ++p)
            QB_UNROLL
            for (int h = 0; h < 2; ++h)
                finish(l, token + m, (panel + p) * kPanel + column + h * W, t.acc[m][p][h]);
}

template <class Decode, bool Scaled, int M>
static void direct(const Linear& l, int64_t token, int64_t first, int64_t last) {
    constexpr int P = M == 1 ? 4 : M == 2 ? 2 : 1;
    int64_t panel = first;
    for (; panel + P <= last; panel += P)
        for (int64_t c = 0; c < kPanel; c += kColumns) direct_tile<Decode, Scaled, M, P>(l, token, panel, c);
    for (; panel < last; ++panel)
        for (int64_t c = 0; c < kPanel; c += kColumns) direct_tile<Decode, Scaled, M, 1>(l, token, panel, c);
}

template <class Decode, bool Scaled, int M = kRows>
static void direct_rows(const Linear& l, int64_t token, int64_t rows, int64_t first, int64_t last) {
    if constexpr (M > 1) {
        if (rows < M) return direct_rows<Decode, Scaled, M - 1>(l, token, rows, first, last);
    }
    direct<Decode, Scaled, M>(l, token, first, last);
}

// Many tokens: a block of a panel is decoded into `block` [depth][32] and used by every token of the token block.
template <class Decode, bool Scaled>
static void decode_block(const Weight& w, int64_t panel, int64_t from, int64_t to, float* block) {
    const uint8_t* codes = w.codes + panel * w.panel_bytes;
    for (int64_t c = 0; c < kPanel; c += W) {
        for (int64_t k = from; k < to;) {
            int64_t group = Scaled ? k / w.group_size : 0;
            int64_t end = Scaled ? smaller((group + 1) * w.group_size, to) : to;
            int64_t at = (panel * w.groups + group) * kPanel + c;
            vf scale = Scaled ? load(w.scale + at) : vf{}, offset = Scaled && w.offset ? load(w.offset + at) : vf{};
            for (; k < end; ++k) {
                vf b = Decode::at(codes + k * Decode::row_bytes, c);
                store(block + (k - from) * kPanel + c, Scaled ? fma(b, scale, offset) : b);
            }
        }
    }
}

template <int M>
static void block_tile(const Linear& l, int64_t token, int64_t panel, int64_t column, int64_t from, int64_t to,
                       const float* block) {
    using T = Tile<DecodeF32, false, M, 1>;
    T t;
    int64_t n = panel * kPanel + column;
    bool first = from == 0, last = to == l.w.columns;
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int h = 0; h < 2; ++h) {
            int64_t at = n + h * W, valid = l.w.rows - at;
            const float* y = l.y + (token + m) * l.ldy + at;
            t.acc[m][0][h] = first || valid <= 0 ? vf{} : valid >= W ? load(y) : load_part(y, valid);
        }
    T::add(t, l.a + token * l.w.columns + from, l.w.columns, (const uint8_t*)block, 0, column, 0, to - from, nullptr,
           nullptr);
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int h = 0; h < 2; ++h) {
            int64_t at = n + h * W, valid = l.w.rows - at;
            float* y = l.y + (token + m) * l.ldy + at;
            if (last) finish(l, token + m, at, t.acc[m][0][h]);
            else if (valid >= W) store(y, t.acc[m][0][h]);
            else if (valid > 0) store_part(y, t.acc[m][0][h], valid);
        }
}

template <int M = kRows>
static void block_rows(const Linear& l, int64_t token, int64_t rows, int64_t panel, int64_t from, int64_t to,
                       const float* block) {
    if constexpr (M > 1) {
        if (rows < M) return block_rows<M - 1>(l, token, rows, panel, from, to, block);
    }
    for (int64_t c = 0; c < kPanel; c += kColumns) block_tile<M>(l, token, panel, c, from, to, block);
}

template <class Decode, bool Scaled>
static void blocked(const Linear& l, int64_t first, int64_t last) {
    alignas(64) float block[kDepth * kPanel];
    const Weight& w = l.w;
    for (int64_t t0 = 0; t0 < l.t; t0 += kTokens)
        for (int64_t from = 0; from < w.columns; from += kDepth) {
            int64_t to = smaller(from + kDepth, w.columns), t1 = smaller(t0 + kTokens, l.t);
            for (int64_t panel = first; panel < last; ++panel) {
                const float* source = block;
                if (w.kind == Kind::f32) source = (const float*)(w.codes + panel * w.panel_bytes) + from * kPanel;
                else decode_block<Decode, Scaled>(w, panel, from, to, block);
                for (int64_t t = t0; t < t1; t += kRows)
                    block_rows(l, t, smaller(kRows, t1 - t), panel, from, to, source);
            }
        }
}

template <class Decode>
static void linear_of(const Linear& l, int64_t first, int64_t last) {
    bool few = l.t <= kRows;
    if (l.w.scale_at_load) {
        if (few) direct_rows<Decode, true>(l, 0, l.t, first, last);
        else blocked<Decode, true>(l, first, last);
    } else {
        if (few) direct_rows<Decode, false>(l, 0, l.t, first, last);
        else blocked<Decode, false>(l, first, last);
    }
}

}  // namespace quantbench::QB_ISA
