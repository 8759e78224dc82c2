// Weights as vdpbf16ps wants them: two inputs of a channel side by side, decoded from bf16, int4 or e4m3.
#pragma once

#include "simd.h"

#if defined(QB_BF16)

namespace quantbench::QB_ISA {

// Pairs of 32 channels, as two vectors. `in_order`: the first holds channels 0 to 15, else 8 i to 8 i + 3 (unpacking
// bytes to words works within 16-byte lanes).
struct PairsBF16 {
    static constexpr int64_t bytes = 128, run = 1;  // per pair; pairs that are decoded together
    static constexpr bool in_order = true;
    QB_INLINE void at(const uint8_t* p, int, __m512i* b) {
        b[0] = _mm512_loadu_si512(p);
        b[1] = _mm512_loadu_si512(p + 64);
    }
};

struct PairsInt4 {
    static constexpr int64_t bytes = 32, run = 4;
    static constexpr bool in_order = true;
    QB_INLINE void at(const uint8_t* p, int j, __m512i* b) {
        // bf16 of -8 to 7, twice: the index has five bits, the last of them of the next code
        const __m512i codes = _mm512_broadcast_i64x4(_mm256_setr_epi16(
            (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0, (short)0xc080, (short)0xc040, (short)0xc000,
            (short)0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0));
        QB_UNROLL
        for (int h = 0; h < 2; ++h) {
            __m512i x = _mm512_loadu_si512(p + 64 * h);
            b[h] = _mm512_permutexvar_epi16(j ? _mm512_srli_epi16(x, unsigned(4 * j)) : x, codes);
        }
    }
};

// A 256th of the value: its high and low byte by the code's low 7 bits, from tables of 128.
struct E4M3Tables {
    alignas(64) uint8_t high[128], low[128];
    constexpr E4M3Tables() : high(), low() {
        for (int code = 0; code < 128; ++code) {
            int exponent = code >> 3, mantissa = code & 7;
            if (exponent == 0 && mantissa != 0) {  // a subnormal: shift until the leading bit is the hidden one
                exponent = 1;
                while (mantissa < 8) mantissa <<= 1, --exponent;
                mantissa &= 7;
            } else if (exponent == 0) {
                continue;
            }
            int bits = ((exponent - 7 - 8 + 127) << 7) | (mantissa << 4);
            high[code] = uint8_t(bits >> 8);
            low[code] = uint8_t(bits);
        }
    }
};
static constexpr E4M3Tables kE4M3;

struct PairsE4M3 {
    static constexpr int64_t bytes = 64, run = 1;
    static constexpr bool in_order = false;
    QB_INLINE void at(const uint8_t* p, int, __m512i* b) {
        __m512i x = _mm512_loadu_si512(p);
        const __m512i h0 = _mm512_load_si512(kE4M3.high), h1 = _mm512_load_si512(kE4M3.high + 64);
        const __m512i l0 = _mm512_load_si512(kE4M3.low), l1 = _mm512_load_si512(kE4M3.low + 64);
        __m512i low = _mm512_permutex2var_epi8(l0, x, l1), high = _mm512_permutex2var_epi8(h0, x, h1);
        high = _mm512_ternarylogic_epi32(high, x, _mm512_set1_epi8((char)0x80), 0xf8);  // high | (x & 0x80)
        b[0] = _mm512_unpacklo_epi8(low, high);
        b[1] = _mm512_unpackhi_epi8(low, high);
    }
};

QB_INLINE void restore_order(__m512i* b) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512i x = _mm512_permutex2var_epi64(b[0], first, b[1]);
    b[1] = _mm512_permutex2var_epi64(b[0], second, b[1]);
    b[0] = x;
}

}  // namespace quantbench::QB_ISA

#endif
