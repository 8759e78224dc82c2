// Warpgroup products whose 64 rows come from registers and whose TOKENS columns lie in shared memory (sm_90a):
// d = a b + (add ? d : 0), 16 inputs deep. All TOKENS / 2 result registers have to be written out in PTX.
#define OUT_4 "%0,%1,%2,%3"
#define OUT_8 OUT_4 ",%4,%5,%6,%7"
#define OUT_16 OUT_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define OUT_32 OUT_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OUT_64 OUT_32 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
    ",%56,%57,%58,%59,%60,%61,%62,%63"
#define OUT_128 OUT_64 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87" \
    ",%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define BIND_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BIND_8(d, i) BIND_4(d, i), BIND_4(d, i + 4)
#define BIND_16(d, i) BIND_8(d, i), BIND_8(d, i + 8)
#define BIND_32(d, i) BIND_16(d, i), BIND_16(d, i + 16)
#define BIND_64(d, i) BIND_32(d, i), BIND_32(d, i + 32)
#define BIND_128(d, i) BIND_64(d, i), BIND_64(d, i + 64)
#if TOKENS == 16
#define OUTS OUT_8
#define BIND(d) BIND_8(d, 0)
#define A_FOUR "%8,%9,%10,%11"
#define B_LOW "%12"
#define FLAG "%13"
#elif TOKENS == 32
#define OUTS OUT_16
#define BIND(d) BIND_16(d, 0)
#define A_FOUR "%16,%17,%18,%19"
#define B_LOW "%20"
#define FLAG "%21"
#elif TOKENS == 64
#define OUTS OUT_32
#define BIND(d) BIND_32(d, 0)
#define A_FOUR "%32,%33,%34,%35"
#define B_LOW "%36"
#define FLAG "%37"
#elif TOKENS == 128
#define OUTS OUT_64
#define BIND(d) BIND_64(d, 0)
#define A_FOUR "%64,%65,%66,%67"
#define B_LOW "%68"
#define FLAG "%69"
#elif TOKENS == 256
#define OUTS OUT_128
#define BIND(d) BIND_128(d, 0)
#define A_FOUR "%128,%129,%130,%131"
#define B_LOW "%132"
#define FLAG "%133"
#endif
#if X == 1  // BF16
#define INPUT_TYPES "bf16.bf16"
#else
#define INPUT_TYPES "f16.f16"
#endif
#define AS_TEXT_(x) #x
#define AS_TEXT(x) AS_TEXT_(x)

// `b`: the lower half of the descriptor of rows of 128 bytes, swizzled; the upper half is always the same.
DEVICE void multiply_registers(float (&d)[TOKENS / 2], const u32 (&a)[4], u32 b, bool add) {
    asm volatile(
        "{ .reg .pred add; .reg .b64 tokens; setp.ne.s32 add, " FLAG ", 0; mov.b64 tokens, {" B_LOW ", 0x40000040};\n"
        "wgmma.mma_async.sync.aligned.m64n" AS_TEXT(TOKENS) "k16.f32." INPUT_TYPES " {" OUTS "}, {" A_FOUR "}, tokens, add, 1, 1, 0; }"
        : BIND(d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(int(add)));
}
