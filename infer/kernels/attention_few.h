// Attention for few queries, decoding steps above all: keys and values are decoded in registers and used where they lie.
#pragma once

#include "rows.h"

namespace quantbench::QB_ISA {

constexpr int64_t kQueries = 96;      // rows of a tile: tokens times the heads that share a KV head
constexpr int64_t kHeadBlock = 256;   // largest head the tile buffers hold
constexpr int64_t kFew = 8;           // up to here keys are used as they lie; above, transposing them pays
constexpr float kMasked = -3e38f;

// Rows of q, out, k and v are `padded` floats apart: at a distance of 1 KiB they would share few sets of the cache.
struct AttentionTile {
    alignas(64) float q[kQueries * kHeadBlock];      // scaled by 1 / sqrt(d), and by a static k_scale
    alignas(64) float out[kQueries * kHeadBlock];
    alignas(64) float k[kPage * kHeadBlock];         // [key][d] for few queries, [d][key] for many
    alignas(64) float v[kPage * kHeadBlock];         // [key][d]
    alignas(64) float scores[kQueries][kPage];
    float top[kQueries], sum[kQueries];
    int64_t queries, padded;                         // padded: head size rounded up to W

    float* query(int64_t i) { return q + i * padded; }
    float* output(int64_t i) { return out + i * padded; }
};

// What a stored element is multiplied by where it is loaded by `load_scaled`: the queries' and the outputs' scales carry
// it, which is exact as it is a power of two.
constexpr float scale_of(CacheKind kind) { return kind == CacheKind::e4m3 ? 256.0f : 1.0f; }

QB_INLINE vf load_scaled(const uint8_t* p, CacheKind kind) {
    switch (kind) {
        case CacheKind::f32: return load((const float*)p);
        case CacheKind::bf16: return load_bf16(p);
        case CacheKind::f16: return load_f16(p);
        case CacheKind::int8: return to_float(load_i8(p));
        case CacheKind::e4m3: return load_e4m3_over_256(p);
    }
    return vf{};
}

// Pages lie apart, so the processor cannot guess which comes next: lines are asked for while the one before is used.
QB_INLINE void prefetch(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

// W vectors -> the vector of their sums.
QB_INLINE vf sums_of(const vf* x) {
#if defined(QB_AVX512)
    __m512 u[4];
    for (int i = 0; i < 4; ++i) {
        const vf* y = x + 4 * i;
        __m512d t0 = _mm512_castps_pd(_mm512_unpacklo_ps(y[0], y[1]) + _mm512_unpackhi_ps(y[0], y[1]));
        __m512d t1 = _mm512_castps_pd(_mm512_unpacklo_ps(y[2], y[3]) + _mm512_unpackhi_ps(y[2], y[3]));
        u[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(t0, t1)) + _mm512_castpd_ps(_mm512_unpackhi_pd(t0, t1));
    }
    __m512 v0 = _mm512_shuffle_f32x4(u[0], u[1], 0x88) + _mm512_shuffle_f32x4(u[0], u[1], 0xdd);
    __m512 v1 = _mm512_shuffle_f32x4(u[2], u[3], 0x88) + _mm512_shuffle_f32x4(u[2], u[3], 0xdd);
    return _mm512_shuffle_f32x4(v0, v1, 0x88) + _mm512_shuffle_f32x4(v0, v1, 0xdd);
#else
    vf out{};
    for (int i = 0; i < W; ++i) out[i] = sum_lanes(x[i]);
    return out;
#endif
}

// Dot products of G queries with one key of V vectors; V 0: of `size` channels.
template <CacheKind kind, int G, int V>
QB_INLINE void score_key(AttentionTile& t, int64_t q, const uint8_t* key, int64_t size, vf* acc) {
    constexpr int64_t bytes = element_bytes(kind);
    QB_UNROLL
    for (int g = 0; g < G; ++g) acc[g] = vf{};
    if constexpr (V > 0) {
        QB_UNROLL
        for (int i = 0; i < V; ++i) {
            vf x = load_scaled(key + i * W * bytes, kind);
            QB_UNROLL
            for (int g = 0; g < G; ++g) acc[g] = fma(load(t.query(q + g) + i * W), x, acc[g]);
        }
    } else {
        for (int64_t i = 0; i < size; i += W) {
            vf x = load_scaled(key + i * bytes, kind);
            QB_UNROLL
            for (int g = 0; g < G; ++g) acc[g] = fma(load(t.query(q + g) + i), x, acc[g]);
        }
    }
}

// scores[q][key] for heads that are whole vectors, for G queries at a time.
template <CacheKind kind, int G, int V>
static void score_page(AttentionTile& t, int64_t q, const uint8_t* page, int64_t size, int64_t from, int64_t to) {
    constexpr int64_t bytes = element_bytes(kind);
    vf part[G][W], acc[G];
    for (int64_t base = from / W * W; base < to; base += W) {
        int64_t first = larger(base, from), last = smaller(base + W, to);
        if (last - first < W)
            for (int g = 0; g < G; ++g)
                for (int l = 0; l < W; ++l) part[g][l] = vf{};
        for (int64_t j = first; j < last; ++j) {
            score_key<kind, G, V>(t, q, page + j * size * bytes, size, acc);
            QB_UNROLL
            for (int g = 0; g < G; ++g) part[g][j - base] = acc[g];
        }
        for (int g = 0; g < G; ++g) store(t.scores[q + g] + base, sums_of(part[g]));
    }
}

template <CacheKind kind, int G>
static void score_page(AttentionTile& t, int64_t q, const uint8_t* page, int64_t size, int64_t from, int64_t to) {
    if (size == 64) return score_page<kind, G, 64 / W>(t, q, page, size, from, to);
    if (size == 128) return score_page<kind, G, 128 / W>(t, q, page, size, from, to);
    score_page<kind, G, 0>(t, q, page, size, from, to);
}

// out[q] += scores[q] @ values, values decoded in registers.
template <CacheKind kind, int G>
static void add_page(AttentionTile& t, int64_t q, const uint8_t* page, int64_t size, int64_t from, int64_t to) {
    constexpr int64_t bytes = element_bytes(kind);
    constexpr int C = W == 4 ? 2 : 4;
    for (int64_t c = 0; c < size; c += C * W) {
        int64_t vectors = smaller(C, (size - c) / W);
        vf acc[G][C] = {};
        if (vectors == C) {
            for (int64_t j = from; j < to; ++j) {
                QB_UNROLL
                for (int i = 0; i < C; ++i) {
                    vf value = load_scaled(page + (j * size + c + i * W) * bytes, kind);
                    QB_UNROLL
                    for (int g = 0; g < G; ++g) acc[g][i] = fma(set1(t.scores[q + g][j]), value, acc[g][i]);
                }
            }
        } else {
            for (int64_t j = from; j < to; ++j)
                for (int64_t i = 0; i < vectors; ++i) {
                    vf value = load_scaled(page + (j * size + c + i * W) * bytes, kind);
                    for (int g = 0; g < G; ++g) acc[g][i] = fma(set1(t.scores[q + g][j]), value, acc[g][i]);
                }
        }
        for (int g = 0; g < G; ++g)
            for (int64_t i = 0; i < vectors; ++i) {
                float* out = t.output(q + g) + c + i * W;
                store(out, load(out) + acc[g][i]);
            }
    }
}

// Queries in groups of up to 4, over whichever of the two loops `values` names.
template <CacheKind kind>
static void few_queries(AttentionTile& t, bool values, const uint8_t* page, int64_t size, int64_t from, int64_t to) {
    int64_t q = 0;
    for (; q < t.queries; q += smaller(4, t.queries - q)) switch (smaller(4, t.queries - q)) {
            case 4: values ? add_page<kind, 4>(t, q, page, size, from, to) : score_page<kind, 4>(t, q, page, size, from, to); break;
            case 3: values ? add_page<kind, 3>(t, q, page, size, from, to) : score_page<kind, 3>(t, q, page, size, from, to); break;
            case 2: values ? add_page<kind, 2>(t, q, page, size, from, to) : score_page<kind, 2>(t, q, page, size, from, to); break;
            default: values ? add_page<kind, 1>(t, q, page, size, from, to) : score_page<kind, 1>(t, q, page, size, from, to);
        }
}

static void few_queries_of(CacheKind kind, AttentionTile& t, bool values, const uint8_t* page, int64_t size, int64_t from, int64_t to) {
    switch (kind) {
        case CacheKind::f32: return few_queries<CacheKind::f32>(t, values, page, size, from, to);
        case CacheKind::bf16: return few_queries<CacheKind::bf16>(t, values, page, size, from, to);
        case CacheKind::f16: return few_queries<CacheKind::f16>(t, values, page, size, from, to);
        case CacheKind::int8: return few_queries<CacheKind::int8>(t, values, page, size, from, to);
        case CacheKind::e4m3: return few_queries<CacheKind::e4m3>(t, values, page, size, from, to);
    }
}

}  // namespace quantbench::QB_ISA
