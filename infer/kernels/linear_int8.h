// int8 activations times int8 weights, accumulated exactly in int32.
//
// AVX-512 VNNI multiplies unsigned by signed bytes, four at a time: activations are prepared as code + 128 and
// 128 * (sum of the channel's weights) is taken off at the end, which is exact. AVX-VNNI is the same at half the width.
// AVX2 has no such instruction whose sums cannot saturate, so bytes are widened to 16 bits (vpmaddwd). The generic path
// is plain integer arithmetic.
#pragma once

#include "linear_float.h"

namespace quantbench::QB_ISA {

#if defined(QB_AVX512)
using Code = uint8_t;
constexpr int32_t kShift = 128;
constexpr int kDotRows = 12;
#elif defined(QB_AVXVNNI)
using Code = uint8_t;
constexpr int32_t kShift = 128;
constexpr int kDotRows = 6;
#else
using Code = int16_t;
constexpr int32_t kShift = 0;
constexpr int kDotRows = 4;
#endif
constexpr int64_t kDotTokens = 252;

QB_INLINE int64_t strip_of(int64_t digits) { return kDotRows / digits * digits; }  // the digits of a token stay together

// Codes for the tiles: strips of M <= kDotRows tokens as [k / 4][M][4], so that a tile reads one stream. A strip starts
// where its first token would start in plain row order; `first` is a multiple of `strip`.
static void prepare_codes(const int8_t* codes, int64_t first, int64_t last, int64_t columns, int64_t strip, void* out) {
    int64_t quads = (columns + 3) / 4, whole = columns / 4;
    Code* to = (Code*)out;
    for (int64_t t0 = first; t0 < last; t0 += strip) {
        int64_t rows = smaller(strip, last - t0);
        for (int64_t m = 0; m < rows; ++m) {
            const int8_t* from = codes + (t0 + m) * columns;
            Code* at = to + (t0 * quads + m) * 4;
            for (int64_t q = 0; q < whole; ++q, at += rows * 4)
                for (int j = 0; j < 4; ++j) at[j] = Code(from[q * 4 + j] + kShift);
            for (int64_t k = whole * 4; k < quads * 4; ++k, ++at) *at = Code((k < columns ? from[k] : 0) + kShift);
        }
    }
}

static int64_t code_bytes(int64_t t, int64_t columns) { return t * ((columns + 3) / 4 * 4) * int64_t(sizeof(Code)); }

QB_INLINE vf exact_sum(const Linear& l, int64_t column, const int32_t* sums) {
    vi acc, sum;
    std::memcpy(&acc, sums, sizeof acc);
    if (kShift) {
        std::memcpy(&sum, l.w.row_sum + column, sizeof sum);
        acc = acc - sum * kShift;
    }
    return to_float(acc);
}

// The epilogue of a tile of sums [rows][columns]. Products with 256 are exact, so all instruction sets agree.
template <int D>
QB_INLINE void finish_rows(const Linear& l, int64_t row, int64_t rows, int64_t column, int64_t columns, const int32_t* sums) {
    for (int64_t m = 0; m + D <= rows; m += D)
        for (int64_t c = 0; c < columns; c += W) {
            vf acc = exact_sum(l, column + c, sums + m * columns + c);
            for (int64_t d = 1; d < D; ++d) acc = acc * 256.0f + exact_sum(l, column + c, sums + (m + d) * columns + c);
            finish(l, (row + m) / D, column + c, acc);
        }
}

QB_INLINE void finish_sums(const Linear& l, int64_t row, int64_t rows, int64_t column, int64_t columns, const int32_t* sums) {
    if (l.digits == 1) return finish_rows<1>(l, row, rows, column, columns, sums);
    finish_rows<kDigits>(l, row, rows, column, columns, sums);
}

#if defined(QB_AVX512)

// Apart from the loop that made the sums, and not inlined into it, because the compiler otherwise keeps their addresses
// and writes every accumulator to the stack in every step.
template <int D>
static __attribute__((noinline)) void finish_tile(const Linear& l, int64_t row, int64_t rows, int64_t column, int64_t columns,
                                                  const int32_t* sums) {
    finish_rows<D>(l, row, rows, column, columns, sums);
}

template <int M, int P>
static void dot_tile(const Linear& l, int64_t token, int64_t panel) {
    const Weight& w = l.w;
    int64_t quads = (w.columns + 3) / 4;
    const uint8_t* a = (const uint8_t*)l.a + token * quads * 4;
    const uint8_t* b = w.codes + panel * w.panel_bytes;
    __m512i acc[M][P][2];
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int p = 0; p < P; ++p) acc[m][p][0] = acc[m][p][1] = _mm512_setzero_si512();
    for (int64_t q = 0; q < quads; ++q) {
        __m512i x[P][2];
        QB_UNROLL
        for (int p = 0; p < P; ++p)
            QB_UNROLL
            for (int h = 0; h < 2; ++h) x[p][h] = _mm512_loadu_si512(b + p * w.panel_bytes + q * 128 + h * 64);
        QB_UNROLL
        for (int m = 0; m < M; ++m) {
            float four;  // as a float: the compiler then broadcasts from memory instead of through a general register
            std::memcpy(&four, a + (q * M + m) * 4, 4);
            __m512i y = _mm512_castps_si512(_mm512_set1_ps(four));
            QB_UNROLL
            for (int p = 0; p < P; ++p)
                QB_UNROLL
                for (int h = 0; h < 2; ++h) acc[m][p][h] = _mm512_dpbusd_epi32(acc[m][p][h], y, x[p][h]);
        }
    }
    alignas(64) int32_t sums[M][P * kPanel];
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int p = 0; p < P; ++p)
            QB_UNROLL
            for (int h = 0; h < 2; ++h) _mm512_store_si512(sums[m] + p * kPanel + h * W, acc[m][p][h]);
    if (l.digits == 1) return finish_tile<1>(l, token, M, panel * kPanel, P * kPanel, sums[0]);
    finish_tile<kDigits>(l, token, M, panel * kPanel, P * kPanel, sums[0]);
}

#elif defined(QB_AVXVNNI)

// Sixteen channels at a time: twelve sums, two weights and an input fill the registers.
template <int M>
static void dot_sixteen(const Linear& l, int64_t token, int64_t panel, int64_t column) {
    const Weight& w = l.w;
    int64_t quads = (w.columns + 3) / 4;
    const uint8_t* a = (const uint8_t*)l.a + token * quads * 4;
    const uint8_t* b = w.codes + panel * w.panel_bytes + column * 4;
    __m256i acc[M][2];
    QB_UNROLL
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
    for (int64_t q = 0; q < quads; ++q) {
        __m256i x0 = _mm256_loadu_si256((const __m256i*)(b + q * 128));
        __m256i x1 = _mm256_loadu_si256((const __m256i*)(b + q * 128 + 32));
        QB_UNROLL
        for (int m = 0; m < M; ++m) {
            float four;  // see dot_tile above
            std::memcpy(&four, a + (q * M + m) * 4, 4);
            __m256i y = _mm256_castps_si256(_mm256_set1_ps(four));
            acc[m][0] = _mm256_dpbusd_avx_epi32(acc[m][0], y, x0);
            acc[m][1] = _mm256_dpbusd_avx_epi32(acc[m][1], y, x1);
        }
    }
    alignas(32) int32_t sums[M][16];
    QB_UNROLL
    for (int m = 0; m < M; ++m)
        QB_UNROLL
        for (int h = 0; h < 2; ++h) _mm256_store_si256((__m256i*)(sums[m] + h * 8), acc[m][h]);
    finish_sums(l, token, M, panel * kPanel + column, 16, sums[0]);
}

template <int M, int P>
static void dot_tile(const Linear& l, int64_t token, int64_t panel) {
    QB_UNROLL
    for (int p = 0; p < P; ++p)
        for (int64_t c = 0; c < kPanel; c += 16) dot_sixteen<M>(l, token, panel + p, c);
}

#elif defined(QB_AVX2)

// Eight channels at a time: each 16-byte half of a row of the panel holds four channels of four codes.
template <int M>
static void dot_eight(const Linear& l, int64_t token, int64_t panel, int64_t column) {
    const Weight& w = l.w;
    int64_t quads = (w.columns + 3) / 4;
    const int16_t* a = (const int16_t*)l.a + token * quads * 4;
    const uint8_t* b = w.codes + panel * w.panel_bytes + column * 4;
    __m256i acc[M][2];
    QB_UNROLL
    for (int m = 0; m < M; ++m) acc[m][0] = acc[m][1] = _mm256_setzero_si256();
    for (int64_t q = 0; q < quads; ++q) {
        __m256i x0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(b + q * 128)));
        __m256i x1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(b + q * 128 + 16)));
        QB_UNROLL
        for (int m = 0; m < M; ++m) {
            int64_t four;
            std::memcpy(&four, a + (q * M + m) * 4, 8);
            __m256i y = _mm256_set1_epi64x(four);
            acc[m][0] = _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(y, x0));
            acc[m][1] = _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(y, x1));
        }
    }
    alignas(32) int32_t sums[M][8];
    QB_UNROLL
    for (int m = 0; m < M; ++m)  // lanes are pairs of partial sums of one channel; the permutation restores channel order
        _mm256_store_si256((__m256i*)sums[m], _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[m][0], acc[m][1]), 0xd8));
    finish_sums(l, token, M, panel * kPanel + column, 8, sums[0]);
}

template <int M, int P>
static void dot_tile(const Linear& l, int64_t token, int64_t panel) {
    QB_UNROLL
    for (int p = 0; p < P; ++p)
        for (int64_t c = 0; c < kPanel; c += 8) dot_eight<M>(l, token, panel + p, c);
}

#else

template <int M, int P>
static void dot_tile(const Linear& l, int64_t token, int64_t panel) {
    const Weight& w = l.w;
    int64_t quads = (w.columns + 3) / 4;
    for (int p = 0; p < P; ++p) {
        int32_t acc[M][kPanel] = {};
        QB_UNROLL
        for (int m = 0; m < M; ++m) {
            const int16_t* a = (const int16_t*)l.a + token * quads * 4 + m * 4;
            const int8_t* b = (const int8_t*)w.codes + (panel + p) * w.panel_bytes;
            for (int64_t q = 0; q < quads; ++q, b += 128, a += M * 4)
                for (int n = 0; n < kPanel; ++n) {
                    int32_t sum = 0;
                    for (int j = 0; j < 4; ++j) sum += int32_t(a[j]) * b[n * 4 + j];
                    acc[m][n] += sum;
                }
        }
        finish_sums(l, token, M, (panel + p) * kPanel, kPanel, acc[0]);
    }
}

#endif

template <int M>
static void dot_panels(const Linear& l, int64_t token, int64_t first, int64_t last) {
    constexpr int P = M == 1 ? 4 : M == 2 ? 2 : 1;
    int64_t panel = first;
    for (; panel + P <= last; panel += P) dot_tile<M, P>(l, token, panel);
    for (; panel < last; ++panel) dot_tile<M, 1>(l, token, panel);
}

template <int M = kDotRows>
static void dot_rows(const Linear& l, int64_t token, int64_t rows, int64_t first, int64_t last) {
    if constexpr (M > 1) {
        if (rows < M) return dot_rows<M - 1>(l, token, rows, first, last);
    }
    dot_panels<M>(l, token, first, last);
}

// Token blocks stay in L2 while the panels stream past; within one, a panel stays in L1 for all its token tiles.
static void linear_dot(const Linear& l, int64_t first, int64_t last) {
    int64_t strip = strip_of(l.digits);
    if (l.t <= strip) return dot_rows(l, 0, l.t, first, last);
    for (int64_t t0 = 0; t0 < l.t; t0 += kDotTokens) {
        int64_t t1 = smaller(t0 + kDotTokens, l.t);
        for (int64_t panel = first; panel < last; ++panel)
            for (int64_t t = t0; t < t1; t += strip) dot_rows(l, t, smaller(strip, t1 - t), panel, panel + 1);
    }
}

}  // namespace quantbench::QB_ISA
