// One head of one token, held by LANES neighbouring lanes, V neighbouring elements of each half at a time: the RMS norm of
// q and k, RoPE (Su et al. 2021, the halves of a head as pairs), and the way into the cache. The order of roundings is
// numpy's, so that codes in the cache equal the reference's.

constexpr int kHalf = SIZE / 2;

template <int LANES, int V>
struct Place {
    static constexpr int kRounds = (kHalf + LANES * V - 1) / (LANES * V);

    DEVICE static int element(int round) { return (threadIdx.x % LANES + LANES * round) * V; }  // of the lower half
    DEVICE static bool inside(int round) { return kRounds * LANES * V == kHalf || element(round) < kHalf; }
};

// Cosines and sines of a position.
template <int LANES, int V>
struct Angle : Place<LANES, V> {
    using Place<LANES, V>::kRounds, Place<LANES, V>::element, Place<LANES, V>::inside;
    float c[kRounds][V], s[kRounds][V];

    DEVICE void load(const float* cosines, const float* sines, s64 position) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            if (!inside(r)) continue;
            load_vector<F32>(cosines, position * kHalf + element(r), c[r]);
            load_vector<F32>(sines, position * kHalf + element(r), s[r]);
        }
    }
};

template <int LANES, int V>
struct Head : Place<LANES, V> {
    using Place<LANES, V>::kRounds, Place<LANES, V>::element, Place<LANES, V>::inside;
    float low[kRounds][V], high[kRounds][V];  // elements i and i + SIZE / 2; zeros beyond the head

    DEVICE void load(const void* x, s64 start) {
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            if (inside(r)) {
                load_vector<IO>(x, start + element(r), low[r]);
                load_vector<IO>(x, start + kHalf + element(r), high[r]);
            } else {
#pragma unroll
                for (int j = 0; j < V; ++j) low[r][j] = high[r][j] = 0.0f;
            }
        }
    }

    DEVICE void normalize(const float* weight, double eps) {  // all lanes of a warp call; null: this head has no norm
        double sum = 0;
#pragma unroll
        for (int r = 0; r < kRounds; ++r)
#pragma unroll
            for (int j = 0; j < V; ++j) sum += double(low[r][j]) * double(low[r][j]) + double(high[r][j]) * double(high[r][j]);
#pragma unroll
        for (int step = LANES / 2; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (!weight) return;
        float inverse = inverse_root(sum / SIZE + eps);
#pragma unroll
        for (int r = 0; r < kRounds; ++r)
#pragma unroll
            for (int j = 0; j < V; ++j) {
                int i = inside(r) ? element(r) + j : 0;
                low[r][j] = low[r][j] * inverse * weight[i];
                high[r][j] = high[r][j] * inverse * weight[kHalf + i];
            }
    }

    DEVICE void rotate(const Angle<LANES, V>& angle) {  // products and sums are rounded one by one
#pragma unroll
        for (int r = 0; r < kRounds; ++r)
#pragma unroll
            for (int j = 0; j < V; ++j) {
                float a = low[r][j], b = high[r][j], c = angle.c[r][j], s = angle.s[r][j];
                low[r][j] = __fsub_rn(__fmul_rn(a, c), __fmul_rn(b, s));
                high[r][j] = __fadd_rn(__fmul_rn(b, c), __fmul_rn(a, s));
            }
    }

    // The scale on the way into the cache: given, or computed of the head's own values (PER_TOKEN; all lanes of a warp
    // call); 1 for floats. A head with a NaN or an infinity has scale NaN, so that whoever reads it finds out.
    DEVICE float cache_scale(const float* scales, int head) const {
        if constexpr (PER_TOKEN) {
            u32 top = 0;  // of magnitudes as bits: those of NaN and infinity are above every number's
#pragma unroll
            for (int r = 0; r < kRounds; ++r)
#pragma unroll
                for (int j = 0; j < V; ++j)
                    if (inside(r)) top = max(top, max(__float_as_uint(fabsf(low[r][j])), __float_as_uint(fabsf(high[r][j]))));
#pragma unroll
            for (int step = LANES / 2; step; step /= 2) top = max(top, __shfl_xor_sync(~0u, top, step));
            return top >= 0x7f800000u ? __uint_as_float(0x7fffffffu) : dynamic_scale<CACHE>(__uint_as_float(top));
        } else if constexpr (CACHE == INT8 || CACHE == E4M3) {
            return scales[head];
        }
        return 1.0f;
    }

    template <int KIND>
    DEVICE void store(void* to, s64 start) const {  // from element `start` on, as floats
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
            if (!inside(r)) continue;
            store_vector<KIND>(to, start + element(r), low[r]);
            store_vector<KIND>(to, start + kHalf + element(r), high[r]);
        }
    }

    DEVICE void store_cache(void* pages, s64 start, float scale) const {
        if constexpr (CACHE == INT8 || CACHE == E4M3) {
            float inverse = __fdiv_rn(1.0f, scale);
#pragma unroll
            for (int r = 0; r < kRounds; ++r) {
                if (!inside(r)) continue;
                u8 codes[2][V];
                encode_all<CACHE>(low[r], scale, inverse, codes[0]);
                encode_all<CACHE>(high[r], scale, inverse, codes[1]);
                store_codes<V>(pages, start + element(r), codes[0]);
                store_codes<V>(pages, start + kHalf + element(r), codes[1]);
            }
        } else {
            store<CACHE>(pages, start);
        }
    }
};
