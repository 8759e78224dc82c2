// Packed weights: built once at load from codes as the checkpoint holds them.
#pragma once

#include <memory>
#include <vector>

#include "table.h"

namespace quantbench {

struct Source {
    Kind kind;
    int64_t rows, columns;
    std::vector<const void*> codes;  // one per row, of `columns`: f32, u16 (bf16, f16), int8 (int8, int4), u8 (e4m3)
    const float* scale;      // [rows][groups] or null
    const int32_t* zero;     // [rows][groups] or null
    int64_t groups, group_size;
    const float* bias;       // [rows] or null
};

class PackedWeight {
public:
    explicit PackedWeight(const Source& source);
    PackedWeight(const PackedWeight&) = delete;
    PackedWeight& operator=(const PackedWeight&) = delete;
    const Weight& view() const { return view_; }
    int64_t bytes() const { return bytes_; }

private:
    template <class T>
    T* allocate(int64_t count, bool zeroed = true);
    void pack_codes(const Source& source, uint8_t* to);
    void pack_scales(const Source& source);

    Weight view_{};
    int64_t bytes_ = 0;
    std::vector<std::shared_ptr<void>> buffers_;
};

}  // namespace quantbench
