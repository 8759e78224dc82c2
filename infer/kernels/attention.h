// Attention over the paged cache as it is stored: pages are decoded to float32 in L1/L2 and used at once by every
// query of a tile (all heads of a KV group, several tokens), with the online softmax of Milakov & Gimelshein 2018.
#pragma once

#include "attention_soften.h"

namespace quantbench::QB_ISA {

static void decode_rows(const uint8_t* page, CacheKind kind, int64_t size, int64_t padded, int64_t from, int64_t to, float* out) {
    int64_t bytes = element_bytes(kind);
    for (int64_t j = from; j < to; ++j) {
        const uint8_t* row = page + j * size * bytes;
        int64_t i = 0;
        for (; i + W <= size; i += W) store(out + j * padded + i, load_scaled(row + i * bytes, kind));
        if (i < size) {
            uint8_t last[W * 4] = {};
            std::memcpy(last, row + i * bytes, size_t((size - i) * bytes));
            store(out + j * padded + i, load_scaled(last, kind));
        }
    }
}

// scores[q][key] for few queries: dot products along d, W keys at a time.
static void score_few(AttentionTile& t, int64_t from, int64_t to) {
    for (int64_t j = from / W * W; j < to; j += W)
        for (int64_t q = 0; q < t.queries; ++q) {
            const float* query = t.query(q);
            vf part[W];
            for (int l = 0; l < W; ++l) {
                const float* key = t.k + (j + l) * t.padded;
                vf acc = load(query) * load(key);
                for (int64_t i = W; i < t.padded; i += W) acc = fma(load(query + i), load(key + i), acc);
                part[l] = acc;
            }
            store(t.scores[q] + j, sums_of(part));
        }
}

#if defined(QB_AVX512)
// 16 keys x 16 channels: neighbours are paired twice, then 128-bit lanes are dealt out to their rows.
QB_INLINE void transpose_block(const float* rows, int64_t stride, float* out) {
    __m512 t[16];
    for (int i = 0; i < 16; i += 2) {
        __m512 a = load(rows + i * stride), b = load(rows + (i + 1) * stride);
        t[i] = _mm512_unpacklo_ps(a, b);
        t[i + 1] = _mm512_unpackhi_ps(a, b);
    }
    __m512 u[16];
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; ++j) {
            __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + 2 + j]);
            u[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            u[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    for (int c = 0; c < 4; ++c) {
        __m512 even = _mm512_shuffle_f32x4(u[c], u[4 + c], 0x88), odd = _mm512_shuffle_f32x4(u[c], u[4 + c], 0xdd);
        __m512 even2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0x88);
        __m512 odd2 = _mm512_shuffle_f32x4(u[8 + c], u[12 + c], 0xdd);
        store(out + c * kPage, _mm512_shuffle_f32x4(even, even2, 0x88));
        store(out + (4 + c) * kPage, _mm512_shuffle_f32x4(odd, odd2, 0x88));
        store(out + (8 + c) * kPage, _mm512_shuffle_f32x4(even, even2, 0xdd));
        store(out + (12 + c) * kPage, _mm512_shuffle_f32x4(odd, odd2, 0xdd));
    }
}
#endif

// t.k [channel][key] from rows [key][padded]; keys outside [from, to) become zero.
static void transpose_keys(AttentionTile& t, float* rows, int64_t size, int64_t from, int64_t to) {
    for (int64_t j = 0; j < kPage; ++j)
        if (j < from || j >= to) std::memset(rows + j * t.padded, 0, size_t(t.padded) * 4);
    int64_t done = 0;
#if defined(QB_AVX512)
    for (; done + 16 <= size; done += 16)
        for (int64_t j = 0; j < kPage; j += 16) transpose_block(rows + j * t.padded + done, t.padded, t.k + done * kPage + j);
#endif
    for (int64_t i = done; i < size; ++i)
        for (int64_t j = 0; j < kPage; ++j) t.k[i * kPage + j] = rows[j * t.padded + i];
}

constexpr int kTileQueries = W == 4 ? 4 : 6;  // of a register tile: with 64 keys or channels, 24 accumulators of 32
constexpr int kTileVectors = W == 16 ? 4 : 2;

// scores[q + m][key] for keys [0, to), and rubbish behind them up to a multiple of C vectors.
template <int M, int C>
QB_INLINE void score_tile(AttentionTile& t, int64_t q, int64_t size, int64_t to) {
    const float* query = t.query(q);
    int64_t stride = t.padded;
    for (int64_t c = 0; c < to; c += C * W) {
        vf acc[M][C];
        QB_UNROLL
        for (int m = 0; m < M; ++m)
            QB_UNROLL
            for (int i = 0; i < C; ++i) acc[m][i] = vf{};
        for (int64_t d = 0; d < size; ++d) {
            vf b[C];
            QB_UNROLL
            for (int i = 0; i < C; ++i) b[i] = load(t.k + d * kPage + c + i * W);
            QB_UNROLL
            for (int m = 0; m < M; ++m) {
                vf x = set1(query[m * stride + d]);
                QB_UNROLL
                for (int i = 0; i < C; ++i) acc[m][i] = fma(x, b[i], acc[m][i]);
            }
        }
        QB_UNROLL
        for (int m = 0; m < M; ++m)
            QB_UNROLL
            for (int i = 0; i < C; ++i) store(t.scores[q + m] + c + i * W, acc[m][i]);
    }
}

template <int M>
QB_INLINE void score_rows(AttentionTile& t, int64_t q, int64_t size, int64_t to) {
    if (kTileVectors == 4 && to <= 2 * W) return score_tile<M, 2>(t, q, size, to);
    score_tile<M, kTileVectors>(t, q, size, to);
}

// out[q + m] += weights @ values for channels [c, c + C * W).
template <int M, int C>
QB_INLINE void add_tile(AttentionTile& t, int64_t q, int64_t c, int64_t from, int64_t to) {
    const float* values = t.v + c;
    const float* weights = t.scores[q];
    float* out = t.output(q) + c;
    int64_t stride = t.padded;
    vf acc[M][C];
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int i = 0; i < C; ++i) acc[m][i] = load(out + m * stride + i * W);
    for (int64_t j = from; j < to; ++j) {
        vf b[C];
        QB_UNROLL
        for (int i = 0; i < C; ++i) b[i] = load(values + j * stride + i * W);
        QB_UNROLL
        for (int m = 0; m < M; ++m) {
            vf x = set1(weights[m * kPage + j]);
            QB_UNROLL
            for (int i = 0; i < C; ++i) acc[m][i] = fma(x, b[i], acc[m][i]);
        }
    }
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int i = 0; i < C; ++i) store(out + m * stride + i * W, acc[m][i]);
}

template <int M>
QB_INLINE void add_values(AttentionTile& t, int64_t q, int64_t from, int64_t to) {
    int64_t c = 0;
    for (; c + kTileVectors * W <= t.padded; c += kTileVectors * W) add_tile<M, kTileVectors>(t, q, c, from, to);
    for (; c < t.padded; c += W) add_tile<M, 1>(t, q, c, from, to);
}

static void load_queries(AttentionTile& t, const Attention& a, int64_t row, int64_t rows, int64_t head, int64_t heads, float scale) {
    int64_t d = a.cache.size;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t h = 0; h < heads; ++h) {
            int64_t i = r * heads + h;
            const float* q = a.q + ((row + r) * a.q_heads + head + h) * d;
            for (int64_t k = 0; k < t.padded; k += W) {
                store(t.query(i) + k, k < d ? load_upto(q + k, d - k) * scale : vf{});
                store(t.output(i) + k, vf{});
            }
            t.top[i] = kMasked;
            t.sum[i] = 0.0f;
        }
}

static void score_pages(AttentionTile& t, const uint8_t* page, CacheKind kind, int64_t size, int64_t from, int64_t to, const Sight& sight) {
    if (t.queries <= kFew) {
        decode_rows(page, kind, size, t.padded, from, to, t.k);
        for (int64_t j = from / W * W; j < from; ++j) std::memset(t.k + j * t.padded, 0, size_t(t.padded) * 4);
        for (int64_t j = to; j < (to + W - 1) / W * W; ++j) std::memset(t.k + j * t.padded, 0, size_t(t.padded) * 4);
        return score_few(t, from, to);
    }
    decode_rows(page, kind, size, t.padded, from, to, t.v);
    transpose_keys(t, t.v, size, from, to);
    int64_t q = 0;
    for (; q + kTileQueries <= t.queries; q += kTileQueries) score_rows<kTileQueries>(t, q, size, sight.last(q + kTileQueries - 1));
    for (; q + 3 <= t.queries; q += 3) score_rows<3>(t, q, size, sight.last(q + 2));
    for (; q < t.queries; ++q) score_rows<1>(t, q, size, sight.last(q));
}

static void add_pages(AttentionTile& t, const uint8_t* page, CacheKind kind, int64_t size, int64_t from, int64_t to, const Sight& sight) {
    decode_rows(page, kind, size, t.padded, from, to, t.v);
    int64_t q = 0;
    for (; q + kTileQueries <= t.queries; q += kTileQueries)
        add_values<kTileQueries>(t, q, larger(from, sight.first(q)), sight.last(q + kTileQueries - 1));
    for (; q + 3 <= t.queries; q += 3) add_values<3>(t, q, larger(from, sight.first(q)), sight.last(q + 2));
    for (; q < t.queries; ++q) add_values<1>(t, q, larger(from, sight.first(q)), sight.last(q));
}

// Tokens [first, last) of one sequence, query heads of one KV head.
static void attention_tile(const Attention& a, int64_t sequence, int64_t kv_head, int64_t first, int64_t last, int64_t head, int64_t heads) {
    static thread_local AttentionTile t;
    const Cache& c = a.cache;
    int64_t row = a.starts[sequence] + first, rows = last - first, token_bytes = c.size * element_bytes(c.kind);
    int64_t position = a.context[sequence] - (a.starts[sequence + 1] - a.starts[sequence]) + first;
    const int32_t* table = a.tables + sequence * a.table_width;
    t.queries = rows * heads;
    t.padded = (c.size + W - 1) / W * W;
    float k_scale = c.dynamic ? 1.0f : c.k_scale[kv_head], v_scale = c.dynamic ? 1.0f : c.v_scale[kv_head];
    load_queries(t, a, row, rows, head, heads, float(1.0 / __builtin_sqrt(double(c.size))) * k_scale * scale_of(c.kind));
    bool direct = t.queries <= kFew && c.size % W == 0;
    int64_t oldest = a.window ? larger(0, position - a.window + 1) : 0, newest = position + rows;
    for (int64_t base = oldest / kPage * kPage; base < newest; base += kPage) {
        int64_t from = larger(oldest - base, 0), to = smaller(kPage, newest - base);
        Sight sight{position, a.window, base, heads};
        int64_t place = (table[base / kPage] * c.heads + kv_head) * kPage, at = place * token_bytes;
        if (direct) {
            if (c.dynamic) prefetch((const uint8_t*)(c.v_scale + place), kPage * 4);  // first: it is wanted before all of V
            prefetch(c.v + at + from * token_bytes, (to - from) * token_bytes);
            few_queries_of(c.kind, t, false, c.k + at, c.size, from, to);
        } else {
            score_pages(t, c.k + at, c.kind, c.size, from, to, sight);
        }
        if (c.dynamic) scale_scores(t, c.k_scale + place);
        soften(t, sight);
        if (c.dynamic) scale_scores(t, c.v_scale + place);
        if (direct) {
            if (base + kPage < newest) {
                int64_t next = (table[base / kPage + 1] * c.heads + kv_head) * kPage;
                if (c.dynamic) prefetch((const uint8_t*)(c.k_scale + next), kPage * 4);
                prefetch(c.k + next * token_bytes, smaller(kPage, newest - base - kPage) * token_bytes);
            }
            few_queries_of(c.kind, t, true, c.v + at, c.size, from, to);
        } else {
            add_pages(t, c.v + at, c.kind, c.size, from, to, sight);
        }
    }
    for (int64_t q = 0; q < t.queries; ++q) {
        float* out = a.out + ((row + q / heads) * a.q_heads + head + q % heads) * c.size;
        float scale = v_scale * scale_of(c.kind) / t.sum[q];
        for (int64_t i = 0; i < c.size; i += W) store_upto(out + i, load(t.output(q) + i) * scale, c.size - i);
    }
}

static void attention(const Attention& a, int64_t sequence, int64_t kv_head, int64_t first, int64_t last) {
    int64_t group = a.q_heads / a.cache.heads;
    for (int64_t h = 0; h < group; h += kQueries) {
        int64_t heads = smaller(kQueries, group - h), rows = larger(1, kQueries / heads);
        for (int64_t t = first; t < last; t += rows)
            attention_tile(a, sequence, kv_head, t, smaller(t + rows, last), kv_head * group + h, heads);
    }
}

// A decoding step's row of one sequence, KV heads [first, last): RoPE, cache write and attention while all is in L1.
static void decode(const RopeWrite& r, const Attention& a, int64_t sequence, int64_t first, int64_t last) {
    const Cache& c = a.cache;
    int64_t token_bytes = c.size * element_bytes(c.kind), context = a.context[sequence];
    int64_t oldest = a.window ? larger(0, context - a.window) / kPage : 0, tokens = smaller(kPage, context - oldest * kPage);
    const uint8_t* keys = c.k + a.tables[sequence * a.table_width + oldest] * c.heads * kPage * token_bytes;
    prefetch(keys + first * kPage * token_bytes, tokens * token_bytes);
    rope_heads(r, a.starts[sequence], first, last);
    for (int64_t head = first; head < last; ++head) {
        if (head + 1 < last) prefetch(keys + (head + 1) * kPage * token_bytes, tokens * token_bytes);
        attention(a, sequence, head, 0, 1);
    }
}

}  // namespace quantbench::QB_ISA
