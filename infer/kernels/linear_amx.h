// Linear layers by tiles of 16 rows of 64 bytes (AMX): int8 codes times int8 weights, and bf16 times bf16.
//
// A packed panel is what the tile instructions want for their second operand, 16 channels a tile; the first is rows of
// plain codes or bf16. Sums of int8 are exact, so few tokens take the vector path and get the same bits; sums of bf16
// are rounded in an order of their own, so every number of tokens takes the tiles.
#pragma once

#include "linear_bf16.h"
#include "linear_int8.h"

#if defined(QB_AMX)

namespace quantbench::QB_ISA {

constexpr int64_t kTileRows = 16;                // tokens of a tile, and rows of a weight's tile
constexpr int64_t kTileBytes = 64;               // of a row
constexpr int64_t kTileTokens = 2 * kTileRows;   // two tiles of tokens by two of channels: four tiles of sums
constexpr int64_t kTileBlock = 256;              // tokens whose inputs stay in L2 while the panels stream past
constexpr int64_t kRowBytes = 128;               // of a panel: four codes or two bf16 of 32 channels

// The compilers' tile instructions do not say which memory they touch.
QB_INLINE void settle_memory() { asm volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles belong to a thread, and are given back: a thread that keeps them has 8 KB more to save at every switch.
struct Tiles {
    Tiles() {
        TileConfig config;
        for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileBytes, config.rows[i] = kTileRows;
        settle_memory();
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

struct DotTiles {
    QB_INLINE void low() {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
    }
    QB_INLINE void high() {
        _tile_dpbssd(2, 5, 6);
        _tile_dpbssd(3, 5, 7);
    }
};
struct HalfTiles {
    QB_INLINE void low() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    QB_INLINE void high() {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

// Sums [32][32] of 16 or 32 tokens by the 32 channels of a panel. Inputs are rows of `lda` bytes, padded with zeros to a
// multiple of 64; the panel has `rows` rows, whose last ones, where they fill no tile, are copied to one.
template <class Product>
static void tile_product(const uint8_t* a, int64_t lda, bool both, const uint8_t* panel, int64_t rows, void* sums) {
    alignas(64) uint8_t last[kTileRows * kRowBytes];
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t r = 0; r < rows; r += kTileRows) {
        const uint8_t* b = panel + r * kRowBytes;
        const uint8_t* x = a + r / kTileRows * kTileBytes;
        if (rows - r < kTileRows) {
            std::memset(last, 0, sizeof last);
            std::memcpy(last, b, size_t((rows - r) * kRowBytes));
            b = last;
            settle_memory();
        }
        _tile_loadd(6, b, kRowBytes);
        _tile_loadd(7, b + kTileBytes, kRowBytes);
        _tile_loadd(4, x, lda);
        Product::low();
        if (!both) continue;
        _tile_loadd(5, x + kTileRows * lda, lda);
        Product::high();
    }
    uint8_t* to = (uint8_t*)sums;
    _tile_stored(0, to, kRowBytes);
    _tile_stored(1, to + kTileBytes, kRowBytes);
    _tile_stored(2, to + kTileRows * kRowBytes, kRowBytes);
    _tile_stored(3, to + kTileRows * kRowBytes + kTileBytes, kRowBytes);
    settle_memory();
}

QB_INLINE int64_t tile_row(int64_t bytes) { return (bytes + kTileBytes - 1) / kTileBytes * kTileBytes; }
QB_INLINE int64_t tile_tokens(int64_t t) { return (t + kTileRows - 1) / kTileRows * kTileRows; }

// Plain rows; what lies in the rows after the last token is multiplied and thrown away.
static void prepare_tile_codes(const int8_t* codes, int64_t first, int64_t last, int64_t columns, void* out) {
    int64_t row = tile_row(columns);
    for (int64_t t = first; t < last; ++t) {
        uint8_t* to = (uint8_t*)out + t * row;
        std::memcpy(to, codes + t * columns, size_t(columns));
        std::memset(to + columns, 0, size_t(row - columns));
    }
}

static __attribute__((noinline)) void finish_tile_codes(const Linear& l, int64_t token, int64_t tokens, int64_t column,
                                                        const int32_t* sums) {
    for (int64_t m = 0; m < tokens; ++m)
        for (int64_t c = 0; c < kPanel; c += W) {
            vi acc;
            std::memcpy(&acc, sums + m * kPanel + c, sizeof acc);
            finish(l, token + m, column + c, to_float(acc));
        }
}

template <class Product, class Finish>
QB_INLINE void linear_tiles(const Linear& l, int64_t lda, int64_t first, int64_t last, Finish&& done) {
    Tiles tiles;
    alignas(64) int32_t sums[kTileTokens * kPanel];
    const Weight& w = l.w;
    for (int64_t t0 = 0; t0 < l.t; t0 += kTileBlock) {
        int64_t t1 = smaller(t0 + kTileBlock, l.t);
        for (int64_t panel = first; panel < last; ++panel)
            for (int64_t t = t0; t < t1; t += kTileTokens) {
                int64_t tokens = smaller(kTileTokens, t1 - t);
                tile_product<Product>((const uint8_t*)l.a + t * lda, lda, tokens > kTileRows,
                                      w.codes + panel * w.panel_bytes, w.panel_bytes / kRowBytes, sums);
                done(t, tokens, panel * kPanel, sums);
            }
    }
}

static void linear_tile_codes(const Linear& l, int64_t first, int64_t last) {
    linear_tiles<DotTiles>(l, tile_row(l.w.columns), first, last, [&](int64_t t, int64_t tokens, int64_t n, const int32_t* sums) {
        finish_tile_codes(l, t, tokens, n, sums);
    });
}

static void linear_tile_bf16(const Linear& l, int64_t first, int64_t last) {
    linear_tiles<HalfTiles>(l, half_row(l.w.columns) * 2, first, last, [&](int64_t t, int64_t tokens, int64_t n, const int32_t* sums) {
        finish_floats(l, t, tokens, n, kPanel, (const float*)sums);
    });
}

}  // namespace quantbench::QB_ISA

#endif
