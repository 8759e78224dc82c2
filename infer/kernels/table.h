// What a kernel takes, and the table of kernels that each instruction set fills in. Plain data and pointers only:
// shapes, dtypes and contiguity were checked where Python came in (module.cpp), so nothing below checks again.
#pragma once

#include <cstddef>
#include <cstdint>

namespace quantbench {

constexpr int64_t kPanel = 32;      // output channels that lie side by side in a packed weight
constexpr int64_t kPage = 64;       // tokens per page of the KV cache
constexpr int64_t kBins = 2048;     // histogram bins of observe

enum class Quant : int { none, int8, e4m3 };
enum class Kind : int { f32, bf16, f16, int8, int4, e4m3, int8_dot };

// A packed linear. Layout of a panel of 32 output channels n:
//   f32 f16 int8             [k][32]
//   bf16 e4m3                [k / 2][32][2], k padded with a zero to a multiple of 2
//   int4                     [k / 8][32] words of 32 bits, code + 8 of input k in bits 16 (k % 2) + 4 (k % 8 / 2) up, k
//                            padded with code 0 to a multiple of 8
//   int8_dot                 [k / 4][32][4], k padded with zeros to a multiple of 4: for int8 codes, and for floats as digits
struct Weight {
    Kind kind;
    int64_t rows, columns, panels, panel_bytes;
    int64_t group_size;        // inputs per scale; columns where there is one scale per channel
    int64_t groups;            // more than one: the sum of each is scaled, else the whole at the end
    const uint8_t* codes;
    const float* scale;        // [panels][groups][32] or null
    const float* offset;       // -zero, same layout, or null
    const float* bias;         // [panels * 32] or null
    const int32_t* row_sum;    // [panels * 32], int8_dot only: sum of a channel's codes
};

struct Linear {
    Weight w;
    Quant format;              // of the input: none (floats), or codes
    const void* a;             // the input as `prepare` made it, or the floats [t][columns] where it makes nothing
    const float* a_sums;       // [t][groups], of inputs, where the weight has zero points; also by `prepare`
    const float* a_scale;      // null, or one value (step 0) or one per token (step 1)
    int64_t a_scale_step;
    int64_t t;
    float* y;                  // [t][ldy], first column of this weight
    int64_t ldy;
    int64_t digits = 1;        // 3: rows of `a` are the digits of t / 3 tokens, and a_scale is per token
};

// The input of a linear [t][columns] into the form that the instruction set multiplies: floats, bf16, or int8 codes.
struct Prepare {
    Kind kind;                 // of the weight
    bool shifted;              // the weight has zero points: sums of the inputs are asked for
    int64_t columns, group_size, groups;
    Quant format;              // of the source
    const void* source;        // floats or codes
    int64_t t;
    void* out;
    float* sums;               // [t][groups], asked for where shifted
    int64_t digits = 1;        // as in Linear
};
inline Prepare preparation(const Weight& w, Quant format, const void* source, int64_t t, int64_t digits = 1) {
    return {w.kind, w.offset != nullptr, w.columns, w.group_size, w.groups, format, source, t, nullptr, nullptr, digits};
}

// Floats as int8 digits: x = scale * (65536 d0 + 256 d1 + d2), rounded to 2^-23 of the row's largest magnitude.
struct Split {
    const float* x;            // [t][columns]
    int64_t columns;
    int8_t* codes;             // [t][3][columns]
    float* scale;              // [t]; NaN where the row has a NaN or an infinity
};
constexpr int64_t kDigits = 3;

struct Quantize {
    Quant format;
    float static_scale;        // used where dynamic is false
    bool dynamic;
    float* values;             // [t][width] or null
    void* codes;               // [t][width] or null
    float* scale;              // [t] dynamic, [1] static
};

struct AddNorm {
    float* x;
    const float* delta;
    const float* weight;
    int64_t t, width;
    double eps;
    Quantize out;
};

struct SiluMul {
    const float* gate_up;
    int64_t t, width;
    Quantize out;
};

enum class CacheKind : int { f32, bf16, f16, int8, e4m3 };

struct Cache {
    CacheKind kind;
    uint8_t *k, *v;            // [pages][heads][64][size]
    float *k_scale, *v_scale;  // [heads], read; dynamic: [pages][heads][64], one per token and head, which writing sets
    bool dynamic;
    int64_t heads, size;
};

struct RopeWrite {
    const float* qkv;
    const int32_t* positions;
    const int64_t* slots;
    const float *cos, *sin;
    const float *q_norm, *k_norm;
    double eps;
    float* q;
    int64_t t, q_heads;
    Cache cache;
};

struct Attention {
    const float* q;
    float* out;
    const int32_t *starts, *context, *tables;
    int64_t table_width;
    int64_t sequences, q_heads;
    int64_t window;            // 0: none
    Cache cache;
};

struct Observe {
    const float* x;
    int64_t t, channels, rows;
    const float* limit;        // [rows]
    float* channel_absmax;     // [channels]
    double* channel_sum;
    float *minimum, *maximum;  // [rows]
    int64_t* histogram;        // [rows][kBins]
};

struct Embed {
    Weight w;
    const int32_t* ids;
    int64_t t;
    float* out;
};

// Functions over a range return the first row with a NaN or infinity, or -1, where they quantize.
struct Table {
    const char* name;
    int64_t strip;             // prepare takes ranges of a multiple of so many tokens; of rows of digits, a multiple of kDigits less
    void (*split)(const Split&, int64_t first, int64_t last);
    int64_t (*prepared_bytes)(const Prepare&);   // of `out`; 0: floats are read where they lie, and only sums are made
    void (*prepare)(const Prepare&, int64_t first, int64_t last);
    void (*linear)(const Linear&, int64_t first_panel, int64_t last_panel);
    int64_t (*quantize)(const float* x, int64_t width, const Quantize&, int64_t first, int64_t last);
    int64_t (*add_norm)(const AddNorm&, int64_t first, int64_t last);
    int64_t (*silu_mul)(const SiluMul&, int64_t first, int64_t last);
    void (*rope_write)(const RopeWrite&, int64_t first, int64_t last);
    void (*attention)(const Attention&, int64_t sequence, int64_t head, int64_t first_row, int64_t last_row);
    void (*decode)(const RopeWrite&, const Attention&, int64_t sequence, int64_t first_head, int64_t last_head);
    void (*embed)(const Embed&, int64_t first, int64_t last);
    int64_t (*observe)(const Observe&, int64_t first_channel, int64_t last_channel);
    float (*absmax)(const float* x, int64_t t, int64_t channels, int64_t first, int64_t last);
    double (*peak_float)(int64_t rounds);
    double (*peak_int8)(int64_t rounds);
    double (*read_all)(const float* x, int64_t count);
};

const Table* generic_table();
const Table* avx2_table();
const Table* avxvnni_table();
const Table* avx512vnni_table();
const Table* avx512bf16_table();
const Table* amx_table();

}  // namespace quantbench
