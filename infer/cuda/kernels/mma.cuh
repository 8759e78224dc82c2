// Tensor-core products of 16 weight rows and 8 tokens (mma.sync, sm_80 and newer), and codes made ready for them.
// A lane is (g, t) = (lane / 4, lane % 4). a0, a2 hold row g, a1, a3 row g + 8; b0, b1 hold token g; the result's c0, c1
// are row g, tokens 2t and 2t + 1, c2, c3 row g + 8. Which inputs a register holds does not matter as long as A and B agree.

DEVICE void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <int KIND>
DEVICE void mma_16bit(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    if constexpr (KIND == F16) mma_f16(c, a0, a1, a2, a3, b0, b1);
    else mma_bf16(c, a0, a1, a2, a3, b0, b1);
}
DEVICE void mma_codes(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // int8
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_codes(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {  // e4m3
#if __CUDA_ARCH__ >= 890
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else  // as f16: exact products
    mma_f16(c, e4m3x2_to_f16x2(a0), e4m3x2_to_f16x2(a1), e4m3x2_to_f16x2(a0 >> 16), e4m3x2_to_f16x2(a1 >> 16),
            e4m3x2_to_f16x2(b0), e4m3x2_to_f16x2(b0 >> 16));
    mma_f16(c, e4m3x2_to_f16x2(a2), e4m3x2_to_f16x2(a3), e4m3x2_to_f16x2(a2 >> 16), e4m3x2_to_f16x2(a3 >> 16),
            e4m3x2_to_f16x2(b1), e4m3x2_to_f16x2(b1 >> 16));
#endif
}

DEVICE u32 fma_bf16x2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

// (word & MASK) | magic as one instruction: of two constants a compiler makes two.
template <u32 MASK>
DEVICE u32 keep_bits(u32 word, u32 magic) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "n"(MASK), "r"(magic));
    return r;
}

// Bytes `first` and `second` of `codes` as two floats of KIND. Exact.
template <int CODE, int KIND>
DEVICE u32 widen(u32 codes, int first, int second) {
    if constexpr (CODE == E4M3 && KIND == F16) return e4m3x2_to_f16x2(permute_bytes(codes, 0, first | second << 4));
    u32 spread = permute_bytes(codes, 0, 0x4040 | first | second << 8);  // a code in the lower byte of each half
    if constexpr (CODE == E4M3) {                                        // its exponent starts 120 below bf16's: times 2^120
        u32 shifted = (spread & 0x00800080u) << 8 | (spread & 0x007f007fu) << 4;
        return fma_bf16x2(shifted, 0x7b807b80u, 0x80008000u);
    } else if constexpr (KIND == F16) {  // 1024 + (code + 128), less 1152
        return subtract_f16x2((spread ^ 0x00800080u) | 0x64006400u, 0x64806480u);
    } else {  // (128 + low seven bits) - (128 or, where the sign bit is set, 256)
        return fma_bf16x2(keep_bits<0x007f007fu>(spread, 0x43004300u), 0x3f803f80u, keep_bits<0x00800080u>(spread, 0xc300c300u));
    }
}

// Four nibbles' worth: codes `pair` and `pair + 4` of a word of eight, less the offset given as two floats of KIND.
template <int KIND>
DEVICE u32 widen_int4(u32 word, int pair, u32 minus_offset) {
    u32 number = keep_bits<0x000f000fu>(word >> (4 * pair), KIND == F16 ? 0x64006400u : 0x43004300u);
    return KIND == F16 ? fma_f16x2(number, 0x3c003c00u, minus_offset) : fma_bf16x2(number, 0x3f803f80u, minus_offset);
}
// -(magic + 8 + zero), twice: what widen_int4 adds so that nibble - 8 - zero remains. Exact for |zero| <= 8.
template <int KIND>
DEVICE u32 int4_offset(int zero) {
    float offset = -((KIND == F16 ? 1024.0f : 128.0f) + 8.0f + float(zero));
    return pack_two<KIND == F16 ? F16 : BF16>(offset, offset);
}

// ---- shared memory ----

DEVICE u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// 16 bytes from memory, or zeros where not valid.
DEVICE void copy_chunk(u32 to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void wait_for_copies() {  // of this thread, but the last PENDING groups
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8. Register i of lane
// (g, t) holds row g, elements 2t and 2t + 1 of matrix i; transposed: column g, rows 2t and 2t + 1.
DEVICE void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void load_two_matrices(u32& a, u32& b, u32 address) {  // of lanes 0 to 15
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}
DEVICE void load_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE u32 transpose(u32 a) {  // of an 8 x 8 matrix held in one register per lane
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
    return r;
}
