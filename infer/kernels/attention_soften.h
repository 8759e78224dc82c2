// Scores of one page into softmax weights, beside what earlier pages summed (Milakov & Gimelshein 2018).
#pragma once

#include "attention_few.h"

namespace quantbench::QB_ISA {

// Which keys of a page each query sees; `heads` queries in turn belong to one token.
struct Sight {
    int64_t position, window, base, heads;

    int64_t first(int64_t q) const { return window ? larger(position + q / heads - window + 1 - base, 0) : 0; }
    int64_t last(int64_t q) const { return smaller(position + q / heads + 1 - base, kPage); }
};

// Row q's scores of keys it does not see become `value`; false where it sees all of them.
QB_INLINE bool hide(AttentionTile& t, int64_t q, int64_t from, int64_t to, float value) {
    if (from <= 0 && to >= kPage) return false;
    const vi lanes = lane_numbers();
    float* s = t.scores[q];
    for (int64_t j = 0; j < kPage; j += W) {
        vi seen = (lanes >= int32_t(from - j)) & (lanes < int32_t(to - j));
        store(s + j, seen ? load(s + j) : set1(value));
    }
    return true;
}

// Scores of keys, or weights of values, times the scales of the page's tokens: what a dynamic cache does instead of
// scaling queries and outputs. Of tokens that no query sees, whatever comes out is not read.
static void scale_scores(AttentionTile& t, const float* scale) {
    for (int64_t q = 0; q < t.queries; ++q)
        for (int64_t j = 0; j < kPage; j += W) store(t.scores[q] + j, load(t.scores[q] + j) * load(scale + j));
}

// Scores become weights e^(s - top), those of keys that a query does not see 0; what was summed before is rescaled to the
// new top. In two passes over the queries, so that the reductions of one do not wait for the exponentials of another.
static void soften(AttentionTile& t, const Sight& sight) {
    float before[kQueries];
    for (int64_t q = 0; q < t.queries; ++q) {
        hide(t, q, sight.first(q), sight.last(q), kMasked);
        before[q] = t.top[q];
        vf best = set1(t.top[q]);
        for (int64_t j = 0; j < kPage; j += W) best = vmax(best, load(t.scores[q] + j));
        t.top[q] = max_lanes(best);
    }
    for (int64_t q = 0; q < t.queries; ++q) {
        float* s = t.scores[q];
        vf total{}, top = set1(t.top[q]);
        for (int64_t j = 0; j < kPage; j += W) {
            vf p = exponential(load(s + j) - top);
            store(s + j, p);
            total = total + p;
        }
        if (hide(t, q, sight.first(q), sight.last(q), 0.0f)) {
            total = vf{};
            for (int64_t j = 0; j < kPage; j += W) total = total + load(s + j);
        }
        if (t.top[q] != before[q]) {
            float keep = before[q] == kMasked ? 0.0f : exponential(set1(before[q]) - top)[0];
            t.sum[q] *= keep;
            for (int64_t i = 0; i < t.padded; i += W) store(t.output(q) + i, load(t.output(q) + i) * keep);
        }
        t.sum[q] += sum_lanes(total);
    }
}

}  // namespace quantbench::QB_ISA
