#include "pack.h"

#include <algorithm>
#include <cstring>

#include "memory.h"
#include "pool.h"

namespace quantbench {

namespace {

int64_t row_bytes(Kind kind) {  // of one k of a panel
    switch (kind) {
        case Kind::f32: return 4 * kPanel;
        case Kind::bf16:
        case Kind::f16: return 2 * kPanel;
        case Kind::int4: return kPanel / 2;
        default: return kPanel;
    }
}

int64_t inputs_together(Kind kind) {
    return kind == Kind::int4 ? 8 : kind == Kind::int8_dot ? 4 : kind == Kind::bf16 || kind == Kind::e4m3 ? 2 : 1;
}

constexpr int64_t kRun = 16;  // inputs packed per channel in turn: reads and writes then stay within some cache lines

// Two inputs of a channel side by side. What is padded was zeroed before.
template <class T>
void pack_pairs(const Source& s, int64_t panel, T* to) {
    int64_t first = panel * kPanel, last = std::min(first + kPanel, s.rows);
    for (int64_t k0 = 0; k0 < s.columns; k0 += kRun)
        for (int64_t n = first; n < last; ++n) {
            const T* codes = static_cast<const T*>(s.codes[size_t(n)]);
            T* at = to + k0 * kPanel + (n - first) * 2;
            int64_t k1 = std::min(k0 + kRun, s.columns), k = k0;
            for (; k + 2 <= k1; k += 2, at += 2 * kPanel) std::memcpy(at, codes + k, 2 * sizeof(T));
            if (k < k1) *at = codes[k];
        }
}

template <class T>
void pack_plain(const Source& s, int64_t panel, T* to) {
    int64_t first = panel * kPanel, last = std::min(first + kPanel, s.rows);
    for (int64_t k0 = 0; k0 < s.columns; k0 += kRun)
        for (int64_t n = first; n < last; ++n) {
            const T* codes = static_cast<const T*>(s.codes[size_t(n)]);
            for (int64_t k = k0; k < std::min(k0 + kRun, s.columns); ++k) to[k * kPanel + n - first] = codes[k];
        }
}

// Channels and inputs that do not exist keep code 0, stored as 8.
void pack_int4(const Source& s, int64_t panel, uint8_t* to) {
    int64_t eights = (s.columns + 7) / 8;
    for (int64_t n = 0; n < kPanel; ++n) {
        int64_t row = panel * kPanel + n;
        const int8_t* codes = row < s.rows ? static_cast<const int8_t*>(s.codes[size_t(row)]) : nullptr;
        for (int64_t e = 0; e < eights; ++e) {
            uint32_t word = 0x88888888u;
            for (int64_t k = e * 8; codes && k < std::min(e * 8 + 8, s.columns); ++k)
                word ^= (uint32_t(codes[k]) & 15u) << (k % 2 * 16 + k % 8 / 2 * 4);  // + 8 of four bits is their top bit changed
            std::memcpy(to + (e * kPanel + n) * 4, &word, 4);
        }
    }
}

void pack_dot(const Source& s, int64_t panel, int8_t* to, int32_t* sums) {
    int64_t first = panel * kPanel, last = std::min(first + kPanel, s.rows), whole = s.columns / 4 * 4;
    for (int64_t k0 = 0; k0 < s.columns; k0 += kRun)
        for (int64_t n = first; n < last; ++n) {
            const int8_t* codes = static_cast<const int8_t*>(s.codes[size_t(n)]);
            int64_t k1 = std::min(k0 + kRun, s.columns), k = k0;
            for (; k < std::min(k1, whole); k += 4) std::memcpy(to + k * kPanel + (n - first) * 4, codes + k, 4);
            for (; k < k1; ++k) to[whole * kPanel + (n - first) * 4 + k - whole] = codes[k];
            for (k = k0; k < k1; ++k) sums[n] += codes[k];
        }
}

}  // namespace

// With room for a vector read past the end, which is zero in any case.
template <class T>
T* PackedWeight::allocate(int64_t count, bool zeroed) {
    int64_t used = count * int64_t(sizeof(T)), size = (used + 127) / 64 * 64;
    buffers_.push_back(weight_memory(size));
    auto* p = static_cast<uint8_t*>(buffers_.back().get());
    int64_t from = zeroed ? 0 : used;
    std::memset(p + from, 0, size_t(size - from));
    bytes_ += size;
    return reinterpret_cast<T*>(p);
}

PackedWeight::PackedWeight(const Source& s) {
    Weight& w = view_;
    w.kind = s.kind;
    w.rows = s.rows;
    w.columns = s.columns;
    w.panels = (s.rows + kPanel - 1) / kPanel;
    int64_t unit = inputs_together(s.kind), depth = (s.columns + unit - 1) / unit * unit;
    w.panel_bytes = depth * row_bytes(s.kind);
    w.groups = s.groups;
    w.group_size = s.group_size;
    bool padded = s.rows % kPanel != 0 || depth != s.columns;  // packing does not write channels and inputs that are not there
    uint8_t* codes = allocate<uint8_t>(w.panels * w.panel_bytes, padded);
    w.codes = codes;
    if (s.scale) pack_scales(s);
    if (s.bias) {
        float* bias = allocate<float>(w.panels * kPanel);
        std::memcpy(bias, s.bias, size_t(s.rows) * 4);
        w.bias = bias;
    }
    pack_codes(s, codes);
}

void PackedWeight::pack_codes(const Source& s, uint8_t* codes) {
    int32_t* sums = s.kind == Kind::int8_dot ? allocate<int32_t>(view_.panels * kPanel) : nullptr;
    view_.row_sum = sums;
    Pool::shared()->run(view_.panels, [&](int64_t panel) {
        uint8_t* to = codes + panel * view_.panel_bytes;
        switch (s.kind) {
            case Kind::f32: return pack_plain(s, panel, reinterpret_cast<float*>(to));
            case Kind::bf16: return pack_pairs(s, panel, reinterpret_cast<uint16_t*>(to));
            case Kind::f16: return pack_plain(s, panel, reinterpret_cast<uint16_t*>(to));
            case Kind::int8: return pack_plain(s, panel, to);
            case Kind::e4m3: return pack_pairs(s, panel, to);
            case Kind::int4: return pack_int4(s, panel, to);
            case Kind::int8_dot: return pack_dot(s, panel, reinterpret_cast<int8_t*>(to), sums);
        }
    });
}

// e4m3 is decoded as a 256th of its value (see simd.h), so its scales carry the factor 256, which is exact.
void PackedWeight::pack_scales(const Source& s) {
    float factor = s.kind == Kind::e4m3 ? 256.0f : 1.0f;
    float* scale = allocate<float>(view_.panels * s.groups * kPanel);
    float* offset = s.zero ? allocate<float>(view_.panels * s.groups * kPanel) : nullptr;
    for (int64_t n = 0; n < s.rows; ++n)
        for (int64_t g = 0; g < s.groups; ++g) {
            int64_t from = n * s.groups + g, to = (n / kPanel * s.groups + g) * kPanel + n % kPanel;
            scale[to] = s.scale[from] * factor;
            if (offset) offset[to] = -float(s.zero[from]);
        }
    view_.scale = scale;
    view_.offset = offset;
}

}  // namespace quantbench
