// Linear layers by the instruction that adds pairs of bf16 products to float32 sums (vdpbf16ps), at twice the rate of
// float32. Weights are bf16, or int4 or e4m3 codes, each of which is a bf16 value. Inputs are bf16, e4m3 or int8 codes
// (again bf16 values); or floats as the sum of two bf16, which holds 16 of their 24 bits: off by 2^-17 at most, a
// sixteenth of what a float32 sum of a thousand terms may be off by.
//
// As in linear_float.h a token alone and a token in a batch get the same bits: one chain over pairs of k, per group
// where inputs have scales per group.
#pragma once

#include "linear_float.h"
#include "pairs_bf16.h"

#if defined(QB_BF16)

namespace quantbench::QB_ISA {

constexpr int kHalfRows = 12;             // tokens of a register tile
constexpr int64_t kHalfTokens = 144;      // tokens of a block: within L2 beside a panel
constexpr int64_t kHalfDepth = 768;       // k of a decoded block of a panel: 48 KiB

// Apart from the loop that made the sums, and not inlined into it: see finish_tile in linear_int8.h.
static __attribute__((noinline)) void finish_floats(const Linear& l, int64_t token, int64_t tokens, int64_t column,
                                                    int64_t columns, const float* sums) {
    for (int64_t m = 0; m < tokens; ++m)
        for (int64_t c = 0; c < columns; c += W) finish(l, token + m, column + c, load(sums + m * columns + c));
}

#if defined(QB_AMX)
constexpr int64_t kHalfUnit = 32, kHalfStep = 16;  // a tile
#else
constexpr int64_t kHalfUnit = 8, kHalfStep = 1;
#endif
// Prepared inputs: rows padded with zeros to a multiple of kHalfUnit, room for a multiple of kHalfStep tokens.
QB_INLINE int64_t half_row(int64_t columns) { return (columns + kHalfUnit - 1) / kHalfUnit * kHalfUnit; }

QB_INLINE int64_t half_plane(int64_t t, int64_t columns) { return (t + kHalfStep - 1) / kHalfStep * kHalfStep * half_row(columns); }

// Where prepared inputs lie: [terms][t][row]
struct Halves {
    const uint16_t* a;
    int64_t row, plane;
};
QB_INLINE Halves halves_of(const Linear& l, int64_t token) {
    int64_t row = half_row(l.w.columns);
    return {(const uint16_t*)l.a + token * row, row, half_plane(l.t, l.w.columns)};
}

// What one token reads soon of P panels, `at` bytes from their beginnings on; past their ends the next tile begins.
template <class Pairs, int P>
QB_INLINE void prefetch_panels(const uint8_t* panel, int64_t panel_bytes, int64_t at) {
    if (at >= panel_bytes) at += (P - 1) * panel_bytes;
    QB_UNROLL
    for (int p = 0; p < P; ++p)
        for (int64_t line = 0; line < Pairs::run * Pairs::bytes; line += 64)
            __builtin_prefetch(panel + p * panel_bytes + at + line);
}

// The scales of G groups, of the turn after this one.
template <int P, int G>
QB_INLINE void prefetch_scales(const Weight& w, int64_t panel, int64_t group) {
    if (group >= w.groups) group += (P - 1) * w.groups;
    const float* at = w.scale + (panel * w.groups + group) * kPanel;
    QB_UNROLL
    for (int p = 0; p < P; ++p)
        for (int64_t c = 0; c < G * kPanel; c += W) __builtin_prefetch(at + p * w.groups * kPanel + c);
}

// M tokens, P panels side by side, and G groups of inputs at once: one token of one group would be too few chains of
// sums to hide how long one addition takes.
template <int M, int P, int G = 1>
struct HalfTile {
    __m512 acc[G][M][P][2];

    QB_INLINE void clear(HalfTile& t) {
        QB_UNROLL
        for (int g = 0; g < G; ++g)
            QB_UNROLL
            for (int m = 0; m < M; ++m)
                QB_UNROLL
                for (int p = 0; p < P; ++p) t.acc[g][m][p][0] = t.acc[g][m][p][1] = _mm512_setzero_ps();
    }

    // `count` pairs, a multiple of Pairs::run, from pair `from` of the inputs on; the panel begins at its pair `skipped`.
    // Groups lie `apart` pairs from each other.
    template <class Pairs, int terms>
    QB_INLINE void add(HalfTile& t, const Halves& in, int64_t from, const uint8_t* panel, int64_t panel_bytes,
                       int64_t count, int64_t apart = 0, int64_t skipped = 0) {
        for (int64_t i = from; i < from + count; i += Pairs::run)
            QB_UNROLL
            for (int g = 0; g < G; ++g) {
                int64_t pair = i + g * apart, at = (pair - skipped) * Pairs::bytes;
                if constexpr (M == 1) prefetch_panels<Pairs, P>(panel, panel_bytes, at + kAhead + (G - 1) * apart * Pairs::bytes);
                QB_UNROLL
                for (int j = 0; j < Pairs::run; ++j) {
                    __m512i b[P][2];
                    QB_UNROLL
                    for (int p = 0; p < P; ++p) Pairs::at(panel + p * panel_bytes + at, j, b[p]);
                    multiply<terms>(t, in, pair + j, g, b);
                }
            }
    }

    template <int terms>
    QB_INLINE void multiply(HalfTile& t, const Halves& in, int64_t pair, int g, const __m512i (*b)[2]) {
        QB_UNROLL
        for (int m = 0; m < M; ++m)
            QB_UNROLL
            for (int term = 0; term < terms; ++term) {
                float two;  // as a float: see dot_tile in linear_int8.h
                std::memcpy(&two, in.a + term * in.plane + m * in.row + 2 * pair, 4);
                __m512bh x = (__m512bh)_mm512_set1_ps(two);
                QB_UNROLL
                for (int p = 0; p < P; ++p)
                    QB_UNROLL
                    for (int h = 0; h < 2; ++h)
                        t.acc[g][m][p][h] = _mm512_dpbf16_ps(t.acc[g][m][p][h], x, (__m512bh)b[p][h]);
            }
    }

    // totals [M][P][32] += (sums - zero * sum of the inputs) * scale, group after group
    QB_INLINE void add_groups(const HalfTile& t, const Linear& l, int64_t token, int64_t panel, int64_t group, float* totals) {
        const Weight& w = l.w;
        QB_UNROLL
        for (int g = 0; g < G; ++g)
            QB_UNROLL
            for (int p = 0; p < P; ++p)
                QB_UNROLL
                for (int h = 0; h < 2; ++h) {
                    int64_t at = ((panel + p) * w.groups + group + g) * kPanel + h * W;
                    vf scale = load(w.scale + at), offset = w.offset ? load(w.offset + at) : vf{};
                    QB_UNROLL
                    for (int m = 0; m < M; ++m) {
                        float* total = totals + (m * P + p) * kPanel + h * W;
                        vf sum = t.acc[g][m][p][h];
                        if (w.offset) sum = fma(set1(l.a_sums[(token + m) * w.groups + group + g]), offset, sum);
                        store(total, fma(sum, scale, load(total)));
                    }
                }
    }

    template <class Pairs>
    QB_INLINE void order(HalfTile& t) {
        if constexpr (!Pairs::in_order) {
            QB_UNROLL
            for (int g = 0; g < G; ++g)
                QB_UNROLL
                for (int m = 0; m < M; ++m)
                    QB_UNROLL
                    for (int p = 0; p < P; ++p) {
                        __m512i b[2] = {_mm512_castps_si512(t.acc[g][m][p][0]), _mm512_castps_si512(t.acc[g][m][p][1])};
                        restore_order(b);
                        t.acc[g][m][p][0] = _mm512_castsi512_ps(b[0]), t.acc[g][m][p][1] = _mm512_castsi512_ps(b[1]);
                    }
        }
    }

    QB_INLINE void save(const HalfTile& t, float* to) {
        QB_UNROLL
        for (int m = 0; m < M; ++m)
            QB_UNROLL
            for (int p = 0; p < P; ++p)
                QB_UNROLL
                for (int h = 0; h < 2; ++h) _mm512_store_ps(to + (m * P + p) * kPanel + h * W, t.acc[0][m][p][h]);
    }
};

#if !defined(QB_AMX)

// Few tokens: weights are decoded in registers.
template <class Pairs, int terms, int M, int P, int G>
QB_INLINE void half_groups(const Linear& l, int64_t token, int64_t panel, int64_t group, float* totals) {
    using T = HalfTile<M, P, G>;
    const Weight& w = l.w;
    int64_t size = w.group_size / 2, from = group * size, count = smaller(size, w.panel_bytes / Pairs::bytes - from);
    T t;
    T::clear(t);
    if constexpr (M == 1) prefetch_scales<P, G>(w, panel, group + G);
    T::template add<Pairs, terms>(t, halves_of(l, token), from, w.codes + panel * w.panel_bytes, w.panel_bytes, count, size);
    T::template order<Pairs>(t);
    T::add_groups(t, l, token, panel, group, totals);
}

template <class Pairs, int terms, bool scaled, int M, int P>
static void half_direct(const Linear& l, int64_t token, int64_t panel) {
    const Weight& w = l.w;
    alignas(64) float totals[M * P * kPanel];
    if constexpr (!scaled) {
        using T = HalfTile<M, P>;
        T t;
        T::clear(t);
        T::template add<Pairs, terms>(t, halves_of(l, token), 0, w.codes + panel * w.panel_bytes, w.panel_bytes,
                                      w.panel_bytes / Pairs::bytes);
        T::template order<Pairs>(t);
        T::save(t, totals);
    } else {
        std::memset(totals, 0, sizeof totals);
        int64_t whole = w.columns / w.group_size, g = 0;
        if constexpr (M == 1)
            for (; g + 2 <= whole; g += 2) half_groups<Pairs, terms, M, P, 2>(l, token, panel, g, totals);
        for (; g < w.groups; ++g) half_groups<Pairs, terms, M, P, 1>(l, token, panel, g, totals);
    }
    finish_floats(l, token, M, panel * kPanel, P * kPanel, totals);
}

template <class Pairs, int terms, bool scaled, int M = kHalfRows>
static void half_direct_rows(const Linear& l, int64_t token, int64_t rows, int64_t first, int64_t last) {
    if constexpr (M > 1) {
        if (rows < M) return half_direct_rows<Pairs, terms, scaled, M - 1>(l, token, rows, first, last);
    }
    constexpr int P = M == 1 ? 4 : M == 2 ? 2 : 1;
    int64_t panel = first;
    for (; panel + P <= last; panel += P) half_direct<Pairs, terms, scaled, M, P>(l, token, panel);
    for (; panel < last; ++panel) half_direct<Pairs, terms, scaled, M, 1>(l, token, panel);
}

// The sums [tokens][32] of a tile that lie in y between two blocks of k.
static __attribute__((noinline)) void load_sums(const Linear& l, int64_t token, int64_t tokens, int64_t n, float* sums) {
    for (int64_t m = 0; m < tokens; ++m)
        for (int64_t c = 0; c < kPanel && n + c < l.w.rows; c += W) {
            const float* y = l.y + (token + m) * l.ldy + n + c;
            store(sums + m * kPanel + c, n + c + W <= l.w.rows ? load(y) : load_part(y, l.w.rows - n - c));
        }
}
static __attribute__((noinline)) void store_sums(const Linear& l, int64_t token, int64_t tokens, int64_t n, const float* sums) {
    for (int64_t m = 0; m < tokens; ++m)
        for (int64_t c = 0; c < kPanel && n + c < l.w.rows; c += W) {
            float* y = l.y + (token + m) * l.ldy + n + c;
            if (n + c + W <= l.w.rows) store(y, load(sums + m * kPanel + c));
            else store_part(y, load(sums + m * kPanel + c), l.w.rows - n - c);
        }
}

// Many tokens: pairs [from, to) of a panel of `pairs`, as bf16 in order, used by every token of a block.
struct HalfBlock {
    int64_t panel, from, to, pairs;
    const uint8_t* codes;
};

template <int terms, bool scaled, int M>
static void half_block(const Linear& l, int64_t token, const HalfBlock& b) {
    using T = HalfTile<M, 1>;
    const Weight& w = l.w;
    Halves in = halves_of(l, token);
    alignas(64) float totals[M * kPanel] = {};
    if (b.from > 0) load_sums(l, token, M, b.panel * kPanel, totals);
    T t;
    if constexpr (!scaled) {
        QB_UNROLL
        for (int m = 0; m < M; ++m)
            QB_UNROLL
            for (int h = 0; h < 2; ++h) t.acc[0][m][0][h] = _mm512_load_ps(totals + m * kPanel + h * W);
        T::template add<PairsBF16, terms>(t, in, b.from, b.codes, 0, b.to - b.from, 0, b.from);
        T::save(t, totals);
    } else {
        for (int64_t k = b.from; k < b.to; k += w.group_size / 2) {
            int64_t stop = smaller(k + w.group_size / 2, b.to);
            T::clear(t);
            T::template add<PairsBF16, terms>(t, in, k, b.codes, 0, stop - k, 0, b.from);
            T::add_groups(t, l, token, b.panel, 2 * k / w.group_size, totals);
        }
    }
    if (b.to == b.pairs) finish_floats(l, token, M, b.panel * kPanel, kPanel, totals);
    else store_sums(l, token, M, b.panel * kPanel, totals);
}

template <int terms, bool scaled, int M = kHalfRows>
static void half_block_rows(const Linear& l, int64_t token, int64_t rows, const HalfBlock& b) {
    if constexpr (M > 1) {
        if (rows < M) return half_block_rows<terms, scaled, M - 1>(l, token, rows, b);
    }
    half_block<terms, scaled, M>(l, token, b);
}

template <class Pairs>
static void decode_pairs(const uint8_t* codes, int64_t count, uint8_t* block) {
    for (int64_t i = 0; i < count; i += Pairs::run)
        QB_UNROLL
        for (int j = 0; j < Pairs::run; ++j) {
            __m512i b[2];
            Pairs::at(codes + i * Pairs::bytes, j, b);
            if (!Pairs::in_order) restore_order(b);
            _mm512_store_si512(block + (i + j) * PairsBF16::bytes, b[0]);
            _mm512_store_si512(block + (i + j) * PairsBF16::bytes + 64, b[1]);
        }
}

template <class Pairs, int terms, bool scaled>
static void half_blocked(const Linear& l, int64_t first, int64_t last) {
    constexpr bool decoded = Pairs::bytes != PairsBF16::bytes;
    alignas(64) uint8_t block[decoded ? kHalfDepth / 2 * PairsBF16::bytes : 1];
    const Weight& w = l.w;
    int64_t pairs = w.panel_bytes / Pairs::bytes;
    int64_t depth = (scaled ? kHalfDepth / w.group_size * w.group_size : kHalfDepth) / 2;
    for (int64_t t0 = 0; t0 < l.t; t0 += kHalfTokens)
        for (int64_t from = 0; from < pairs; from += depth) {
            int64_t to = smaller(from + depth, pairs), t1 = smaller(t0 + kHalfTokens, l.t);
            for (int64_t panel = first; panel < last; ++panel) {
                const uint8_t* codes = w.codes + panel * w.panel_bytes + from * Pairs::bytes;
                if (decoded) decode_pairs<Pairs>(codes, to - from, block);
                HalfBlock b{panel, from, to, pairs, decoded ? block : codes};
                for (int64_t t = t0; t < t1; t += kHalfRows)
                    half_block_rows<terms, scaled>(l, t, smaller(kHalfRows, t1 - t), b);
            }
        }
}

template <class Pairs, int terms, bool scaled = false>
static void half_by_tokens(const Linear& l, int64_t first, int64_t last) {
    if (l.t <= kHalfRows) half_direct_rows<Pairs, terms, scaled>(l, 0, l.t, first, last);
    else half_blocked<Pairs, terms, scaled>(l, first, last);
}

template <class Pairs, int terms>
static void half_by_groups(const Linear& l, int64_t first, int64_t last) {
    if (l.w.groups > 1) half_by_tokens<Pairs, terms, true>(l, first, last);
    else half_by_tokens<Pairs, terms>(l, first, last);
}

#endif

// What a float input is split into; codes are one bf16 value each.
QB_INLINE int terms_of(Kind kind, Quant format) { return kind != Kind::bf16 && format == Quant::none ? 2 : 1; }

#if !defined(QB_AMX)

static void linear_bf16(const Linear& l, int64_t first, int64_t last) {
    if (l.w.kind == Kind::bf16) return half_by_tokens<PairsBF16, 1>(l, first, last);
    bool two = terms_of(l.w.kind, l.format) == 2;
    if (l.w.kind == Kind::int4 && two) return half_by_groups<PairsInt4, 2>(l, first, last);
    if (l.w.kind == Kind::e4m3) return two ? half_by_groups<PairsE4M3, 2>(l, first, last) : half_by_groups<PairsE4M3, 1>(l, first, last);
}

#endif

// Groups must begin where codes that are decoded together do, and a block of a decoded panel must hold one whole.
// Where there are tiles they take bf16 weights, and nothing else comes here: on those processors the vector instruction
// is slower than float32 (an Intel Xeon with AMX: 43 % of it).
static bool suits_bf16(const Prepare& p) {
    if (p.kind == Kind::bf16) return true;
#if defined(QB_AMX)
    return false;
#else
    bool kinds = p.kind == Kind::e4m3 || (p.kind == Kind::int4 && p.format == Quant::none);
    return kinds && (p.groups == 1 || (p.group_size % 8 == 0 && p.group_size <= kHalfDepth));
#endif
}

}  // namespace quantbench::QB_ISA

#endif
