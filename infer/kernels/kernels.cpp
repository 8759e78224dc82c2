#include "kernels.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "dispatch.h"
#include "pool.h"

namespace quantbench {

namespace {

constexpr int64_t kSmallWork = 48 * 1024;  // below this many operations waking a thread costs more than it saves

// Room for values that only pass through an operation, and for prepared codes; one per calling thread, kept.
template <class T>
T* scratch(int which, int64_t count) {
    static thread_local std::vector<std::vector<char>> buffers(2);
    auto& buffer = buffers[size_t(which)];
    if (int64_t(buffer.size()) < count * int64_t(sizeof(T)) + 128) buffer.resize(size_t(count) * sizeof(T) + 128);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) / 64 * 64);
}

// Cuts [0, count) into ranges of a multiple of `grain` and runs them; `work` is the operations of all of them.
template <class F>
void ranges(int64_t count, int64_t grain, int64_t work, F&& f) {
    auto pool = Pool::shared();
    int64_t threads = pool->threads();
    if (threads == 1 || work < kSmallWork || count <= grain) return f(int64_t(0), count);
    int64_t step = (count + threads * 4 - 1) / (threads * 4);
    step = (step + grain - 1) / grain * grain;
    pool->run((count + step - 1) / step, [&](int64_t i) { f(i * step, std::min(count, (i + 1) * step)); });
}

// Row operations: the lowest row that holds a NaN or infinity, or -1.
template <class F>
int64_t rows_of(int64_t t, int64_t width, F&& f) {
    std::atomic<int64_t> worst{t};
    Release release(t * width * 8);
    ranges(t, 1, t * width * 4, [&](int64_t first, int64_t last) {
        int64_t bad = f(first, last), seen = worst.load();
        while (bad >= 0 && bad < seen && !worst.compare_exchange_weak(seen, bad)) {}
    });
    return worst.load() == t ? -1 : worst.load();
}

Quantize quantize_to(int64_t t, int64_t width, int format, std::optional<float> scale, std::optional<Bytes>& codes,
                     std::optional<Array<float, 1>>& scales, float* values) {
    Quantize q{};
    q.format = Quant(format);
    q.values = values ? values : scratch<float>(0, t * width);
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

int64_t element_size(int kind) { return kind == 0 ? 4 : kind <= 2 ? 2 : 1; }

template <class B>
Cache cache_of(int kind, const B& k, const B& v, const ConstVector& k_scale, const ConstVector& v_scale) {
    require(k.ndim() == 4 && v.ndim() == 4 && k.shape(2) == size_t(kPage) && k.shape(3) <= 256 && k.shape(3) % 2 == 0,
            "k and v must be [pages, kv_heads, 64, head_dim] with an even head_dim of at most 256");
    for (size_t i = 0; i < 4; ++i) require(k.shape(i) == v.shape(i), "k and v differ in shape");
    require(int64_t(k.itemsize()) == element_size(kind) && int64_t(v.itemsize()) == element_size(kind), "cache element size");
    require(k_scale.shape(0) == k.shape(1) && v_scale.shape(0) == k.shape(1), "one cache scale per KV head");
    return {CacheKind(kind), (uint8_t*)k.data(), (uint8_t*)v.data(), k_scale.data(), v_scale.data(),
            int64_t(k.shape(1)), int64_t(k.shape(3))};
}

}  // namespace

Kernels::Kernels(const std::string& isa) : table_(table_of(isa)) {}

void Kernels::linear(const PackedWeight& packed, std::optional<ConstFloats> values, std::optional<ConstBytes> codes,
                     int format, std::optional<ConstVector> a_scale, Floats y, int64_t column) const {
    const Weight& w = packed.view();
    int64_t t = int64_t(y.shape(0)), k = w.columns;
    require(column >= 0 && column + w.rows <= int64_t(y.shape(1)), "y is too narrow");
    Linear l{w, nullptr, nullptr, nullptr, 0, t, y.data() + column, int64_t(y.shape(1))};
    if (t == 0) return;
    if (codes) {
        require(codes->ndim() == 2 && codes->itemsize() == 1 && int64_t(codes->shape(0)) == t && int64_t(codes->shape(1)) == k,
                "codes must be [T, K] of one byte each");
        require(a_scale && (a_scale->shape(0) == 1 || int64_t(a_scale->shape(0)) == t), "scale must be [1] or [T]");
        l.a_scale = a_scale->data();
        l.a_scale_step = a_scale->shape(0) == 1 ? 0 : 1;
    } else {
        require(values && int64_t(values->shape(0)) == t && int64_t(values->shape(1)) == k, "values must be [T, K]");
        require(w.kind != Kind::int8_dot, "a weight packed for int8 activations needs codes");
        l.a = values->data();
    }
    Release release(t * w.rows * k);
    if (w.kind == Kind::int8_dot) {
        require(Quant(format) == Quant::int8, "a weight packed for int8 activations needs int8 codes");
        int64_t row_bytes = (k + 3) / 4 * 4 * table_.code_bytes;
        auto* prepared = scratch<uint8_t>(1, t * row_bytes);
        const auto* source = static_cast<const int8_t*>(codes->data());
        ranges(t, table_.strip, t * k / 8, [&](int64_t first, int64_t last) {
            table_.prepare_codes(source + first * k, last - first, k, prepared + first * row_bytes);
        });
        l.a_codes = prepared;
    } else if (codes) {
        float* decoded = scratch<float>(1, t * k);
        table_.decode_codes(static_cast<const uint8_t*>(codes->data()), Quant(format), t * k, decoded);
        l.a = decoded;
    }
    ranges(w.panels, t <= 2 ? 4 : 1, t * w.rows * k, [&](int64_t first, int64_t last) { table_.linear(l, first, last); });
}

int64_t Kernels::quantize(ConstFloats x, int format, std::optional<float> scale, Bytes codes, Array<float, 1> scales) const {
    int64_t t = int64_t(x.shape(0)), width = int64_t(x.shape(1));
    std::optional<Bytes> to(codes);
    std::optional<Array<float, 1>> of(scales);
    float unused;
    Quantize q = quantize_to(t, width, format, scale, to, of, &unused);
    return rows_of(t, width, [&](int64_t a, int64_t b) { return table_.quantize(x.data(), width, q, a, b); });
}

int64_t Kernels::add_norm(Floats x, std::optional<ConstFloats> delta, ConstVector weight, double eps,
                          std::optional<Floats> values, int format, std::optional<float> scale,
                          std::optional<Bytes> codes, std::optional<Array<float, 1>> scales) const {
    int64_t t = int64_t(x.shape(0)), width = int64_t(x.shape(1));
    require(int64_t(weight.shape(0)) == width, "the norm's weight must be [D]");
    require(!delta || (int64_t(delta->shape(0)) == t && int64_t(delta->shape(1)) == width), "delta must be [T, D]");
    AddNorm a{x.data(), data_or_null(delta), weight.data(), t, width, eps,
              quantize_to(t, width, format, scale, codes, scales, checked(values, t, width))};
    return rows_of(t, width, [&](int64_t first, int64_t last) { return table_.add_norm(a, first, last); });
}

int64_t Kernels::silu_mul(ConstFloats gate_up, std::optional<Floats> values, int format, std::optional<float> scale,
                          std::optional<Bytes> codes, std::optional<Array<float, 1>> scales) const {
    int64_t t = int64_t(gate_up.shape(0)), width = int64_t(gate_up.shape(1)) / 2;
    require(gate_up.shape(1) % 2 == 0, "gate_up must be [T, 2I]");
    SiluMul s{gate_up.data(), t, width, quantize_to(t, width, format, scale, codes, scales, checked(values, t, width))};
    return rows_of(t, width * 4, [&](int64_t first, int64_t last) { return table_.silu_mul(s, first, last); });
}

void Kernels::rope_write(ConstFloats qkv, Array<const int32_t, 1> positions, Array<const int64_t, 1> slots,
                         ConstFloats cos, ConstFloats sin, std::optional<ConstVector> q_norm,
                         std::optional<ConstVector> k_norm, double eps, int kind, Bytes k, Bytes v,
                         ConstVector k_scale, ConstVector v_scale, Floats q) const {
    Cache cache = cache_of(kind, k, v, k_scale, v_scale);
    int64_t t = int64_t(qkv.shape(0)), heads = int64_t(qkv.shape(1)) / cache.size - 2 * cache.heads;
    require(heads > 0 && int64_t(qkv.shape(1)) == (heads + 2 * cache.heads) * cache.size, "qkv must be [T, (H + 2 KV) d]");
    require(int64_t(q.shape(0)) == t && int64_t(q.shape(1)) == heads * cache.size, "q must be [T, H d]");
    require(int64_t(positions.shape(0)) == t && int64_t(slots.shape(0)) == t, "one position and slot per row");
    require(int64_t(cos.shape(1)) == cache.size / 2 && cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1),
            "cos and sin must be [positions, d / 2]");
    require((!q_norm && !k_norm) || (q_norm && k_norm && int64_t(q_norm->shape(0)) == cache.size &&
                                     int64_t(k_norm->shape(0)) == cache.size), "norms must be two of [d]");
    for (int64_t i = 0; i < t; ++i) {
        require(positions.data()[i] >= 0 && positions.data()[i] < int64_t(cos.shape(0)), "a position is beyond the RoPE table");
        require(slots.data()[i] >= 0 && slots.data()[i] < int64_t(k.shape(0)) * kPage, "a slot is beyond the cache");
    }
    RopeWrite r{qkv.data(), positions.data(), slots.data(), cos.data(), sin.data(), data_or_null(q_norm),
                data_or_null(k_norm), eps, q.data(), t, heads, cache};
    rows_of(t, int64_t(qkv.shape(1)) * 2, [&](int64_t first, int64_t last) {
        table_.rope_write(r, first, last);
        return int64_t(-1);
    });
}

void Kernels::attention(ConstFloats q, Array<const int32_t, 1> starts, Array<const int32_t, 1> context,
                        Array<const int32_t, 2> tables, int kind, ConstBytes k, ConstBytes v, ConstVector k_scale,
                        ConstVector v_scale, int64_t window, Floats out) const {
    Cache cache = cache_of(kind, k, v, k_scale, v_scale);
    int64_t sequences = int64_t(context.shape(0)), heads = int64_t(q.shape(1)) / cache.size;
    require(int64_t(q.shape(1)) == heads * cache.size && heads % cache.heads == 0 && heads > 0, "q must be [T, H d]");
    require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1), "out must be like q");
    require(int64_t(starts.shape(0)) == sequences + 1 && int64_t(tables.shape(0)) == sequences, "one row per sequence");
    Attention a{q.data(), out.data(), starts.data(), context.data(), tables.data(), int64_t(tables.shape(1)),
                sequences, heads, window, cache};
    int64_t group = heads / cache.heads, tile = std::max<int64_t>(1, 96 / group), work = 0;
    struct Task { int64_t sequence, head, first, last; };
    std::vector<Task> tasks;
    for (int64_t s = 0; s < sequences; ++s) {
        int64_t rows = a.starts[s + 1] - a.starts[s], tokens = a.context[s];
        require(a.starts[s] >= 0 && rows >= 0 && a.starts[s + 1] <= int64_t(q.shape(0)) && tokens >= rows, "starts");
        require((tokens + kPage - 1) / kPage <= a.table_width, "a sequence has more tokens than its table has pages");
        for (int64_t p = 0; p < (tokens + kPage - 1) / kPage; ++p)
            require(tables(s, p) >= 0 && tables(s, p) < int64_t(k.shape(0)), "a page is beyond the cache");
        work += rows * tokens * heads * cache.size * 2;
        for (int64_t t = 0; t < rows; t += tile)
            for (int64_t h = 0; h < cache.heads; ++h) tasks.push_back({s, h, t, std::min(rows, t + tile)});
    }
    Release release(work);
    auto one = [&](int64_t i) { table_.attention(a, tasks[size_t(i)].sequence, tasks[size_t(i)].head, tasks[size_t(i)].first, tasks[size_t(i)].last); };
    if (work < kSmallWork) {
        for (int64_t i = 0; i < int64_t(tasks.size()); ++i) one(i);
    } else {
        Pool::shared()->run(int64_t(tasks.size()), one);
    }
}

void Kernels::embed(const PackedWeight& table, Array<const int32_t, 1> ids, Floats out) const {
    const Weight& w = table.view();
    int64_t t = int64_t(ids.shape(0));
    require(w.kind <= Kind::f16, "an embedding table must be f32, bf16 or f16");
    require(int64_t(out.shape(0)) == t && int64_t(out.shape(1)) == w.columns, "out must be [T, D]");
    for (int64_t i = 0; i < t; ++i) require(ids.data()[i] >= 0 && ids.data()[i] < w.rows, "a token id is beyond the table");
    table_.embed({w, ids.data(), t, out.data()}, 0, t);
}

}  // namespace quantbench
