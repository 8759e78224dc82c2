// Operations on rows of activations: quantize, add + norm, SwiGLU, RoPE with cache write, embedding.
// All hand on what the numpy reference would, bit for bit where codes depend on it.
#pragma once

#include "linear_float.h"

namespace quantbench::QB_ISA {

constexpr float kSmallestScale = 1.17549435e-38f;  // below it a scale is subnormal; 1 stands in, as in quantizers/
constexpr int32_t kInfinityBits = 0x7f800000;

QB_INLINE vf load_upto(const float* p, int64_t n) { return n >= W ? load(p) : load_part(p, n); }
QB_INLINE void store_upto(float* p, vf v, int64_t n) {
    if (n >= W) store(p, v);
    else store_part(p, v, n);
}

// The bits of the largest magnitude. NaN and infinity compare above every number, so one comparison finds them.
QB_INLINE int32_t absmax_bits(const float* x, int64_t n) {
    vi best{};
    for (int64_t i = 0; i < n; i += W) {
        vi bits = float_to_bits(magnitude(load_upto(x + i, n - i)));
        best = bits > best ? bits : best;
    }
    int32_t top = 0;
    for (int i = 0; i < W; ++i) top = best[i] > top ? best[i] : top;
    return top;
}

// clip(round_half_even(x / scale)) to int8 codes, or the saturating cast to e4m3
QB_INLINE vi encode(vf x, vf scale, Quant format) {
    float limit = format == Quant::int8 ? 127.0f : 448.0f;
    vf q = vmin(vmax(x / scale, set1(-limit)), set1(limit));
    return format == Quant::int8 ? truncate(round_even(q)) : encode_e4m3(q);
}

QB_INLINE void encode_run(const float* x, int64_t n, float scale, Quant format, uint8_t* out) {
    int64_t i = 0;
    for (; i + W <= n; i += W) store_i8(out + i, encode(load(x + i), set1(scale), format));
    if (i < n) {
        uint8_t last[W];
        store_i8(last, encode(load_part(x + i, n - i), set1(scale), format));
        std::memcpy(out + i, last, size_t(n - i));
    }
}

// The scale that a row of so large values has where it is dynamic; NaN where one of them is NaN or infinite.
QB_INLINE float dynamic_scale(int32_t bits, Quant format) {
    float absmax;
    std::memcpy(&absmax, &bits, 4);
    if (bits >= kInfinityBits) return absmax - absmax;
    float scale = absmax / (format == Quant::int8 ? 127.0f : 448.0f);
    return scale < kSmallestScale ? 1.0f : scale;
}

// One row; false where it holds a NaN or an infinity.
static bool quantize_row(const float* x, int64_t width, const Quantize& q, int64_t row) {
    if (q.format == Quant::none) return true;
    int32_t bits = absmax_bits(x, width);
    if (bits >= kInfinityBits) return false;
    float scale = q.static_scale;
    if (q.dynamic) scale = q.scale[row] = dynamic_scale(bits, q.format);
    encode_run(x, width, scale, q.format, (uint8_t*)q.codes + row * width);
    return true;
}

static int64_t quantize(const float* x, int64_t width, const Quantize& q, int64_t first, int64_t last) {
    int64_t bad = -1;
    for (int64_t t = last - 1; t >= first; --t)
        if (!quantize_row(x + t * width, width, q, t)) bad = t;
    return bad;
}

// Floats for int8 weights, see Split: in units of 1 / 0x3f7f7f of the row's largest magnitude they are integers of 23 bits
// (round_even takes no more everywhere), which are three digits of base 256 between -128 and 127. Products of digits are
// exact; what is rounded is less than what summing floats would round.
static void split(const Split& s, int64_t first, int64_t last) {
    constexpr float kMost = 4161407.0f;  // 0x3f7f7f: digits 63, 127, 127
    for (int64_t t = first; t < last; ++t) {
        const float* x = s.x + t * s.columns;
        int32_t bits = absmax_bits(x, s.columns);
        bool finite = bits < kInfinityBits;
        float absmax;
        std::memcpy(&absmax, &bits, 4);
        float scale = absmax / kMost;
        if (scale < kSmallestScale) scale = 1.0f;
        s.scale[t] = finite ? scale : absmax - absmax;  // NaN
        if (!finite) scale = 0.0f;
        int8_t* to = s.codes + t * kDigits * s.columns;
        for (int64_t k = 0; k < s.columns; k += W) {
            int64_t n = smaller(W, s.columns - k);
            vi code{};
            if (finite) code = truncate(round_even(vmin(vmax(load_upto(x + k, n) / scale, set1(-kMost)), set1(kMost))));
            for (int64_t d = kDigits - 1; d >= 0; --d) {
                vi low = ((code & 255) ^ 128) - 128;
                uint8_t digits[W];
                store_i8(digits, low);
                std::memcpy(to + d * s.columns + k, digits, size_t(n));
                code = (code - low) >> 8;
            }
        }
    }
}

// 1 / sqrt(mean of squares + eps), summed in eight double lanes whatever the instruction set: one result everywhere.
QB_INLINE float inverse_rms(const float* x, int64_t n, double eps) {
    double sums[8] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) sums[j] += double(x[i + j]) * double(x[i + j]);
    double sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
    for (; i < n; ++i) sum += double(x[i]) * double(x[i]);
    return float(1.0 / __builtin_sqrt(sum / double(n) + eps));
}

QB_INLINE void scale_by(const float* x, float inverse, const float* weight, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += W)
        store_upto(y + i, load_upto(x + i, n - i) * inverse * load_upto(weight + i, n - i), n - i);
}

static int64_t add_norm(const AddNorm& a, int64_t first, int64_t last) {
    int64_t bad = -1;
    for (int64_t t = last - 1; t >= first; --t) {
        float* x = a.x + t * a.width;
        float* y = a.out.values + t * a.width;
        if (a.delta) {
            const float* d = a.delta + t * a.width;
            for (int64_t i = 0; i < a.width; i += W)
                store_upto(x + i, load_upto(x + i, a.width - i) + load_upto(d + i, a.width - i), a.width - i);
        }
        scale_by(x, inverse_rms(x, a.width, a.eps), a.weight, a.width, y);
        if (!quantize_row(y, a.width, a.out, t)) bad = t;
    }
    return bad;
}

static int64_t silu_mul(const SiluMul& s, int64_t first, int64_t last) {
    int64_t bad = -1;
    for (int64_t t = last - 1; t >= first; --t) {
        const float* gate = s.gate_up + t * 2 * s.width;
        const float* up = gate + s.width;
        float* y = s.out.values + t * s.width;
        for (int64_t i = 0; i < s.width; i += W) {
            vf g = load_upto(gate + i, s.width - i);
            store_upto(y + i, g / (exponential(-g) + 1.0f) * load_upto(up + i, s.width - i), s.width - i);
        }
        if (!quantize_row(y, s.width, s.out, t)) bad = t;
    }
    return bad;
}

constexpr int64_t element_bytes(CacheKind kind) {
    return kind == CacheKind::f32 ? 4 : kind == CacheKind::bf16 || kind == CacheKind::f16 ? 2 : 1;
}

QB_INLINE void store_element(uint8_t* to, vf x, float scale, CacheKind kind) {
    switch (kind) {
        case CacheKind::f32: return store((float*)to, x);
        case CacheKind::bf16: return store_bf16(to, x);
        case CacheKind::f16: return store_f16(to, x);
        case CacheKind::int8: return store_i8(to, encode(x, set1(scale), Quant::int8));
        case CacheKind::e4m3: return store_i8(to, encode(x, set1(scale), Quant::e4m3));
    }
}

// One head of one token into its place in a page.
static void store_head(const float* x, int64_t size, float scale, CacheKind kind, uint8_t* to) {
    int64_t bytes = element_bytes(kind), i = 0;
    for (; i + W <= size; i += W) store_element(to + i * bytes, load(x + i), scale, kind);
    if (i < size) {
        uint8_t last[W * 4];
        store_element(last, load_part(x + i, size - i), scale, kind);
        std::memcpy(to + i * bytes, last, size_t((size - i) * bytes));
    }
}

// RoPE with the halves of a head as pairs; products and differences rounded one by one, as numpy does.
QB_INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t half, float* y) {
    for (int64_t i = 0; i < half; i += W) {
        int64_t n = half - i;
        vf a = load_upto(x + i, n), b = load_upto(x + half + i, n), c = load_upto(cos + i, n), s = load_upto(sin + i, n);
        store_upto(y + i, a * c - b * s, n);
        store_upto(y + half + i, b * c + a * s, n);
    }
}

constexpr int64_t kLargestHead = 512;

// Row t: the query, key and value heads of KV heads [first, last).
static void rope_heads(const RopeWrite& r, int64_t t, int64_t first, int64_t last) {
    const Cache& c = r.cache;
    int64_t d = c.size, bytes = element_bytes(c.kind), group = r.q_heads / c.heads;
    float normed[kLargestHead], turned[kLargestHead];
    const float* row = r.qkv + t * (r.q_heads + 2 * c.heads) * d;
    const float *cos = r.cos + r.positions[t] * (d / 2), *sin = r.sin + r.positions[t] * (d / 2);
    int64_t page = r.slots[t] / kPage, offset = r.slots[t] % kPage;
    Quant format = c.kind == CacheKind::int8 ? Quant::int8 : Quant::e4m3;  // of what is dynamic
    auto scale_of = [&](const float* x, float* scales, int64_t h, int64_t place) {
        return c.dynamic ? scales[place] = dynamic_scale(absmax_bits(x, d), format) : scales[h];
    };
    auto prepared = [&](int64_t h, const float* norm) {
        const float* x = row + h * d;
        if (!norm) return x;
        scale_by(x, inverse_rms(x, d, r.eps), norm, d, normed);
        return (const float*)normed;
    };
    for (int64_t h = first * group; h < last * group; ++h) rotate(prepared(h, r.q_norm), cos, sin, d / 2, r.q + (t * r.q_heads + h) * d);
    for (int64_t h = first; h < last; ++h) {
        int64_t place = (page * c.heads + h) * kPage + offset, at = place * d * bytes;
        const float* value = row + (r.q_heads + c.heads + h) * d;
        rotate(prepared(r.q_heads + h, r.k_norm), cos, sin, d / 2, turned);
        store_head(turned, d, scale_of(turned, c.k_scale, h, place), c.kind, c.k + at);
        store_head(value, d, scale_of(value, c.v_scale, h, place), c.kind, c.v + at);
    }
}

static void rope_write(const RopeWrite& r, int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) rope_heads(r, t, 0, r.cache.heads);
}

// Rows of a packed float table: channel k of row n lies at panel n / 32, place k * 32 + n % 32.
static void embed(const Embed& e, int64_t first, int64_t last) {
    const Weight& w = e.w;
    for (int64_t t = first; t < last; ++t) {
        int64_t n = e.ids[t];
        const uint8_t* panel = w.codes + n / kPanel * w.panel_bytes;
        float* out = e.out + t * w.columns;
        if (w.kind == Kind::f32) {
            for (int64_t k = 0; k < w.columns; ++k) out[k] = ((const float*)panel)[k * kPanel + n % kPanel];
            continue;
        }
        for (int64_t k = 0; k < w.columns; k += W) {
            uint16_t part[W] = {};
            int64_t valid = smaller(W, w.columns - k);
            for (int64_t i = 0; i < valid; ++i) {
                int64_t at = w.kind == Kind::bf16 ? (k + i) / 2 * 2 * kPanel + n % kPanel * 2 + (k + i) % 2 : (k + i) * kPanel + n % kPanel;
                part[i] = ((const uint16_t*)panel)[at];
            }
            store_upto(out + k, w.kind == Kind::bf16 ? load_bf16(part) : load_f16(part), valid);
        }
    }
}

}  // namespace quantbench::QB_ISA
