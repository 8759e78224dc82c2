#include "operations.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "pool.h"

namespace quantbench {

namespace {

// Room for values that only pass through an operation, for prepared codes, for digits and their scales; one of each per
// calling thread, kept.
template <class T>
T* scratch(int which, int64_t count) {
    static thread_local std::vector<std::vector<char>> buffers(4);
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
    ranges(t, 1, t * width * 4, [&](int64_t first, int64_t last) {
        int64_t bad = f(first, last), seen = worst.load();
        while (bad >= 0 && bad < seen && !worst.compare_exchange_weak(seen, bad)) {}
    });
    return worst.load() == t ? -1 : worst.load();
}

void room_for_values(Quantize& q, int64_t t, int64_t width) {
    if (!q.values) q.values = scratch<float>(0, t * width);
}

// Floats times int8 weights, the floats as digits: see Split.
void run_digits(const Table& table, const Weight& w, const float* x, int64_t t, float* y, int64_t ldy) {
    int64_t k = w.columns, rows = t * kDigits, strip = table.strip / kDigits * kDigits;
    Split s{x, k, scratch<int8_t>(2, rows * k), scratch<float>(3, t)};
    ranges(t, 1, t * k * 4, [&](int64_t first, int64_t last) { table.split(s, first, last); });
    Linear l{w, Quant::int8, s.codes, nullptr, s.scale, 1, rows, y, ldy, kDigits};
    Prepare p = preparation(w, Quant::int8, s.codes, rows, kDigits);
    l.a = p.out = scratch<uint8_t>(1, table.prepared_bytes(p));
    ranges(rows, strip, rows * k / 8, [&](int64_t first, int64_t last) { table.prepare(p, first, last); });
    ranges(w.panels, t == 1 ? 4 : 1, rows * w.rows * k, [&](int64_t first, int64_t last) { table.linear(l, first, last); });
}

}  // namespace

void run_linear(const Table& table, const Weight& w, const Input& input, int64_t t, float* y, int64_t ldy) {
    if (t == 0) return;
    int64_t k = w.columns;
    if (w.kind == Kind::int8_dot && !input.codes) return run_digits(table, w, input.values, t, y, ldy);
    const void* source = input.codes ? input.codes : input.values;
    Linear l{w, input.format, source, nullptr, input.codes ? input.scale : nullptr, input.scale_step, t, y, ldy};
    Prepare p = preparation(w, input.format, source, t);
    int64_t bytes = table.prepared_bytes(p), sums = p.shifted ? t * p.groups * 4 : 0;
    if (bytes || sums) {
        auto* room = scratch<uint8_t>(1, bytes + sums);
        if (bytes) l.a = p.out = room;
        if (sums) l.a_sums = p.sums = reinterpret_cast<float*>(room + bytes);
        ranges(t, table.strip, t * k / 8, [&](int64_t first, int64_t last) { table.prepare(p, first, last); });
    }
    ranges(w.panels, t <= 2 ? 4 : 1, t * w.rows * k, [&](int64_t first, int64_t last) { table.linear(l, first, last); });
}

void run_embed(const Table& table, const Embed& e) {
    ranges(e.t, 1, e.t * e.w.columns * 4, [&](int64_t first, int64_t last) { table.embed(e, first, last); });
}

int64_t run_quantize(const Table& table, const float* x, int64_t t, int64_t width, const Quantize& q) {
    return rows_of(t, width, [&](int64_t first, int64_t last) { return table.quantize(x, width, q, first, last); });
}

int64_t run_add_norm(const Table& table, AddNorm a) {
    room_for_values(a.out, a.t, a.width);
    return rows_of(a.t, a.width, [&](int64_t first, int64_t last) { return table.add_norm(a, first, last); });
}

int64_t run_silu_mul(const Table& table, SiluMul s) {
    room_for_values(s.out, s.t, s.width);
    return rows_of(s.t, s.width * 4, [&](int64_t first, int64_t last) { return table.silu_mul(s, first, last); });
}

void run_rope_write(const Table& table, const RopeWrite& r) {
    rows_of(r.t, (r.q_heads + 2 * r.cache.heads) * r.cache.size * 2, [&](int64_t first, int64_t last) {
        table.rope_write(r, first, last);
        return int64_t(-1);
    });
}

int64_t attention_work(const Attention& a) {
    int64_t work = 0;
    for (int64_t s = 0; s < a.sequences; ++s) work += (a.starts[s + 1] - a.starts[s]) * int64_t(a.context[s]);
    return work * a.q_heads * a.cache.size * 2;
}

double cache_bytes(const Attention& a) {
    static constexpr int64_t element[] = {4, 2, 2, 1, 1};
    int64_t tokens = 0;
    for (int64_t s = 0; s < a.sequences; ++s) tokens += a.window ? std::min<int64_t>(a.window, a.context[s]) : a.context[s];
    int64_t head = a.cache.size * element[int(a.cache.kind)] + (a.cache.dynamic ? 4 : 0);
    return double(tokens) * double(2 * a.cache.heads * head);
}

void run_attention(const Table& table, const Attention& a) {
    struct Task { int64_t sequence, head, first, last; };
    static thread_local std::vector<Task> tasks;
    tasks.clear();
    int64_t tile = std::max<int64_t>(1, 96 / (a.q_heads / a.cache.heads));
    for (int64_t s = 0; s < a.sequences; ++s) {
        int64_t rows = a.starts[s + 1] - a.starts[s];
        for (int64_t t = 0; t < rows; t += tile)
            for (int64_t h = 0; h < a.cache.heads; ++h) tasks.push_back({s, h, t, std::min(rows, t + tile)});
    }
    const Task* list = tasks.data();  // the caller's: a worker's own list is another
    auto one = [&](int64_t i) { table.attention(a, list[i].sequence, list[i].head, list[i].first, list[i].last); };
    if (attention_work(a) >= kSmallWork) return Pool::shared()->run(int64_t(tasks.size()), one);
    for (int64_t i = 0; i < int64_t(tasks.size()); ++i) one(i);
}

int64_t run_decode(const Table& table, const RopeWrite& rope, const Attention& a, const Quantize& q) {
    int64_t width = a.q_heads * a.cache.size, heads = a.cache.heads;
    auto pool = Pool::shared();
    if (a.sequences < pool->threads() && attention_work(a) >= kSmallWork * 4) {
        pool->run(a.sequences * heads, [&](int64_t i) { table.decode(rope, a, i / heads, i % heads, i % heads + 1); });
        return run_quantize(table, a.out, a.sequences, width, q);
    }
    return rows_of(a.sequences, attention_work(a) / a.sequences, [&](int64_t first, int64_t last) {
        for (int64_t s = first; s < last; ++s) table.decode(rope, a, s, 0, heads);
        return table.quantize(a.out, width, q, first, last);
    });
}

}  // namespace quantbench
