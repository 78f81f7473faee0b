// MULTILORA_LANES floats at a time, in the compiler's own vector type: one source for every
// instruction set. Each of generic.cpp, avx2.cpp and avx512.cpp sets the number of lanes (and
// MULTILORA_INTRINSICS where x86 intrinsics may be used) and includes this once, after it has
// turned its instruction set on.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kLanes = MULTILORA_LANES;

typedef float vf __attribute__((vector_size(4 * MULTILORA_LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * MULTILORA_LANES)));
typedef int32_t vi __attribute__((vector_size(4 * MULTILORA_LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * MULTILORA_LANES)));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <typename To, typename From>
inline To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To out;
    std::memcpy(&out, &x, sizeof out);
    return out;
}

inline vf splat(float x) { return x - vf{}; }  // x + 0 would cost an addition: -0 + 0 is +0

// a * b + c with one rounding where the machine has that. A kernel that sums the same terms in
// several loops says this and not `+=`, which each loop may turn into something else.
#if defined(MULTILORA_INTRINSICS) && MULTILORA_LANES == 16
inline vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
#elif defined(MULTILORA_INTRINSICS)
inline vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#elif defined(__FP_FAST_FMAF)
inline vf fma(vf a, vf b, vf c) {
    for (int i = 0; i < kLanes; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#else
inline vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif

// One number -----------------------------------------------------------------------------------

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(bf16 x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16 x) {
    const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7FFFu;
    if (rest >= 0x7C00u) return bits_of<float>(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
    // Scaling by 2^112 moves the exponent, and makes normal numbers of subnormal ones.
    const float scaled = bits_of<float>(rest << 13) * bits_of<float>(0x77800000u);
    return bits_of<float>(sign | bits_of<uint32_t>(scaled));
}

inline void store(float* p, float x) { *p = x; }

inline void store(bf16* p, float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t wide = bits_of<uint32_t>(x);
    if ((wide & 0x7FFFFFFFu) > 0x7F800000u) {
        p->bits = static_cast<uint16_t>(wide >> 16 | 64);
    } else {
        p->bits = static_cast<uint16_t>((wide + 0x7FFFu + (wide >> 16 & 1)) >> 16);
    }
}

inline void store(f16* p, float x) {  // to nearest, ties to even; NaN stays NaN
    const uint32_t wide = bits_of<uint32_t>(x), sign = wide >> 16 & 0x8000u;
    uint32_t rest = wide & 0x7FFFFFFFu;
    if (rest > 0x7F800000u) {
        rest = 0x7E00u;
    } else if (rest >= 0x477FF000u) {  // rounds to 65536 or more
        rest = 0x7C00u;
    } else if (rest < 0x38800000u) {  // subnormal: adding 1/2 lines the bits up and rounds them
        rest = bits_of<uint32_t>(bits_of<float>(rest) + 0.5f) - 0x3F000000u;
    } else {
        rest = (rest - 0x38000000u + 0xFFFu + (rest >> 13 & 1)) >> 13;
    }
    p->bits = static_cast<uint16_t>(sign | rest);
}

template <typename T>
inline float rounded(float x) {
    T out;
    store(&out, x);
    return to_float(out);
}

// One vector -----------------------------------------------------------------------------------

inline vf load(const float* p) {
    vf out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof x); }

inline void store(bf16* p, vf x) {
    const vu wide = bits_of<vu>(x);
    const vu nearest = (wide + 0x7FFFu + (wide >> 16 & 1)) >> 16;
    const vu out = (wide & 0x7FFFFFFFu) > 0x7F800000u ? wide >> 16 | 64 : nearest;
    const vh half = __builtin_convertvector(out, vh);
    std::memcpy(p, &half, sizeof half);
}

// What the compiler's own vector conversions make slow code of.
#if defined(MULTILORA_INTRINSICS) && MULTILORA_LANES == 16
inline vi load_wide(const int8_t* p) {
    return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vi load_wide(const uint8_t* p) {
    return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// The masks, all ones, keep g++ 12 from false warnings.
inline vf load(const bf16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return bits_of<vf>((vu)_mm512_maskz_cvtepu16_epi32(0xFFFF, half) << 16);
}
inline vf load(const f16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (vf)_mm512_maskz_cvtph_ps(0xFFFF, half);
}
inline void store(f16* p, vf x) {
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(p),
        _mm512_maskz_cvtps_ph(0xFFFF, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(MULTILORA_INTRINSICS)
inline vi load_wide(const int8_t* p) {
    return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline vi load_wide(const uint8_t* p) {
    return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline vf load(const bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return bits_of<vf>((vu)_mm256_cvtepu16_epi32(half) << 16);
}
inline vf load(const f16* p) {
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(f16* p, vf x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
template <typename T>
inline vi load_wide(const T* p) {  // int8_t or uint8_t
    vi out;
    for (int i = 0; i < kLanes; ++i) out[i] = p[i];
    return out;
}
inline vf load(const bf16* p) {
    vh half;
    std::memcpy(&half, p, sizeof half);
    return bits_of<vf>(__builtin_convertvector(half, vu) << 16);
}
inline vf load(const f16* p) {
    vf out;
    for (int i = 0; i < kLanes; ++i) out[i] = to_float(p[i]);
    return out;
}
inline void store(f16* p, vf x) {
    for (int i = 0; i < kLanes; ++i) store(p + i, x[i]);
}
#endif

inline vf load(const int8_t* p) { return __builtin_convertvector(load_wide(p), vf); }

// One vector of a row, or its last few values and zeros: one code for both.
template <typename T>
inline vf load_some(const T* p, int64_t count) {
    if (count >= kLanes) return load(p);
    float out[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) out[i] = to_float(p[i]);
    return load(out);
}

template <typename T>
inline void store_some(T* p, vf x, int64_t count) {
    if (count >= kLanes) return store(p, x);
    for (int64_t i = 0; i < count; ++i) store(p + i, static_cast<float>(x[i]));
}

// Memory, aligned for any vector. Without it the process ends, and says why: no exception may cross
// the C ABI or leave a parallel region, and half a result is worse than none.
inline void* allocate(int64_t bytes) {
    const int64_t whole = (bytes + 64) / 64 * 64;
    void* data = std::aligned_alloc(64, static_cast<size_t>(whole));
    if (data == nullptr) {
        std::fprintf(stderr, "multilora: no memory for %lld bytes in a C++ kernel\n",
                     static_cast<long long>(whole));
        std::abort();
    }
    return data;
}

// Scratch memory. Not std::vector: what that instantiates here could be
// linked into code that must run on an older machine.
template <typename T>
class Scratch {
   public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))))) {}
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    T* data() { return data_; }

   private:
    T* data_;
};

// Memory that a thread keeps from call to call.
class ThreadBuffer {
   public:
    ~ThreadBuffer() { std::free(data_); }
    void* get(int64_t bytes) {
        if (bytes > bytes_) {
            std::free(data_);
            data_ = allocate(bytes);
            bytes_ = bytes;
        }
        return data_;
    }

   private:
    void* data_ = nullptr;
    int64_t bytes_ = 0;
};

// Every lane to the nearest value of type T.
template <typename T>
inline vf rounded(vf x) {
    T out[kLanes];
    store(out, x);
    return load(out);
}
template <>
inline vf rounded<float>(vf x) {
    return x;
}

template <int... I>
struct Lanes {};
#if MULTILORA_LANES == 16
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#else
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#endif

// Lane i is lane i + By of x, around the end.
template <int By, int... I>
inline vf turned(vf x, Lanes<I...>) {
    return __builtin_shufflevector(x, x, ((I + By) % kLanes)...);
}

// The lanes in one fixed order, so that a sum's bits depend on its terms alone.
inline float lane_sum(vf x) {
    if constexpr (kLanes == 16) x += turned<kLanes / 2>(x, AllLanes());
    x += turned<4>(x, AllLanes());
    x += turned<2>(x, AllLanes());
    x += turned<1>(x, AllLanes());
    return x[0];
}

inline vf max(vf a, vf b) { return a > b ? a : b; }  // b where one of them is NaN

inline float lane_max(vf x) {
    if constexpr (kLanes == 16) x = max(x, turned<kLanes / 2>(x, AllLanes()));
    x = max(x, turned<4>(x, AllLanes()));
    x = max(x, turned<2>(x, AllLanes()));
    x = max(x, turned<1>(x, AllLanes()));
    return x[0];
}

// One step of a transposition: a and b are rows i and i + H, bit H of i is 0.
template <int H, int... I>
inline void exchange(vf& a, vf& b, Lanes<I...>) {
    const vf low = __builtin_shufflevector(a, b, ((I & H) ? kLanes + I - H : I)...);
    b = __builtin_shufflevector(a, b, ((I & H) ? kLanes + I : I + H)...);
    a = low;
}

template <int H>
inline void transpose_from(vf* x) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
        if (!(i & H)) exchange<H>(x[i], x[i + H], AllLanes());
    }
    if constexpr (H > 1) transpose_from<H / 2>(x);
}

// lane_sum of N vectors, N = 4 or 8: the same sums, those of several vectors in one.
template <int N>
inline void lane_sums(vf (&x)[N], float* sums) {
    constexpr int kLast = kLanes / N;  // lanes of a vector's own that are left
#pragma GCC unroll 3
    for (int half = N / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) {
            if (half * kLast == 8) exchange<kLanes == 16 ? 8 : 4>(x[j], x[j + half], AllLanes());
            if (half * kLast == 4) exchange<4>(x[j], x[j + half], AllLanes());
            if (half * kLast == 2) exchange<2>(x[j], x[j + half], AllLanes());
            if (half * kLast == 1) exchange<1>(x[j], x[j + half], AllLanes());
            x[j] += x[j + half];
        }
    }
    if constexpr (kLast >= 4) x[0] += turned<2>(x[0], AllLanes());
    if constexpr (kLast >= 2) x[0] += turned<1>(x[0], AllLanes());
    for (int j = 0; j < N; ++j) sums[j] = x[0][j * kLast];
}

// A square of kLanes vectors, rows to columns.
inline void transpose(vf (&x)[kLanes]) { transpose_from<kLanes / 2>(x); }

// e^x for x <= 0, to about 2 ulp (Cephes' polynomial); below -87 it is 0, of NaN it is NaN.
inline vf exp_neg(vf x) {
    const vf low = splat(-87.0f);
    const vf small = x == x ? splat(0.0f) : x;
    const vi keep = x > low;
    x = keep ? x : low;
    const vf scaled = x * splat(1.44269504088896341f);
    const vi n = __builtin_convertvector(scaled - splat(0.5f), vi);  // x <= 0: rounds to nearest
    const vf whole = __builtin_convertvector(n, vf);
    const vf r = (x - whole * splat(0.693359375f)) - whole * splat(-2.12194440e-4f);
    vf p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    return keep ? p * bits_of<vf>((n + 127) << 23) : small;
}

}  // namespace
