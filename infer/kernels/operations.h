// The operations on plain structures: how each is cut into tasks for the pool. The op table (kernels.cpp) and the native
// step (step.cpp) both run these, so that they cannot differ in a bit. Shapes were checked where Python came in.
#pragma once

#include "table.h"

namespace quantbench {

constexpr int64_t kSmallWork = 48 * 1024;  // below this many operations waking a thread costs more than it saves

// What a linear reads: floats, or codes with one scale (step 0) or one per token (step 1).
struct Input {
    const float* values;
    const void* codes;
    Quant format;
    const float* scale;
    int64_t scale_step;
};

void run_embed(const Table&, const Embed&);

// y [t][ldy], from the weight's first column on.
void run_linear(const Table&, const Weight&, const Input&, int64_t t, float* y, int64_t ldy);

// These return the lowest row that holds a NaN or an infinity, or -1. Quantize::values may be null where codes are
// asked for: values then only pass through.
int64_t run_quantize(const Table&, const float* x, int64_t t, int64_t width, const Quantize&);
int64_t run_add_norm(const Table&, AddNorm);
int64_t run_silu_mul(const Table&, SiluMul);

void run_rope_write(const Table&, const RopeWrite&);
void run_attention(const Table&, const Attention&);
// Both and the quantization of the output, for sequences of one row each: a task does all it can of a sequence. Without a
// format, the output stays in Attention::out.
int64_t run_decode(const Table&, const RopeWrite&, const Attention&, const Quantize&);
int64_t attention_work(const Attention&);  // multiplications and additions that a causal mask leaves out included
double cache_bytes(const Attention&);      // of the keys and values that are read

}  // namespace quantbench
