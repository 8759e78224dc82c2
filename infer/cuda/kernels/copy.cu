// Copies of rows: embedding lookup, gathering, and the two halves of a float that tensor cores multiply exactly.
// Macros: TABLE (kind of the table's elements) for embed.
#include "common.cuh"

#ifndef TABLE
#define TABLE BF16
#endif

// Row ids[t] of table [rows, width] as f32.
KERNEL void embed(const void* table, const int* ids, float* out, int width) {
    wait_for_predecessor();
    let_successor_start();  // not before: every later kernel of the step may then count on everything before this one
    s64 from = s64(ids[blockIdx.x]) * width, to = s64(blockIdx.x) * width;
    for (int i = threadIdx.x; i < width; i += blockDim.x) out[to + i] = load_one<TABLE>(table, from + i);
}

// Row rows[r] of x, rows of `bytes` bytes (a multiple of 2).
KERNEL void gather(const u8* x, const int* rows, u8* out, int bytes) {
    let_successor_start();
    wait_for_predecessor();
    const u8* from = x + s64(rows[blockIdx.x]) * bytes;
    u8* to = out + s64(blockIdx.x) * bytes;
    if (bytes % 16 == 0) {
        for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16) *(uint4*)(to + i) = *(const uint4*)(from + i);
    } else {
        for (int i = threadIdx.x * 2; i < bytes; i += blockDim.x * 2) *(u16*)(to + i) = *(const u16*)(from + i);
    }
}

// f32[T, K] -> bf16[T, 2K]: x rounded to bf16, then what that left, rounded. Their sum keeps 16 bits of x.
KERNEL void split_bf16(const float* x, u16* out, int columns) {
    let_successor_start();
    wait_for_predecessor();
    const float* from = x + s64(blockIdx.x) * columns;
    u16* to = out + s64(blockIdx.x) * columns * 2;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        u16 high = u16(pack_bf16(from[i], 0.0f));
        to[i] = high;
        to[columns + i] = u16(pack_bf16(from[i] - bf16_to_float(high), 0.0f));
    }
}
