// One vector abstraction for every instruction set. A source that includes this is compiled once per instruction set
// with QB_ISA naming the namespace; W is the number of float lanes. Arithmetic operators come from the compiler's
// vector types, so only what they lack is written out per instruction set.
//
// No standard library templates in here or in the sources that include it: the linker keeps one copy of a template,
// and it might be the copy that this machine cannot execute.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(QB_AVX512) || defined(QB_AVX2)
#include <immintrin.h>
#endif

namespace quantbench::QB_ISA {

#if defined(QB_AVX512)
constexpr int W = 16;
#elif defined(QB_AVX2)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

// Register tiles are arrays; only fully unrolled loops let the compiler keep them in registers.
#define QB_UNROLL _Pragma("GCC unroll 16")

#define QB_INLINE static inline __attribute__((always_inline))

QB_INLINE vf bits_to_float(vi x) { return (vf)x; }
QB_INLINE vi float_to_bits(vf x) { return (vi)x; }
QB_INLINE vf set1(float x) { return vf{} + x; }
QB_INLINE vi set1i(int32_t x) { return vi{} + x; }
QB_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
QB_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

QB_INLINE vf load(const float* p) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
QB_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// The first n lanes. Not by memcpy from an inlined argument: the accumulators it came from would be kept in memory.
#if defined(QB_AVX512)
QB_INLINE vf load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p); }
QB_INLINE void store_part(float* p, vf v, int64_t n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), v); }
#else
QB_INLINE vf load_part(const float* p, int64_t n) {
    vf v{};
    std::memcpy(&v, p, size_t(n) * 4);
    return v;
}
static __attribute__((noinline)) void store_part(float* p, vf v, int64_t n) { std::memcpy(p, &v, size_t(n) * 4); }
#endif

#if defined(QB_AVX512)
QB_INLINE vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
QB_INLINE vf vmax(vf a, vf b) { return _mm512_max_ps(a, b); }
QB_INLINE vf vmin(vf a, vf b) { return _mm512_min_ps(a, b); }
QB_INLINE vi load_i8(const void* p) { return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)); }
QB_INLINE vi load_u8(const void* p) { return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
QB_INLINE vi load_u16(const void* p) { return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
QB_INLINE vf load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// e4m3 as half precision is the same bits moved up by 7, with an exponent bias that differs by 8
QB_INLINE vf load_e4m3_over_256(const void* p) {
    __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    __m256i h = _mm256_and_si256(_mm256_slli_epi16(x, 7), _mm256_set1_epi16((short)0xbf80));
    return _mm512_cvtph_ps(h);
}
// The even or the odd bytes of W pairs
QB_INLINE vf load_e4m3_pairs_over_256(const void* p, int odd) {
    __m256i x = _mm256_loadu_si256((const __m256i*)p);
    __m256i h = _mm256_and_si256(_mm256_srai_epi16(odd ? x : _mm256_slli_epi16(x, 8), 1), _mm256_set1_epi16((short)0xbf80));
    return _mm512_cvtph_ps(h);
}
QB_INLINE void store_i8(void* p, vi v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v)); }
QB_INLINE void store_u16(void* p, vi v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v)); }
QB_INLINE void store_f16(void* p, vf v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(QB_AVX2)
QB_INLINE vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
QB_INLINE vf vmax(vf a, vf b) { return _mm256_max_ps(a, b); }
QB_INLINE vf vmin(vf a, vf b) { return _mm256_min_ps(a, b); }
QB_INLINE vi load_i8(const void* p) { return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
QB_INLINE vi load_u8(const void* p) { return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
QB_INLINE vi load_u16(const void* p) { return (vi)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
QB_INLINE vf load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
QB_INLINE vf load_e4m3_over_256(const void* p) {
    __m128i x = _mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)p));
    __m128i h = _mm_and_si128(_mm_slli_epi16(x, 7), _mm_set1_epi16((short)0xbf80));
    return _mm256_cvtph_ps(h);
}
QB_INLINE vf load_e4m3_pairs_over_256(const void* p, int odd) {
    __m128i x = _mm_loadu_si128((const __m128i*)p);
    __m128i h = _mm_and_si128(_mm_srai_epi16(odd ? x : _mm_slli_epi16(x, 8), 1), _mm_set1_epi16((short)0xbf80));
    return _mm256_cvtph_ps(h);
}
QB_INLINE __m128i narrow16(vi v) {
    __m128i low = _mm256_castsi256_si128((__m256i)v), high = _mm256_extracti128_si256((__m256i)v, 1);
    return _mm_packs_epi32(low, high);
}
QB_INLINE void store_i8(void* p, vi v) {
    __m128i wide = narrow16((vi)((v << 24) >> 24));
    _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(wide, wide));
}
QB_INLINE void store_u16(void* p, vi v) { _mm_storeu_si128((__m128i*)p, narrow16((v << 16) >> 16)); }
QB_INLINE void store_f16(void* p, vf v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
QB_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
QB_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
QB_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }
template <class T>
QB_INLINE vi widen(const void* p) {
    T x[W];
    std::memcpy(x, p, sizeof x);
    return vi{x[0], x[1], x[2], x[3]};
}
QB_INLINE vi load_i8(const void* p) { return widen<int8_t>(p); }
QB_INLINE vi load_u8(const void* p) { return widen<uint8_t>(p); }
QB_INLINE vi load_u16(const void* p) { return widen<uint16_t>(p); }
// the exponent is moved to float's place; multiplying by 2^112 corrects its bias, subnormals included
QB_INLINE vf load_f16(const void* p) {
    vi h = load_u16(p);
    vf magnitude = bits_to_float((h & 0x7fff) << 13) * 0x1p112f;
    vi special = (h & 0x7c00) == 0x7c00 ? float_to_bits(magnitude) | 0x7f800000 : float_to_bits(magnitude);
    return bits_to_float(special | ((h & 0x8000) << 16));
}
QB_INLINE vf load_e4m3_over_256(const void* p) {
    vi x = load_u8(p);
    return bits_to_float(((x & 0x7f) << 20) | ((x & 0x80) << 24)) * 0x1p112f;
}
QB_INLINE vf load_e4m3_pairs_over_256(const void* p, int odd) {
    vi x = load_u16(p) >> (odd ? 8 : 0);
    return bits_to_float(((x & 0x7f) << 20) | ((x & 0x80) << 24)) * 0x1p112f;
}
QB_INLINE void store_i8(void* p, vi v) {
    int8_t x[W] = {(int8_t)v[0], (int8_t)v[1], (int8_t)v[2], (int8_t)v[3]};
    std::memcpy(p, x, sizeof x);
}
QB_INLINE void store_u16(void* p, vi v) {
    uint16_t x[W] = {(uint16_t)v[0], (uint16_t)v[1], (uint16_t)v[2], (uint16_t)v[3]};
    std::memcpy(p, x, sizeof x);
}
#endif

QB_INLINE vf to_float(vi x) { return __builtin_convertvector(x, vf); }
QB_INLINE vi truncate(vf x) { return __builtin_convertvector(x, vi); }
QB_INLINE vf magnitude(vf x) { return bits_to_float(float_to_bits(x) & 0x7fffffff); }

// Round half to even for |x| < 2^22: adding 1.5 * 2^23 leaves no bits below one.
QB_INLINE vf round_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }

QB_INLINE vf load_bf16(const void* p) { return bits_to_float(load_u16(p) << 16); }
QB_INLINE void store_bf16(void* p, vf v) {
    vu u = (vu)v;
    u += 0x7fffu + ((u >> 16) & 1u);
    store_u16(p, (vi)(u >> 16));
}

// float32 to e4m3 for |x| <= 448, half to even. Below 2^-6 a code counts steps of 2^-9.
QB_INLINE vi encode_e4m3(vf x) {
    vi sign = (vi)(((vu)x >> 24) & 0x80u);
    vf m = magnitude(x);
    vu u = (vu)m;
    vu normal = ((u + 0x7ffffu + ((u >> 20) & 1u)) >> 20) - (120u << 3);
    vi small = truncate(round_even(m * 512.0f));
    return (m < 0.015625f ? small : (vi)normal) | sign;
}

#if !defined(QB_AVX512) && !defined(QB_AVX2)
// float32 to half, half to even: subnormals by adding a constant whose last bit is the subnormal step 2^-24.
QB_INLINE void store_f16(void* p, vf v) {
    vi sign = (vi)(((vu)v >> 16) & 0x8000u);
    vf m = magnitude(v);
    vu u = (vu)m;
    vi normal = (vi)(((u + 0xfffu + ((u >> 13) & 1u)) >> 13) - (112u << 10));
    vi small = float_to_bits(m + 0.5f) - 0x3f000000;
    vi code = m < 0x1p-14f ? small : normal;
    code = m >= 65520.0f ? set1i(0x7c00) : code;
    code = m != m ? set1i(0x7e00) : code;
    store_u16(p, code | sign);
}
#endif

// e^x to about 1 ulp on [-87, 88], clamped outside: Cody-Waite reduction by ln 2, Taylor polynomial of degree 7.
QB_INLINE vf exponential(vf x) {
    x = vmin(vmax(x, set1(-87.0f)), set1(88.0f));
    vf n = round_even(x * 1.44269504f);
    vf r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(1.0f / 5040);
    p = fma(p, r, set1(1.0f / 720));
    p = fma(p, r, set1(1.0f / 120));
    p = fma(p, r, set1(1.0f / 24));
    p = fma(p, r, set1(1.0f / 6));
    p = fma(p, r, set1(0.5f));
    p = fma(p, r, set1(1.0f));
    p = fma(p, r, set1(1.0f));
    return bits_to_float(float_to_bits(p) + (truncate(n) << 23));
}

QB_INLINE vi lane_numbers() {
#if defined(QB_AVX512)
    return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif defined(QB_AVX2)
    return vi{0, 1, 2, 3, 4, 5, 6, 7};
#else
    return vi{0, 1, 2, 3};
#endif
}

// Sum and maximum of all lanes, as a tree of halves on every instruction set.
#if defined(QB_AVX512) || defined(QB_AVX2)
#if defined(QB_AVX512)
QB_INLINE __m256 low_half(vf v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
QB_INLINE __m256 high_half(vf v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
QB_INLINE __m256 halves_summed(vf v) { return low_half(v) + high_half(v); }
QB_INLINE __m256 larger_half(vf v) { return _mm256_max_ps(low_half(v), high_half(v)); }
#else
QB_INLINE __m256 halves_summed(vf v) { return v; }
QB_INLINE __m256 larger_half(vf v) { return v; }
#endif
QB_INLINE float sum_lanes(vf v) {
    __m256 eight = halves_summed(v);
    __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
}
QB_INLINE float max_lanes(vf v) {
    __m256 eight = larger_half(v);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return two[0] > two[1] ? two[0] : two[1];
}
#else
QB_INLINE float sum_lanes(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
QB_INLINE float max_lanes(vf v) {
    float a = v[0] > v[2] ? v[0] : v[2], b = v[1] > v[3] ? v[1] : v[3];
    return a > b ? a : b;
}
#endif

}  // namespace quantbench::QB_ISA
