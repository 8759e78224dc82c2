// The text of one product of 64 rows (a) and COLUMNS columns (b; TOKENS of them, unless the kernel says otherwise), 32
// bytes of K deep: d = a b, or d += a b. Its COLUMNS / 2 result registers have to be written out in PTX: lists of 4 to 128.
#ifndef COLUMNS
#define COLUMNS TOKENS
#endif
#define LIST_4 "%0,%1,%2,%3"
#define LIST_8 LIST_4 ",%4,%5,%6,%7"
#define LIST_16 LIST_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST_32 LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST_48 LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST_64 LIST_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST_80 LIST_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LIST_96 LIST_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LIST_112 LIST_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define LIST_128 LIST_112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define HELD_4(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3])
#define HELD_8(c, d, i) HELD_4(c, d, i), HELD_4(c, d, i + 4)
#define HELD_16(c, d, i) HELD_8(c, d, i), HELD_8(c, d, i + 8)
#define HELD_32(c, d, i) HELD_16(c, d, i), HELD_16(c, d, i + 16)
#define HELD_48(c, d, i) HELD_32(c, d, i), HELD_16(c, d, i + 32)
#define HELD_64(c, d, i) HELD_32(c, d, i), HELD_32(c, d, i + 32)
#define HELD_80(c, d, i) HELD_64(c, d, i), HELD_16(c, d, i + 64)
#define HELD_96(c, d, i) HELD_64(c, d, i), HELD_32(c, d, i + 64)
#define HELD_112(c, d, i) HELD_96(c, d, i), HELD_16(c, d, i + 96)
#define HELD_128(c, d, i) HELD_64(c, d, i), HELD_64(c, d, i + 64)

#if COLUMNS == 8
#define REGISTERS 4
#define INPUTS "%4, %5"
#define ADD "%6"
#elif COLUMNS == 16
#define REGISTERS 8
#define INPUTS "%8, %9"
#define ADD "%10"
#elif COLUMNS == 32
#define REGISTERS 16
#define INPUTS "%16, %17"
#define ADD "%18"
#elif COLUMNS == 64
#define REGISTERS 32
#define INPUTS "%32, %33"
#define ADD "%34"
#elif COLUMNS == 96
#define REGISTERS 48
#define INPUTS "%48, %49"
#define ADD "%50"
#elif COLUMNS == 128
#define REGISTERS 64
#define INPUTS "%64, %65"
#define ADD "%66"
#elif COLUMNS == 160
#define REGISTERS 80
#define INPUTS "%80, %81"
#define ADD "%82"
#elif COLUMNS == 192
#define REGISTERS 96
#define INPUTS "%96, %97"
#define ADD "%98"
#elif COLUMNS == 224
#define REGISTERS 112
#define INPUTS "%112, %113"
#define ADD "%114"
#elif COLUMNS == 256
#define REGISTERS 128
#define INPUTS "%128, %129"
#define ADD "%130"
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define LIST JOIN(LIST_, REGISTERS)
#define HELD(c, d) JOIN(HELD_, REGISTERS)(c, d, 0)
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define PRODUCT(shape, tail) \
    "{ .reg .pred add; setp.ne.u32 add, " ADD ", 0; wgmma.mma_async.sync.aligned.m64n" TEXT(COLUMNS) shape \
    " {" LIST "}, " INPUTS ", add" tail "; }"

#if ELEMENT == 3  // INT8
typedef int sum_t;
#define PRODUCT_TEXT PRODUCT("k32.s32.s8.s8", "")
#define HELD_AS "+r"
#elif ELEMENT == 5  // E4M3
typedef float sum_t;
#define PRODUCT_TEXT PRODUCT("k32.f32.e4m3.e4m3", ", 1, 1")
#define HELD_AS "+f"
#elif ELEMENT == 1  // BF16
typedef float sum_t;
#define PRODUCT_TEXT PRODUCT("k16.f32.bf16.bf16", ", 1, 1, 0, 0")
#define HELD_AS "+f"
#else  // F16
typedef float sum_t;
#define PRODUCT_TEXT PRODUCT("k16.f32.f16.f16", ", 1, 1, 0, 0")
#define HELD_AS "+f"
#endif

// `add` false: what d held before does not count.
DEVICE void product(sum_t (&d)[COLUMNS / 2], u64 a, u64 b, u32 add = 1) {
    asm volatile(PRODUCT_TEXT : HELD(HELD_AS, d) : "l"(a), "l"(b), "r"(add));
}

// The registers are the products' until here.
DEVICE void take_back(sum_t (&d)[COLUMNS / 2]) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; ++i) asm volatile("" : HELD_AS(d[i])::"memory");
}
