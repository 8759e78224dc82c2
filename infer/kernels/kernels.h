// The operations as Python calls them: one table of kernels, and how each operation is cut into tasks.
#pragma once

#include "arrays.h"
#include "pack.h"

namespace quantbench {

class Kernels {
public:
    explicit Kernels(const std::string& isa);

    std::string isa() const { return table_.name; }
    const Table& table() const { return table_; }
    void linear(const PackedWeight& w, std::optional<ConstFloats> values, std::optional<ConstBytes> codes, int format,
                std::optional<ConstVector> a_scale, Floats y, int64_t column) const;
    int64_t quantize(ConstFloats x, int format, std::optional<float> scale, Bytes codes, Array<float, 1> scales) const;
    int64_t add_norm(Floats x, std::optional<ConstFloats> delta, ConstVector weight, double eps,
                     std::optional<Floats> values, int format, std::optional<float> scale, std::optional<Bytes> codes,
                     std::optional<Array<float, 1>> scales) const;
    int64_t silu_mul(ConstFloats gate_up, std::optional<Floats> values, int format, std::optional<float> scale,
                     std::optional<Bytes> codes, std::optional<Array<float, 1>> scales) const;
    void rope_write(ConstFloats qkv, Array<const int32_t, 1> positions, Array<const int64_t, 1> slots, ConstFloats cos,
                    ConstFloats sin, std::optional<ConstVector> q_norm, std::optional<ConstVector> k_norm, double eps,
                    int kind, Bytes k, Bytes v, Scales k_scale, Scales v_scale, Floats q) const;
    void attention(ConstFloats q, Array<const int32_t, 1> starts, Array<const int32_t, 1> context,
                   Array<const int32_t, 2> tables, int kind, ConstBytes k, ConstBytes v, ConstScales k_scale,
                   ConstScales v_scale, int64_t window, Floats out) const;
    void embed(const PackedWeight& table, Array<const int32_t, 1> ids, Floats out) const;
    int64_t observe(ConstFloats x, int64_t rows, ConstVector limit, Array<float, 1> channel_absmax,
                    Array<double, 1> channel_sum, Array<float, 1> minimum, Array<float, 1> maximum,
                    Array<int64_t, 2> histogram) const;
    void absmax(ConstFloats x, int64_t rows, Array<float, 1> out) const;
    double read_gb_per_s(int64_t bytes, int rounds) const;
    double gop_per_s(const std::string& kind, double seconds) const;  // float32, int8 or bf16

private:
    const Table& table_;
};

}  // namespace quantbench
