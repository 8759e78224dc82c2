// What a linear multiplies on this instruction set, how its input is made ready for that, and the way to its kernel.
#pragma once

#include "linear_amx.h"
#include "linear_bf16.h"
#include "linear_float.h"
#include "linear_int8.h"

namespace quantbench::QB_ISA {

enum class Product { f32, bf16, int8 };

QB_INLINE Product product_of(const Prepare& p) {
    if (p.kind == Kind::int8_dot) return Product::int8;
#if defined(QB_BF16)
    if (suits_bf16(p)) return Product::bf16;
#endif
    return Product::f32;
}

static int64_t prepared_bytes(const Prepare& p) {
    switch (product_of(p)) {
#if defined(QB_AMX)
        case Product::int8:
            return p.t > kDotRows && p.digits == 1 ? tile_tokens(p.t) * tile_row(p.columns) : code_bytes(p.t, p.columns);
#else
        case Product::int8: return code_bytes(p.t, p.columns);
#endif
#if defined(QB_BF16)
        case Product::bf16: return terms_of(p.kind, p.format) * half_plane(p.t, p.columns) * 2;
#endif
        default: return p.kind == Kind::bf16 || p.format != Quant::none ? p.t * p.columns * 4 : 0;
    }
}

QB_INLINE vf load_codes(const uint8_t* codes, int64_t n, Quant format) {
    uint8_t part[W] = {};
    std::memcpy(part, codes, size_t(smaller(n, W)));
    return format == Quant::int8 ? to_float(load_i8(part)) : load_e4m3_over_256(part) * 256.0f;
}

QB_INLINE vf load_input(const Prepare& p, int64_t row, int64_t k, int64_t n) {
    int64_t at = row * p.columns + k;
    if (p.format != Quant::none) return load_codes((const uint8_t*)p.source + at, n, p.format);
    return n >= W ? load((const float*)p.source + at) : load_part((const float*)p.source + at, n);
}

QB_INLINE vf rounded_to_bf16(vf x) {
    uint16_t half[W];
    store_bf16(half, x);
    return load_bf16(half);
}

// One row of floats or codes as floats, rounded to bf16 where the weight is bf16.
static void prepare_floats(const Prepare& p, int64_t row) {
    float* out = (float*)p.out + row * p.columns;
    for (int64_t k = 0; k < p.columns; k += W) {
        int64_t n = p.columns - k;
        vf x = load_input(p, row, k, n);
        if (p.kind == Kind::bf16) x = rounded_to_bf16(x);
        if (n >= W) store(out + k, x);
        else store_part(out + k, x, n);
    }
}

#if defined(QB_BF16)
// One row as bf16, the second term what the first left of it.
static void prepare_halves(const Prepare& p, int64_t row) {
    int64_t width = half_row(p.columns), terms = terms_of(p.kind, p.format);
    uint16_t* out = (uint16_t*)p.out + row * width;
    for (int64_t term = 0; term < terms; ++term, out += half_plane(p.t, p.columns))
        for (int64_t k = 0; k < width; k += W) {
            uint16_t half[W];
            vf x = k < p.columns ? load_input(p, row, k, p.columns - k) : vf{};
            store_bf16(half, term ? x - rounded_to_bf16(x) : x);
            std::memcpy(out + k, half, size_t(smaller(W, width - k)) * 2);
        }
}
#endif

// Of the inputs as they are, group by group.
static void sum_groups(const Prepare& p, int64_t row) {
    for (int64_t g = 0; g < p.groups; ++g) {
        int64_t from = g * p.group_size, to = smaller(from + p.group_size, p.columns);
        vf sum{};
        for (int64_t k = from; k < to; k += W) sum += load_input(p, row, k, to - k);
        p.sums[row * p.groups + g] = sum_lanes(sum);
    }
}

static void prepare(const Prepare& p, int64_t first, int64_t last) {
    Product product = product_of(p);
    if (p.shifted)
        for (int64_t row = first; row < last; ++row) sum_groups(p, row);
    if (!p.out) return;
#if defined(QB_AMX)
    if (product == Product::int8 && p.t > kDotRows && p.digits == 1)
        return prepare_tile_codes((const int8_t*)p.source, first, last, p.columns, p.out);
#endif
    if (product == Product::int8) return prepare_codes((const int8_t*)p.source, first, last, p.columns, strip_of(p.digits), p.out);
    for (int64_t row = first; row < last; ++row) {
#if defined(QB_BF16)
        if (product == Product::bf16) {
            prepare_halves(p, row);
            continue;
        }
#endif
        prepare_floats(p, row);
    }
}

static void linear(const Linear& l, int64_t first, int64_t last) {
#if defined(QB_AMX)
    if (l.w.kind == Kind::int8_dot && l.t > kDotRows && l.digits == 1) return linear_tile_codes(l, first, last);
#endif
    switch (product_of(preparation(l.w, l.format, l.a, l.t))) {
        case Product::int8: return linear_dot(l, first, last);
#if defined(QB_AMX)
        case Product::bf16: return linear_tile_bf16(l, first, last);
#elif defined(QB_BF16)
        case Product::bf16: return linear_bf16(l, first, last);
#endif
        default: return linear_float(l, first, last);
    }
}

}  // namespace quantbench::QB_ISA
