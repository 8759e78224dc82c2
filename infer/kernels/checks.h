// What a batch and a cache must satisfy where they come in; nothing below checks again.
#pragma once

#include "arrays.h"

namespace quantbench {

using Index32 = Array<const int32_t, 1>;
using Index64 = Array<const int64_t, 1>;

inline int64_t element_size(int kind) { return kind == 0 ? 4 : kind <= 2 ? 2 : 1; }

template <class B, class S>
Cache cache_of(int kind, const B& k, const B& v, const S& k_scale, const S& v_scale) {
    require(k.ndim() == 4 && v.ndim() == 4 && k.shape(2) == size_t(kPage) && k.shape(3) <= 256 && k.shape(3) % 2 == 0,
            "k and v must be [pages, kv_heads, 64, head_dim] with an even head_dim of at most 256");
    for (size_t i = 0; i < 4; ++i) require(k.shape(i) == v.shape(i), "k and v differ in shape");
    require(int64_t(k.itemsize()) == element_size(kind) && int64_t(v.itemsize()) == element_size(kind), "cache element size");
    bool dynamic = k_scale.ndim() == 3;
    require(!dynamic || CacheKind(kind) >= CacheKind::int8, "a float cache has no dynamic scales");
    for (const S* scale : {&k_scale, &v_scale})
        require(dynamic ? scale->ndim() == 3 && scale->shape(0) == k.shape(0) && scale->shape(1) == k.shape(1) && scale->shape(2) == size_t(kPage)
                        : scale->ndim() == 1 && scale->shape(0) == k.shape(1),
                "cache scales must be [kv_heads], or dynamic: [pages, kv_heads, 64]");
    return {CacheKind(kind), (uint8_t*)k.data(), (uint8_t*)v.data(), (float*)k_scale.data(), (float*)v_scale.data(), dynamic,
            int64_t(k.shape(1)), int64_t(k.shape(3))};
}

inline void check_rope(const ConstFloats& cos, const ConstFloats& sin, int64_t head_size) {
    require(int64_t(cos.shape(1)) == head_size / 2 && cos.shape(0) == sin.shape(0) && cos.shape(1) == sin.shape(1),
            "cos and sin must be [positions, d / 2]");
}

inline void check_norms(const std::optional<ConstVector>& q, const std::optional<ConstVector>& k, int64_t head_size) {
    require((!q && !k) || (q && k && int64_t(q->shape(0)) == head_size && int64_t(k->shape(0)) == head_size),
            "norms must be two of [d]");
}

inline void check_rows(const Index32& positions, const Index64& slots, int64_t rope_length, int64_t pages) {
    for (size_t i = 0; i < positions.shape(0); ++i) {
        require(positions.data()[i] >= 0 && positions.data()[i] < rope_length, "a position is beyond the RoPE table");
        require(slots.data()[i] >= 0 && slots.data()[i] < pages * kPage, "a slot is beyond the cache");
    }
}

inline void check_sequences(const Index32& starts, const Index32& context, const Array<const int32_t, 2>& tables,
                            int64_t rows, int64_t pages) {
    int64_t sequences = int64_t(context.shape(0)), width = int64_t(tables.shape(1));
    require(int64_t(starts.shape(0)) == sequences + 1 && int64_t(tables.shape(0)) == sequences, "one row per sequence");
    for (int64_t s = 0; s < sequences; ++s) {
        int64_t first = starts.data()[s], last = starts.data()[s + 1], used = (context.data()[s] + kPage - 1) / kPage;
        require(first >= 0 && last >= first && last <= rows && context.data()[s] >= last - first, "starts");
        require(used <= width, "a sequence has more tokens than its table has pages");
        for (int64_t p = 0; p < used; ++p)
            require(tables.data()[s * width + p] >= 0 && tables.data()[s * width + p] < pages, "a page is beyond the cache");
    }
}

}  // namespace quantbench
