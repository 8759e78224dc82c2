#include "kernels.h"

#include "checks.h"
#include "dispatch.h"
#include "operations.h"

namespace quantbench {

namespace {

Quantize quantize_to(int64_t t, int64_t width, int format, std::optional<float> scale, std::optional<Bytes>& codes,
                     std::optional<Array<float, 1>>& scales, float* values) {
    Quantize q{};
    q.format = Quant(format);
    q.values = values;
    if (q.format == Quant::none) return q;
    require(codes && codes->ndim() == 2 && int64_t(codes->shape(0)) == t && int64_t(codes->shape(1)) == width &&
                codes->itemsize() == 1, "codes must be one byte each, of the shape of the values");
    require(scales && int64_t(scales->shape(0)) == (scale ? 1 : t), "scales must be [1] static or [T] dynamic");
    q.dynamic = !scale;
    q.static_scale = scale.value_or(1.0f);
    q.codes = codes->data();
    q.scale = scales->data();
    if (scale) q.scale[0] = *scale;
    return q;
}

float* checked(std::optional<Floats>& values, int64_t t, int64_t width) {
    if (!values) return nullptr;
    require(int64_t(values->shape(0)) == t && int64_t(values->shape(1)) == width, "values have the wrong shape");
    return values->data();
}

}  // namespace

Kernels::Kernels(const std::string& isa) : table_(table_of(isa)) {}

void Kernels::linear(const PackedWeight& packed, std::optional<ConstFloats> values, std::optional<ConstBytes> codes,
                     int format, std::optional<ConstVector> a_scale, Floats y, int64_t column) const {
    const Weight& w = packed.view();
    int64_t t = int64_t(y.shape(0)), k = w.columns;
    require(column >= 0 && column + w.rows <= int64_t(y.shape(1)), "y is too narrow");
    Input input{};
    if (codes) {
        require(codes->ndim() == 2 && codes->itemsize() == 1 && int64_t(codes->shape(0)) == t && int64_t(codes->shape(1)) == k,
                "codes must be [T, K] of one byte each");
        require(a_scale && (a_scale->shape(0) == 1 || int64_t(a_scale->shape(0)) == t), "scale must be [1] or [T]");
        require(w.kind != Kind::int8_dot || Quant(format) == Quant::int8, "a weight packed for int8 activations needs int8 codes or floats");
        input = {nullptr, codes->data(), Quant(format), a_scale->data(), a_scale->shape(0) == 1 ? 0 : 1};
    } else {
        require(values && int64_t(values->shape(0)) == t && int64_t(values->shape(1)) == k, "values must be [T, K]");
        input.values = values->data();
    }
    Release release(t * w.rows * k);
    run_linear(table_, w, input, t, y.data() + column, int64_t(y.shape(1)));
}

int64_t Kernels::quantize(ConstFloats x, int format, std::optional<float> scale, Bytes codes, Array<float, 1> scales) const {
    int64_t t = int64_t(x.shape(0)), width = int64_t(x.shape(1));
    std::optional<Bytes> to(codes);
    std::optional<Array<float, 1>> of(scales);
    Quantize q = quantize_to(t, width, format, scale, to, of, nullptr);
    Release release(t * width * 8);
    return run_quantize(table_, x.data(), t, width, q);
}

int64_t Kernels::add_norm(Floats x, std::optional<ConstFloats> delta, ConstVector weight, double eps,
                          std::optional<Floats> values, int format, std::optional<float> scale,
                          std::optional<Bytes> codes, std::optional<Array<float, 1>> scales) const {
    int64_t t = int64_t(x.shape(0)), width = int64_t(x.shape(1));
    require(int64_t(weight.shape(0)) == width, "the norm's weight must be [D]");
    require(!delta || (int64_t(delta->shape(0)) == t && int64_t(delta->shape(1)) == width), "delta must be [T, D]");
    AddNorm a{x.data(), data_or_null(delta), weight.data(), t, width, eps,
              quantize_to(t, width, format, scale, codes, scales, checked(values, t, width))};
    Release release(t * width * 8);
    return run_add_norm(table_, a);
}

int64_t Kernels::silu_mul(ConstFloats gate_up, std::optional<Floats> values, int format, std::optional<float> scale,
                          std::optional<Bytes> codes, std::optional<Array<float, 1>> scales) const {
    int64_t t = int64_t(gate_up.shape(0)), width = int64_t(gate_up.shape(1)) / 2;
    require(gate_up.shape(1) % 2 == 0, "gate_up must be [T, 2I]");
    SiluMul s{gate_up.data(), t, width, quantize_to(t, width, format, scale, codes, scales, checked(values, t, width))};
    Release release(t * width * 32);
    return run_silu_mul(table_, s);
}

void Kernels::rope_write(ConstFloats qkv, Array<const int32_t, 1> positions, Array<const int64_t, 1> slots,
                         ConstFloats cos, ConstFloats sin, std::optional<ConstVector> q_norm,
                         std::optional<ConstVector> k_norm, double eps, int kind, Bytes k, Bytes v,
                         Scales k_scale, Scales v_scale, Floats q) const {
    Cache cache = cache_of(kind, k, v, k_scale, v_scale);
    int64_t t = int64_t(qkv.shape(0)), heads = int64_t(qkv.shape(1)) / cache.size - 2 * cache.heads;
    require(heads > 0 && int64_t(qkv.shape(1)) == (heads + 2 * cache.heads) * cache.size, "qkv must be [T, (H + 2 KV) d]");
    require(int64_t(q.shape(0)) == t && int64_t(q.shape(1)) == heads * cache.size, "q must be [T, H d]");
    require(int64_t(positions.shape(0)) == t && int64_t(slots.shape(0)) == t, "one position and slot per row");
    check_norms(q_norm, k_norm, cache.size);
    check_rope(cos, sin, cache.size);
    check_rows(positions, slots, int64_t(cos.shape(0)), int64_t(k.shape(0)));
    RopeWrite r{qkv.data(), positions.data(), slots.data(), cos.data(), sin.data(), data_or_null(q_norm),
                data_or_null(k_norm), eps, q.data(), t, heads, cache};
    Release release(t * int64_t(qkv.shape(1)) * 16);
    run_rope_write(table_, r);
}

void Kernels::attention(ConstFloats q, Array<const int32_t, 1> starts, Array<const int32_t, 1> context,
                        Array<const int32_t, 2> tables, int kind, ConstBytes k, ConstBytes v, ConstScales k_scale,
                        ConstScales v_scale, int64_t window, Floats out) const {
    Cache cache = cache_of(kind, k, v, k_scale, v_scale);
    int64_t heads = int64_t(q.shape(1)) / cache.size;
    require(int64_t(q.shape(1)) == heads * cache.size && heads % cache.heads == 0 && heads > 0, "q must be [T, H d]");
    require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1), "out must be like q");
    check_sequences(starts, context, tables, int64_t(q.shape(0)), int64_t(k.shape(0)));
    Attention a{q.data(), out.data(), starts.data(), context.data(), tables.data(), int64_t(tables.shape(1)),
                int64_t(context.shape(0)), heads, window, cache};
    Release release(attention_work(a));
    run_attention(table_, a);
}

void Kernels::embed(const PackedWeight& table, Array<const int32_t, 1> ids, Floats out) const {
    const Weight& w = table.view();
    int64_t t = int64_t(ids.shape(0));
    require(w.kind <= Kind::f16, "an embedding table must be f32, bf16 or f16");
    require(int64_t(out.shape(0)) == t && int64_t(out.shape(1)) == w.columns, "out must be [T, D]");
    for (int64_t i = 0; i < t; ++i) require(ids.data()[i] >= 0 && ids.data()[i] < w.rows, "a token id is beyond the table");
    run_embed(table_, {w, ids.data(), t, out.data()});
}

}  // namespace quantbench
