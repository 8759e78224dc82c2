// A weight of tiles (mixed.cu) as 16-bit floats [N, K], for products of many tokens: (code - zero) * scale in float32,
// rounded once. A block takes 64 rows of 128 inputs and turns them in shared memory, so that rows leave in whole.
//
// Macros: X (BF16 | F16), W (INT4 | INT8), ASYM (1: zero points; int4).
#include "common.cuh"
#include "mma.cuh"

constexpr int kBits = W == INT4 ? 4 : 8, kTileInputs = 256 / kBits, kInputs = 128, kTiles = kInputs / kTileInputs;
constexpr int kRow = kInputs * 2 + 16;  // bytes, padded: eight rows use different banks

DEVICE float first_of(u32 pair) { return X == BF16 ? __uint_as_float(pair << 16) : f16_to_float(u16(pair)); }
DEVICE float second_of(u32 pair) { return X == BF16 ? __uint_as_float(pair & 0xffff0000u) : f16_to_float(u16(pair >> 16)); }

KERNEL void __launch_bounds__(128) widen_tiles(const u8* codes, const float* scales, const int* zeros, u16* out, int rows,
                                               int columns, int group, int groups, int across) {
    __shared__ __align__(16) u8 held[64 * kRow];
    let_successor_start();
    wait_for_predecessor();
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, place = warp * 16 + lane / 4;
    int first_row = blockIdx.y * 64, first_input = blockIdx.x * kInputs;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        s64 at = s64(blockIdx.y) * across + blockIdx.x * kTiles + tile;
        uint4 four = *(const uint4*)(codes + at * 2048 + threadIdx.x * 16);
        u32 words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int step = 0; step < kTileInputs / 16; ++step) {
            int input = tile * kTileInputs + step * 16;
            s64 own = s64(min((first_input + input) / group, groups - 1)) * rows;
#pragma unroll
            for (int half = 0; half < 2; ++half) {  // rows g and g + 8
                int row = min(first_row + place + half * 8, rows - 1);
                float scale = scales[own + row];
                u32 offset = int4_offset<X>(ASYM ? zeros[own + row] : 0);
#pragma unroll
                for (int k = 0; k < 2; ++k) {  // inputs 2t and 2t + 8
                    u32 pair = W == INT4 ? widen_int4<X>(words[step], k * 2 + half, offset)
                                         : widen<INT8, X>(words[step % 2 * 2 + half], k * 2, k * 2 + 1);
                    u32 to = (place + half * 8) * kRow + (input + k * 8 + lane % 4 * 2) * 2;
                    *(u32*)(held + to) = pack_two<X>(first_of(pair) * scale, second_of(pair) * scale);
                }
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int i = threadIdx.x; i < 64 * kInputs / 8; i += 128) {
        int row = i / (kInputs / 8), input = i % (kInputs / 8) * 8;
        if (first_row + row < rows && first_input + input < columns)
            *(uint4*)(out + s64(first_row + row) * columns + first_input + input) = *(const uint4*)(held + row * kRow + input * 2);
    }
}
