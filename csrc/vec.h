// Eight floats at a time, in the compiler's own vector type: one source for every instruction set.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

typedef float v8f __attribute__((vector_size(32)));
typedef uint32_t v8u __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));

struct bf16 {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}

inline void store(float* p, float x) { *p = x; }

inline void store(bf16* p, float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    if ((wide & 0x7FFFFFFFu) > 0x7F800000u) {
        p->bits = static_cast<uint16_t>(wide >> 16 | 64);
    } else {
        p->bits = static_cast<uint16_t>((wide + 0x7FFFu + (wide >> 16 & 1)) >> 16);
    }
}

inline v8f load8(const float* p) {
    v8f out;
    std::memcpy(&out, p, sizeof out);
    return out;
}

inline v8f load8(const bf16* p) {
    v8h half;
    std::memcpy(&half, p, sizeof half);
    const v8u wide = __builtin_convertvector(half, v8u) << 16;
    v8f out;
    std::memcpy(&out, &wide, sizeof out);
    return out;
}

inline void store8(float* p, v8f x) { std::memcpy(p, &x, sizeof x); }

inline v8f splat(float x) { return v8f{x, x, x, x, x, x, x, x}; }

// The lanes in one fixed order, so that a sum's bits depend on its terms alone.
inline float sum8(v8f x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

// e^x for x <= 0, to about 2 ulp (Cephes' polynomial); below -87 it is 0, of NaN it is NaN.
inline v8f exp8(v8f x) {
    const v8f low = splat(-87.0f);
    const v8f small = x == x ? splat(0.0f) : x;
    const v8i keep = x > low;
    x = keep ? x : low;
    const v8f scaled = x * splat(1.44269504088896341f);
    const v8i n = __builtin_convertvector(scaled - splat(0.5f), v8i);  // x <= 0: rounds to nearest
    const v8f whole = __builtin_convertvector(n, v8f);
    const v8f r = (x - whole * splat(0.693359375f)) - whole * splat(-2.12194440e-4f);
    v8f p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    const v8i bits = (n + 127) << 23;
    v8f power;
    std::memcpy(&power, &bits, sizeof power);
    return keep ? p * power : small;
}

}  // namespace
