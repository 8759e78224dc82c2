#include "peaks.h"

#if defined(QB_X86)
#include <immintrin.h>
#endif

namespace quantbench {

namespace {

#if defined(QB_X86)

constexpr int kChains = 12;

#if defined(QB_HAS_AVXVNNI)
__attribute__((target("avx2,avxvnni"))) double avxvnni_int8(int64_t rounds) {
    __m256i acc[kChains], a = _mm256_set1_epi32(0x01020304), b = _mm256_set1_epi32(0x03010201);
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_epi32(i);
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) acc[i] = _mm256_dpbusd_avx_epi32(acc[i], a, b);
    }
    for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(acc[i]));
    return 2.0 * 32 * kChains * double(rounds);
}
#endif

#if defined(QB_HAS_AVX512BF16)
__attribute__((target("avx512f,avx512bf16"))) double avx512_bf16(int64_t rounds) {
    __m512 acc[kChains];
    __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(float(i));
    for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 12
        for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, a);
    }
    for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(acc[i]));
    return 2.0 * 32 * kChains * double(rounds);
}
#endif

#if defined(QB_HAS_AMX)
#define WITH_TILES __attribute__((target("amx-tile,amx-int8,amx-bf16")))

struct alignas(64) Tiles {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

WITH_TILES void begin() {
    Tiles tiles;
    asm volatile("" : : "m"(tiles));
    _tile_loadconfig(&tiles);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
}

WITH_TILES double amx_int8(int64_t rounds) {
    begin();
    for (int64_t r = 0; r < rounds / 16; ++r) {
        _tile_dpbssd(0, 4, 5);
        _tile_dpbssd(1, 4, 5);
        _tile_dpbssd(2, 4, 5);
        _tile_dpbssd(3, 4, 5);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 64 * 4 * double(rounds / 16);
}

WITH_TILES double amx_bf16(int64_t rounds) {
    begin();
    for (int64_t r = 0; r < rounds / 16; ++r) {
        _tile_dpbf16ps(0, 4, 5);
        _tile_dpbf16ps(1, 4, 5);
        _tile_dpbf16ps(2, 4, 5);
        _tile_dpbf16ps(3, 4, 5);
    }
    _tile_release();
    return 2.0 * 16 * 16 * 32 * 4 * double(rounds / 16);
}

#endif

#endif

}  // namespace

Peak peak_of(const std::string& isa, const std::string& kind) {
#if defined(QB_HAS_AVXVNNI)
    if (isa == "avxvnni" && kind == "int8") return avxvnni_int8;
#endif
#if defined(QB_HAS_AVX512BF16)
    if (isa == "avx512bf16" && kind == "bf16") return avx512_bf16;
#endif
#if defined(QB_HAS_AMX)
    if (isa == "amx" && kind == "int8") return amx_int8;
    if (isa == "amx" && kind == "bf16") return amx_bf16;
#endif
    (void)isa, (void)kind;
    return nullptr;
}

}  // namespace quantbench
