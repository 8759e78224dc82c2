// The text of one product of 64 weight rows (a) and TOKENS tokens (b), 32 bytes of K deep: d += a b. Its TOKENS / 2
// result registers have to be written out in PTX, so lists of 4 to 128 are built by doubling.
#define LIST_4 "%0,%1,%2,%3"
#define LIST_8 LIST_4 ",%4,%5,%6,%7"
#define LIST_16 LIST_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST_32 LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST_64 LIST_32 \
    ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55" \
    ",%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST_128 LIST_64 \
    ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87" \
    ",%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
    ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define HELD_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define HELD_8(c, d, i) HELD_4(c, d, i), HELD_4(c, d, i + 4)
#define HELD_16(c, d, i) HELD_8(c, d, i), HELD_8(c, d, i + 8)
#define HELD_32(c, d, i) HELD_16(c, d, i), HELD_16(c, d, i + 16)
#define HELD_64(c, d, i) HELD_32(c, d, i), HELD_32(c, d, i + 32)
#define HELD_128(c, d, i) HELD_64(c, d, i), HELD_64(c, d, i + 64)

#if TOKENS == 8
#define LIST LIST_4
#define HELD(c, d) HELD_4(c, d, 0)
#define INPUTS "%4, %5"
#elif TOKENS == 16
#define LIST LIST_8
#define HELD(c, d) HELD_8(c, d, 0)
#define INPUTS "%8, %9"
#elif TOKENS == 32
#define LIST LIST_16
#define HELD(c, d) HELD_16(c, d, 0)
#define INPUTS "%16, %17"
#elif TOKENS == 64
#define LIST LIST_32
#define HELD(c, d) HELD_32(c, d, 0)
#define INPUTS "%32, %33"
#elif TOKENS == 128
#define LIST LIST_64
#define HELD(c, d) HELD_64(c, d, 0)
#define INPUTS "%64, %65"
#elif TOKENS == 256
#define LIST LIST_128
#define HELD(c, d) HELD_128(c, d, 0)
#define INPUTS "%128, %129"
#endif

#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define PRODUCT(shape, tail) \
    "{ .reg .pred add; setp.eq.u32 add, 0, 0; wgmma.mma_async.sync.aligned.m64n" TEXT(TOKENS) shape " {" LIST "}, " INPUTS ", add" tail "; }"

#if ELEMENT == 3  // INT8
typedef int sum_t;
DEVICE void product(sum_t (&d)[TOKENS / 2], u64 a, u64 b) {
    asm volatile(PRODUCT("k32.s32.s8.s8", "") : HELD("+r", d) : "l"(a), "l"(b));
}
#elif ELEMENT == 5  // E4M3
typedef float sum_t;
DEVICE void product(sum_t (&d)[TOKENS / 2], u64 a, u64 b) {
    asm volatile(PRODUCT("k32.f32.e4m3.e4m3", ", 1, 1") : HELD("+f", d) : "l"(a), "l"(b));
}
#elif ELEMENT == 1  // BF16
typedef float sum_t;
DEVICE void product(sum_t (&d)[TOKENS / 2], u64 a, u64 b) {
    asm volatile(PRODUCT("k16.f32.bf16.bf16", ", 1, 1, 0, 0") : HELD("+f", d) : "l"(a), "l"(b));
}
#else  // F16
typedef float sum_t;
DEVICE void product(sum_t (&d)[TOKENS / 2], u64 a, u64 b) {
    asm volatile(PRODUCT("k16.f32.f16.f16", ", 1, 1, 0, 0") : HELD("+f", d) : "l"(a), "l"(b));
}
#endif
