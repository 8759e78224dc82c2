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

constexpr int64_t kRun = 16;  // inputs packed per channel in turn: reads and writes then stay within some cache lines

template <class T>
void pack_plain(const Source& s, int64_t panel, T* to) {
    int64_t first = panel * kPanel, last = std::min(first + kPanel, s.rows);
    for (int64_t k0 = 0; k0 < s.columns; k0 += kRun)
        for (int64_t n = first; n < last; ++n) {
            const T* codes = static_cast<const T*>(s.codes[size_t(n)]);
            for (int64_t k = k0; k < std::min(k0 + kRun, s.columns); ++k) to[k * kPanel + n - first] = codes[k];
        }
}

// Channels that do not exist keep code 0, stored as 8, in the halves that nothing else fills.
void pack_int4(const Source& s, int64_t panel, uint8_t* to) {
    auto row = [&](int64_t n) { return n < s.rows ? static_cast<const int8_t*>(s.codes[size_t(n)]) : nullptr; };
    auto stored = [](const int8_t* codes, int64_t k) { return codes ? uint8_t(codes[k] + 8) & 15 : 8; };
    for (int64_t k0 = 0; k0 < s.columns; k0 += kRun)
        for (int64_t j = 0; j < 16; ++j) {
            const int8_t *low = row(panel * kPanel + j), *high = row(panel * kPanel + j + 16);
            for (int64_t k = k0; k < std::min(k0 + kRun, s.columns); ++k)
                to[k * 16 + j] = uint8_t(stored(low, k) | (stored(high, k) << 4));
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
    int64_t depth = s.kind == Kind::int8_dot ? (s.columns + 3) / 4 * 4 : s.columns;
    w.panel_bytes = depth * row_bytes(s.kind);
    w.groups = s.groups;
    w.group_size = s.group_size;
    w.scale_at_load = s.scale && (s.groups > 1 || s.zero);
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
            case Kind::bf16:
            case Kind::f16: return pack_plain(s, panel, reinterpret_cast<uint16_t*>(to));
            case Kind::int8:
            case Kind::e4m3: return pack_plain(s, panel, to);
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
            if (offset) offset[to] = -float(s.zero[from]) * s.scale[from];
        }
    view_.scale = scale;
    view_.offset = offset;
}

}  // namespace quantbench
