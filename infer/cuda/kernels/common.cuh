// What every kernel shares: types, conversions, block reductions, quantization, programmatic dependent launch.
// No CUDA header is included: NVRTC's built-in types and PTX are enough, and a machine needs only the driver.

typedef signed char s8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long s64;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__

enum { F32 = 0, BF16 = 1, F16 = 2, INT8 = 3, INT4 = 4, E4M3 = 5 };  // the kinds of infer/ops/pack.py

constexpr float kSmallestScale = 1.17549435e-38f;  // below it a scale is subnormal; 1 stands in, as in quantizers/
constexpr int kPage = 64;                          // tokens per page of the KV cache

// ---- programmatic dependent launch: a kernel may start while its predecessor still runs ----

// Everything the predecessors wrote is visible after this; before it, read only what no kernel writes.
DEVICE void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

DEVICE void let_successor_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- numbers ----

// Two floats as bf16 or f16, the first in the low half; rounded to nearest even.
DEVICE u32 pack_bf16(float low, float high) {
    u32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE u32 pack_f16(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}
DEVICE float f16_to_float(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
DEVICE float bf16_to_float(u16 bits) { return __uint_as_float(u32(bits) << 16); }

DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}
DEVICE u32 multiply_f16x2(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEVICE u32 subtract_f16x2(u32 a, u32 b) {
    u32 r;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// Two e4m3 codes, in bytes 0 and 1 (others ignored), as f16x2. Exact.
DEVICE u32 e4m3x2_to_f16x2(u32 codes) {
#if __CUDA_ARCH__ >= 890
    u32 r;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(r) : "r"(codes));
    return r;
#else
    u32 spread = permute_bytes(codes, 0, 0x1404);  // a code in the upper byte of each half
    u32 shifted = (spread & 0x80008000u) | ((spread & 0x7f007f00u) >> 1);
    return multiply_f16x2(shifted, 0x5c005c00u);  // exponents of e4m3 start 8 below those of f16: times 256
#endif
}
DEVICE float e4m3_to_float(u8 code) { return f16_to_float(u16(e4m3x2_to_f16x2(code))); }

// The e4m3 code nearest to a finite x, ties to even, saturating at 448.
DEVICE u8 encode_e4m3(float x) {
#if __CUDA_ARCH__ >= 890
    u16 codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(0.0f), "f"(x));
    return u8(codes);
#else
    u32 sign = (__float_as_uint(x) >> 24) & 0x80u;
    float magnitude = fminf(fabsf(x), 448.0f);
    if (magnitude < 0.015625f) return u8(sign | u32(__float2int_rn(magnitude * 512.0f)));  // subnormal steps of 2^-9
    u32 bits = __float_as_uint(magnitude);
    bits += 0x7ffffu + ((bits >> 20) & 1);  // round to three mantissa bits
    return u8(sign | ((bits >> 20) - (120u << 3)));
#endif
}
DEVICE u8 encode_int8(float x) { return u8(s8(fminf(fmaxf(rintf(x), -127.0f), 127.0f))); }

// clip(round_half_even(x / scale)): the division is a true one, so that codes equal the reference's.
template <int CODE>
DEVICE u8 encode(float x, float scale) {
    float q = __fdiv_rn(x, scale);
    return CODE == INT8 ? encode_int8(q) : encode_e4m3(q);
}
// The same codes for several numbers of one scale: multiplies by 1 / scale, and divides only where such a product, which
// errs by less than 2e-7 of itself, lies so near a boundary between two codes that it might decide otherwise.
template <int CODE, int V>
DEVICE void encode_all(const float (&x)[V], float scale, float inverse, u8 (&codes)[V]) {
    bool doubtful = CODE == E4M3;
#if __CUDA_ARCH__ >= 890
    doubtful = false;
#endif
    float farthest = 0;  // from its code
#pragma unroll
    for (int j = 0; j < V; ++j) {
        float q = x[j] * inverse;
        if constexpr (CODE == INT8) {  // without the slow conversions: the sum's last bits are the rounded number
            q = fminf(fmaxf(q, -127.25f), 127.25f);
            float sum = __fadd_rn(q, 12582912.0f);  // 1.5 * 2^23
            farthest = fmaxf(farthest, fabsf(q - (sum - 12582912.0f)));
            codes[j] = u8(__float_as_uint(sum));
        } else {
#if __CUDA_ARCH__ >= 890
            u16 both;
            asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(q * 1.0000004f), "f"(q * 0.9999996f));
            doubtful |= (both >> 8) != (both & 0xff);
            codes[j] = u8(both);
#endif
        }
    }
    if (doubtful || farthest > 0.4999f) {
#pragma unroll
        for (int j = 0; j < V; ++j) codes[j] = encode<CODE>(x[j], scale);
    }
}
template <int CODE>
DEVICE float dynamic_scale(float absmax) {
    float scale = __fdiv_rn(absmax, CODE == INT8 ? 127.0f : 448.0f);
    return scale < kSmallestScale ? 1.0f : scale;
}

template <int KIND>
DEVICE float load_one(const void* p, s64 i) {
    if constexpr (KIND == F32) return ((const float*)p)[i];
    else if constexpr (KIND == BF16) return bf16_to_float(((const u16*)p)[i]);
    else if constexpr (KIND == F16) return f16_to_float(((const u16*)p)[i]);
    else if constexpr (KIND == INT8) return float(((const s8*)p)[i]);
    else return e4m3_to_float(((const u8*)p)[i]);
}
template <int KIND>
DEVICE u32 pack_two(float low, float high) {
    return KIND == BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}
template <int KIND>
DEVICE void store_one(void* p, s64 i, float x) {
    if constexpr (KIND == F32) ((float*)p)[i] = x;
    else ((u16*)p)[i] = u16(pack_two<KIND>(x, x));
}

// V neighbours as they are stored, read in one access where V allows; p + i is aligned to V elements.
template <int KIND, int V>
struct Held {
    static constexpr int kWords = (V * (KIND == F32 ? 4 : 2) + 3) / 4;
    u32 words[kWords];
    DEVICE void load(const void* p, s64 i) {
        if constexpr (V == 1) {
            words[0] = KIND == F32 ? ((const u32*)p)[i] : ((const u16*)p)[i];
        } else if constexpr (kWords % 4 == 0) {
#pragma unroll
            for (int w = 0; w < kWords; w += 4) *(uint4*)(words + w) = *((const uint4*)((const u8*)p + i * (KIND == F32 ? 4 : 2)) + w / 4);
        } else {
            *(uint2*)words = *(const uint2*)((const u16*)p + i);
        }
    }
    DEVICE float at(int j) const {
        if constexpr (KIND == F32) return __uint_as_float(words[j]);
        else if constexpr (KIND == BF16) return __uint_as_float(j % 2 ? words[j / 2] & 0xffff0000u : words[j / 2] << 16);
        else return f16_to_float(u16(j % 2 ? words[j / 2] >> 16 : words[j / 2]));
    }
};
template <int KIND, int V>
DEVICE void load_vector(const void* p, s64 i, float (&v)[V]) {
    Held<KIND, V> held;
    held.load(p, i);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = held.at(j);
}
template <int KIND, int V>
DEVICE void store_vector(void* p, s64 i, const float (&v)[V]) {
    if constexpr (V == 1) {
        store_one<KIND>(p, i, v[0]);
    } else if constexpr (KIND == F32) {
#pragma unroll
        for (int j = 0; j < V; j += 4) *(float4*)((float*)p + i + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
    } else {
        u32 words[V / 2];
#pragma unroll
        for (int j = 0; j < V / 2; ++j) words[j] = pack_two<KIND>(v[2 * j], v[2 * j + 1]);
        if constexpr (V == 8) *(uint4*)((u16*)p + i) = *(uint4*)words;
        else *(uint2*)((u16*)p + i) = *(uint2*)words;
    }
}
template <int V>
DEVICE void store_codes(void* p, s64 i, const u8 (&codes)[V]) {
    if constexpr (V == 8) {
        *(uint2*)((u8*)p + i) = make_uint2(codes[0] | codes[1] << 8 | codes[2] << 16 | u32(codes[3]) << 24,
                                           codes[4] | codes[5] << 8 | codes[6] << 16 | u32(codes[7]) << 24);
    } else if constexpr (V == 4) {
        *(u32*)((u8*)p + i) = codes[0] | codes[1] << 8 | codes[2] << 16 | u32(codes[3]) << 24;
    } else {
        ((u8*)p)[i] = codes[0];
    }
}

struct Four {
    float v[4];
};
// Four neighbouring results as KIND; codes have the scale `scale` and stand at whole fours.
template <int KIND>
DEVICE void store_four(void* out, s64 at, const Four& four, float scale) {
    if constexpr (KIND == INT8 || KIND == E4M3) {
        u8 codes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) codes[i] = encode<KIND>(four.v[i], scale);
        store_codes<4>(out, at, codes);
    } else if (at % 4 == 0) {
        store_vector<KIND>(out, at, four.v);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_one<KIND>(out, at + i, four.v[i]);
    }
}

// silu(gate) * up. The exact form follows the CPU runtime to the last bits; the fast one errs by about 1e-6.
template <bool TO_THE_BIT>
DEVICE float swiglu(float gate, float up) {
    if constexpr (TO_THE_BIT) return __fdiv_rn(gate, 1.0f + expf(-gate)) * up;
    else return __fdividef(gate, 1.0f + __expf(fminf(-gate, 80.0f))) * up;  // __fdividef is 0 beyond 2^126
}

// What sums are held in: double where results shall not depend on the order of the terms.
template <bool WIDE> struct Real { typedef float type; };
template <> struct Real<true> { typedef double type; };

// ---- reductions ----

DEVICE double warp_sum(double x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
    return x;
}
DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = 16; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
    return x;
}

// Over all threads of a block, in a fixed order; `shared` holds 32 values and is not reused before a barrier.
template <int COUNT>
DEVICE double block_sum(double x, double* shared) {
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0;
#pragma unroll
    for (int i = 0; i < COUNT / 32; ++i) total += shared[i];
    return total;
}
template <int COUNT>
DEVICE u32 block_max(u32 x, u32* shared) {
    x = __reduce_max_sync(~0u, x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < COUNT / 32; ++i) top = max(top, shared[i]);
    return top;
}

// 1 / sqrt(mean_square + eps) to float's last bit: a float guess, refined twice in double (Newton).
DEVICE float inverse_root(double x) {
    double y = rsqrtf(float(x));
    y = y * (1.5 - 0.5 * x * y * y);
    y = y * (1.5 - 0.5 * x * y * y);
    return float(y);
}
