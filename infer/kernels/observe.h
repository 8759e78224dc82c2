// What calibration records of an activation, in one pass over it; and loops that reach this core's peaks.
#pragma once

#include "linear_int8.h"
#include "rows.h"

namespace quantbench::QB_ISA {

// Channels [first, last) of one row of the statistics (o.minimum, maximum, histogram and limit are that row's).
// Returns the first token with a NaN or infinity in them, or -1. Magnitudes above the limit fall into the last bin.
static int64_t observe(const Observe& o, int64_t first, int64_t last) {
    static thread_local uint32_t counts[4][kBins];  // four tables: equal neighbours do not wait for each other
    std::memset(counts, 0, sizeof counts);
    float factor = o.limit[0] > 0 ? float(kBins) / o.limit[0] : 0.0f;
    vf low = set1(__builtin_inff()), high = set1(-__builtin_inff());
    int64_t bad = -1;
    for (int64_t t = 0; t < o.t; ++t) {
        const float* x = o.x + t * o.channels;
        vi worst{};
        for (int64_t c = first; c < last; c += W) {
            int64_t n = smaller(W, last - c);
            vf v = load_upto(x + c, n), m = magnitude(v);
            vi bits = float_to_bits(m);
            worst = bits > worst ? bits : worst;
            store_upto(o.channel_absmax + c, vmax(load_upto(o.channel_absmax + c, n), m), n);
            int32_t bins[W];
            vi bin = truncate(vmin(m * factor, set1(float(kBins - 1))));
            std::memcpy(bins, &bin, sizeof bins);
            for (int64_t i = 0; i < n; ++i) ++counts[i & 3][bins[i] & (kBins - 1)];
            for (int64_t i = 0; i < n; ++i) o.channel_sum[c + i] += double(v[i]);
            if (n == W) {
                low = vmin(low, v);
                high = vmax(high, v);
            } else {
                for (int64_t i = 0; i < n; ++i) {
                    low[0] = v[i] < low[0] ? v[i] : low[0];
                    high[0] = v[i] > high[0] ? v[i] : high[0];
                }
            }
        }
        for (int i = 0; i < W; ++i)
            if (worst[i] >= kInfinityBits && bad < 0) bad = t;
    }
    for (int i = 0; i < W; ++i) {
        o.minimum[0] = low[i] < o.minimum[0] ? low[i] : o.minimum[0];
        o.maximum[0] = high[i] > o.maximum[0] ? high[i] : o.maximum[0];
    }
    for (int64_t b = 0; b < kBins; ++b)
        o.histogram[b] += int64_t(counts[0][b]) + counts[1][b] + counts[2][b] + counts[3][b];
    return bad;
}

// The largest magnitude in channels [first, last); NaN where one is NaN.
static float absmax(const float* x, int64_t t, int64_t channels, int64_t first, int64_t last) {
    int32_t top = 0;
    for (int64_t i = 0; i < t; ++i) {
        int32_t bits = absmax_bits(x + i * channels + first, last - first);
        top = bits > top ? bits : top;
    }
    float value;
    std::memcpy(&value, &top, 4);
    return value;
}

constexpr int kChains = 12;

// Both return the number of operations done (a multiply and an add are two), from independent chains in registers.
static double peak_float(int64_t rounds) {
    vf acc[kChains], a = set1(1.0000001f), b = set1(1e-9f);
    for (int i = 0; i < kChains; ++i) acc[i] = set1(float(i));
    for (int64_t r = 0; r < rounds; ++r)
        for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], a, b);
    for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(acc[i]));
    return 2.0 * W * kChains * double(rounds);
}

static double peak_int8(int64_t rounds) {
    vi acc[kChains], a = set1i(0x01020304), b = set1i(0x03010201);
    for (int i = 0; i < kChains; ++i) acc[i] = set1i(i);
    double products = 4;
    for (int64_t r = 0; r < rounds; ++r)
        for (int i = 0; i < kChains; ++i) {
#if defined(QB_AVX512)
            acc[i] = (vi)_mm512_dpbusd_epi32((__m512i)acc[i], (__m512i)a, (__m512i)b);
#elif defined(QB_AVX2)
            acc[i] = (vi)_mm256_add_epi32((__m256i)acc[i], _mm256_madd_epi16((__m256i)(a ^ acc[i]), (__m256i)b));
            products = 2;
#else
            acc[i] = (vi)((vu)acc[i] * (vu)a + (vu)b);
            products = 1;
#endif
        }
    for (int i = 0; i < kChains; ++i) asm volatile("" : : "m"(acc[i]));
    return 2.0 * products * W * kChains * double(rounds);
}

// Sum of everything, so that every byte is read.
static double read_all(const float* x, int64_t count) {
    vf sums[8] = {};
    int64_t i = 0;
    for (; i + 8 * W <= count; i += 8 * W)
        for (int j = 0; j < 8; ++j) sums[j] = sums[j] + load(x + i + j * W);
    vf total{};
    for (int j = 0; j < 8; ++j) total = total + sums[j];
    return double(sum_lanes(total));
}

}  // namespace quantbench::QB_ISA
