// A model as one native object: a step runs all of its blocks in one call, with no Python in between.
//
// The layer loop is the one of infer/engine/forward.py, over the same operations (operations.h); a test holds the two
// together bit for bit. Arrays and weights are kept alive, and used where they lie: a change of one is seen.
#pragma once

#include <array>
#include <mutex>

#include "checks.h"
#include "kernels.h"
#include "operations.h"

namespace quantbench {

// How an activation leaves the operation that makes it. No scale: dynamic, one per token.
struct Spec {
    Quant format = Quant::none;
    std::optional<float> scale;
};

// The linears that share one input, their outputs side by side.
class Linears {
public:
    Linears(int format, std::optional<float> scale) : spec{Quant(format), scale} {}
    // With `own`, the weight takes the floats and quantizes them as (format, scale).
    void add(const PackedWeight& weight, bool own, int format, std::optional<float> scale);

    struct Part {
        const Weight* weight;
        std::optional<Spec> own;
        int64_t bytes;
    };
    Spec spec;
    std::vector<Part> parts;
    int64_t rows = 0, columns = 0, bytes = 0;
};

struct Block {
    ConstVector attn_norm, mlp_norm;
    std::optional<ConstVector> q_norm, k_norm;
    Linears qkv, o, gate_up, down;
    int64_t window;
    Cache cache;
};

// What the time of a step is told apart by.
enum Op : int { kEmbed, kNorm, kQkv, kRope, kAttention, kO, kGateUp, kSilu, kDown, kHead, kOps };

struct Spent {
    double seconds = 0, bytes = 0, operations = 0;
};

// Memory that grows and is used again by every step.
class Room {
public:
    template <class T>
    T* of(int64_t count) { return static_cast<T*>(bytes(count * int64_t(sizeof(T)))); }

private:
    void* bytes(int64_t size);
    std::shared_ptr<void> memory_;
    int64_t size_ = 0;
};

class Step {
public:
    Step(const Kernels& kernels, const PackedWeight& embedding, ConstVector norm, const Linears& head, double eps);
    void add_block(ConstVector attn_norm, const Linears& qkv, std::optional<ConstVector> q_norm, std::optional<ConstVector> k_norm,
                   int64_t window, const Linears& o, ConstVector mlp_norm, const Linears& gate_up, const Linears& down,
                   int kind, Bytes k, Bytes v, Scales k_scale, Scales v_scale);
    // Logits [R, V] of `rows` of the batch, into `logits`. False where an activation cannot be quantized or a logit is
    // not finite: the caller runs the operations one by one to say where.
    bool run(Index32 ids, Index32 positions, Index64 slots, Index32 starts, Index32 context, Array<const int32_t, 2> tables,
             ConstFloats cos, ConstFloats sin, Index64 rows, Floats logits);
    void set_profiling(bool on);
    nb::dict profile() const;

private:
    struct Batch {
        int64_t t, sequences, table_width, wanted;
        const int32_t *ids, *positions, *starts, *context, *tables;
        const int64_t *slots, *rows;
        const float *cos, *sin;
        float* logits;
        bool decoding;  // one row of each sequence
    };
    bool blocks(const Batch& b);
    bool block(const Batch& b, const Block& layer, bool first);
    bool head(const Batch& b);
    Quantize output(const Spec& spec, int64_t t, int64_t width);
    bool norm(float* x, const float* delta, const ConstVector& weight, const Linears& next, int64_t t);
    bool linears(Op op, const Linears& group, int64_t t, float* y);
    void done(Op op, double bytes, double operations);

    const Table& table_;
    const PackedWeight& embedding_;
    ConstVector norm_;
    Linears head_;
    double eps_;
    std::vector<Block> blocks_;
    std::vector<Bytes> pages_of_;  // kept alive
    std::vector<Scales> scales_of_;
    int64_t width_, pages_ = 0;
    std::mutex busy_;
    Room x_, delta_, qkv_, q_, attended_, gate_up_, values_, codes_, scales_, own_codes_, own_scales_, last_x_, last_delta_;
    Quantize input_{};  // what the last operation handed on to the linears
    bool profiling_ = false;
    double since_ = 0;
    std::array<Spent, kOps> spent_{};
};

}  // namespace quantbench
