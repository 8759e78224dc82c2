#include "step.h"

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "pool.h"

namespace quantbench {

namespace {

const char* const kNames[kOps] = {"embed", "add_norm", "qkv", "rope_write", "attention", "o", "gate_up", "silu_mul", "down", "head"};

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void check_weight(const Linears& group, int64_t rows, int64_t columns) {
    require(group.columns == columns, "linears of a block must read what the operation before them hands on");
    require(rows == 0 || group.rows == rows, "linears of a block must write what the operation after them reads");
}

}  // namespace

void Linears::add(const PackedWeight& weight, bool own, int format, std::optional<float> scale) {
    const Weight& w = weight.view();
    require(parts.empty() || w.columns == columns, "linears that share an input must have as many columns");
    Quant handed = own ? Quant(format) : spec.format;
    require(w.kind != Kind::int8_dot || handed != Quant::e4m3, "a weight packed for int8 activations needs int8 codes or floats");
    require(!own || spec.format == Quant::none, "a weight can quantize floats only");
    parts.push_back({&w, own ? std::optional<Spec>({Quant(format), scale}) : std::nullopt, weight.bytes()});
    columns = w.columns;
    rows += w.rows;
    bytes += weight.bytes();
}

void* Room::bytes(int64_t size) {
    if (size > size_) {
        int64_t aligned = (size + 63) / 64 * 64;
        void* p = std::aligned_alloc(64, size_t(aligned));
        if (!p) throw std::bad_alloc();
        memory_ = {p, std::free};
        size_ = aligned;
    }
    return memory_.get();
}

Step::Step(const Kernels& kernels, const PackedWeight& embedding, ConstVector norm, const Linears& head, double eps)
    : table_(kernels.table()), embedding_(embedding), norm_(norm), head_(head), eps_(eps), width_(embedding.view().columns) {
    require(embedding.view().kind <= Kind::f16, "an embedding table must be f32, bf16 or f16");
    require(int64_t(norm.shape(0)) == width_, "the norm's weight must be [D]");
    check_weight(head, 0, width_);
}

void Step::add_block(ConstVector attn_norm, const Linears& qkv, std::optional<ConstVector> q_norm,
                     std::optional<ConstVector> k_norm, int64_t window, const Linears& o, ConstVector mlp_norm,
                     const Linears& gate_up, const Linears& down, int kind, Bytes k, Bytes v, Scales k_scale,
                     Scales v_scale) {
    Cache cache = cache_of(kind, k, v, k_scale, v_scale);
    int64_t q_width = qkv.rows - 2 * cache.heads * cache.size;
    require(q_width > 0 && q_width % (cache.heads * cache.size) == 0, "qkv must be [T, (H + 2 KV) d]");
    require(int64_t(attn_norm.shape(0)) == width_ && int64_t(mlp_norm.shape(0)) == width_, "the norm's weight must be [D]");
    require(blocks_.empty() || (int64_t(k.shape(0)) == pages_ && cache.size == blocks_[0].cache.size), "all caches must have as many pages");
    check_norms(q_norm, k_norm, cache.size);
    check_weight(qkv, 0, width_);
    check_weight(o, width_, q_width);
    check_weight(gate_up, 2 * down.columns, width_);
    check_weight(down, width_, down.columns);
    blocks_.push_back({attn_norm, mlp_norm, q_norm, k_norm, qkv, o, gate_up, down, window, cache});
    pages_ = int64_t(k.shape(0));
    pages_of_.insert(pages_of_.end(), {k, v});
    scales_of_.insert(scales_of_.end(), {k_scale, v_scale});
}

bool Step::run(Index32 ids, Index32 positions, Index64 slots, Index32 starts, Index32 context,
               Array<const int32_t, 2> tables, ConstFloats cos, ConstFloats sin, Index64 rows, Floats logits) {
    int64_t t = int64_t(ids.shape(0)), wanted = int64_t(rows.shape(0));
    require(!blocks_.empty(), "a model has at least one block");
    require(int64_t(positions.shape(0)) == t && int64_t(slots.shape(0)) == t, "one position and slot per row");
    require(int64_t(logits.shape(0)) == wanted && int64_t(logits.shape(1)) == head_.rows, "logits must be [R, V]");
    check_rope(cos, sin, blocks_[0].cache.size);
    check_rows(positions, slots, int64_t(cos.shape(0)), pages_);
    check_sequences(starts, context, tables, t, pages_);
    for (int64_t i = 0; i < t; ++i) require(ids.data()[i] >= 0 && ids.data()[i] < embedding_.view().rows, "a token id is beyond the table");
    for (int64_t i = 0; i < wanted; ++i) require(rows.data()[i] >= 0 && rows.data()[i] < t, "a wanted row is beyond the batch");
    Batch b{t, int64_t(context.shape(0)), int64_t(tables.shape(1)), wanted, ids.data(), positions.data(), starts.data(),
            context.data(), tables.data(), slots.data(), rows.data(), cos.data(), sin.data(), logits.data(), true};
    for (int64_t s = 0; s <= b.sequences; ++s) b.decoding = b.decoding && b.starts[s] == s;
    nb::gil_scoped_release release;
    std::lock_guard lock(busy_);
    return blocks(b) && (wanted == 0 || head(b));
}

bool Step::blocks(const Batch& b) {
    if (profiling_) since_ = now();
    run_embed(table_, {embedding_.view(), b.ids, b.t, x_.of<float>(b.t * width_)});
    done(kEmbed, double(b.t * width_) * 4, 0);
    for (const Block& layer : blocks_)
        if (!block(b, layer, &layer == blocks_.data())) return false;
    return true;
}

bool Step::block(const Batch& b, const Block& layer, bool first) {
    const Cache& cache = layer.cache;
    int64_t t = b.t, q_width = layer.o.columns, heads = q_width / cache.size;
    float *x = x_.of<float>(t * width_), *delta = delta_.of<float>(t * width_);
    float *qkv = qkv_.of<float>(t * layer.qkv.rows), *q = q_.of<float>(t * q_width);
    float *attended = attended_.of<float>(t * q_width), *gate_up = gate_up_.of<float>(t * layer.gate_up.rows);

    if (!norm(x, first ? nullptr : delta, layer.attn_norm, layer.qkv, t) || !linears(kQkv, layer.qkv, t, qkv)) return false;
    RopeWrite rope{qkv, b.positions, b.slots, b.cos, b.sin, layer.q_norm ? layer.q_norm->data() : nullptr,
                   layer.k_norm ? layer.k_norm->data() : nullptr, eps_, q, t, heads, cache};
    Attention a{q, attended, b.starts, b.context, b.tables, b.table_width, b.sequences, heads, layer.window, cache};
    input_ = output(layer.o.spec, t, q_width);
    if (input_.format == Quant::none) input_.values = attended;
    if (b.decoding) {
        if (run_decode(table_, rope, a, input_) >= 0) return false;
    } else {
        run_rope_write(table_, rope);
        done(kRope, double(t) * double(layer.qkv.rows + q_width) * 4, 0);
        run_attention(table_, a);
        if (run_quantize(table_, attended, t, q_width, input_) >= 0) return false;
    }
    done(kAttention, cache_bytes(a), double(attention_work(a)) * 2);

    if (!linears(kO, layer.o, t, delta) || !norm(x, delta, layer.mlp_norm, layer.gate_up, t)) return false;
    if (!linears(kGateUp, layer.gate_up, t, gate_up)) return false;
    SiluMul s{gate_up, t, layer.down.columns, output(layer.down.spec, t, layer.down.columns)};
    input_ = s.out;
    if (run_silu_mul(table_, s) >= 0) return false;
    done(kSilu, double(t * layer.gate_up.rows) * 4, 0);
    return linears(kDown, layer.down, t, delta);
}

bool Step::head(const Batch& b) {
    float *x = x_.of<float>(0), *delta = delta_.of<float>(0);
    if (b.wanted < b.t) {
        float *last_x = last_x_.of<float>(b.wanted * width_), *last_delta = last_delta_.of<float>(b.wanted * width_);
        for (int64_t i = 0; i < b.wanted; ++i) {
            std::memcpy(last_x + i * width_, x + b.rows[i] * width_, size_t(width_) * 4);
            std::memcpy(last_delta + i * width_, delta + b.rows[i] * width_, size_t(width_) * 4);
        }
        x = last_x;
        delta = last_delta;
    }
    if (!norm(x, delta, norm_, head_, b.wanted) || !linears(kHead, head_, b.wanted, b.logits)) return false;
    bool finite = true;
    for (int64_t i = 0; i < b.wanted; ++i)
        finite = finite && std::isfinite(table_.absmax(b.logits + i * head_.rows, 1, head_.rows, 0, head_.rows));
    return finite;
}

// Room for what `spec` asks of [t][width] values: the values themselves, or codes and scales.
Quantize Step::output(const Spec& spec, int64_t t, int64_t width) {
    Quantize q{spec.format, spec.scale.value_or(1.0f), !spec.scale, nullptr, nullptr, nullptr};
    if (spec.format == Quant::none) {
        q.values = values_.of<float>(t * width);
    } else {
        q.codes = codes_.of<uint8_t>(t * width);
        q.scale = scales_.of<float>(t);
        q.scale[0] = q.static_scale;
    }
    return q;
}

bool Step::norm(float* x, const float* delta, const ConstVector& weight, const Linears& next, int64_t t) {
    input_ = output(next.spec, t, width_);
    bool fine = run_add_norm(table_, {x, delta, weight.data(), t, width_, eps_, input_}) < 0;
    done(kNorm, double(t * width_) * (delta ? 12 : 4), 0);
    return fine;
}

bool Step::linears(Op op, const Linears& group, int64_t t, float* y) {
    int64_t column = 0;
    for (const Linears::Part& part : group.parts) {
        Input input{input_.values, input_.codes, input_.format, input_.scale, input_.dynamic ? 1 : 0};
        if (part.own && part.own->format != Quant::none) {
            Quantize q{part.own->format, part.own->scale.value_or(1.0f), !part.own->scale, nullptr,
                       own_codes_.of<uint8_t>(t * group.columns), own_scales_.of<float>(t)};
            q.scale[0] = q.static_scale;
            if (run_quantize(table_, input_.values, t, group.columns, q) >= 0) return false;
            input = {nullptr, q.codes, q.format, q.scale, q.dynamic ? 1 : 0};
        }
        run_linear(table_, *part.weight, input, t, y + column, group.rows);
        column += part.weight->rows;
    }
    done(op, double(group.bytes), 2.0 * double(t) * double(group.rows) * double(group.columns));
    return true;
}

void Step::done(Op op, double bytes, double operations) {
    if (!profiling_) return;
    double before = since_;
    since_ = now();
    Spent& spent = spent_[op];
    spent.seconds += since_ - before;
    spent.bytes += bytes;
    spent.operations += operations;
}

void Step::set_profiling(bool on) {
    profiling_ = on;
    spent_ = {};
}

nb::dict Step::profile() const {
    nb::dict found;
    for (int op = 0; op < kOps; ++op) {
        const Spent& s = spent_[size_t(op)];
        if (s.seconds > 0) found[kNames[op]] = nb::make_tuple(s.seconds, s.bytes, s.operations);
    }
    return found;
}

}  // namespace quantbench
