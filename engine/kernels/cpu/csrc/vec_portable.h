// See vec.h. Plain C++: any machine that gcc or clang knows.
#pragma once

#include <math.h>

namespace VENTURI_NAMESPACE {

constexpr int kRegisterRows = 4;

struct F16 {
    float v[16];
};
struct I16 {
    int32_t v[16];
};
struct B64 {
    uint8_t v[64];
};

// A vector of what `expression` gives for each lane i.
#define VENTURI_LANES(type, expression)                             \
    type r;                                                         \
    for (int i = 0; i < 16; ++i) r.v[i] = expression;               \
    return r

VENTURI_INLINE F16 load(const float* p) { VENTURI_LANES(F16, p[i]); }
VENTURI_INLINE F16 load_part(const float* p, int n) { VENTURI_LANES(F16, i < n ? p[i] : 0.0f); }
VENTURI_INLINE void store(float* p, F16 v) { __builtin_memcpy(p, v.v, 64); }
VENTURI_INLINE void store_part(float* p, F16 v, int n) {
    for (int i = 0; i < n && i < 16; ++i) p[i] = v.v[i];
}
VENTURI_INLINE B64 load_bytes(const void* p) {
    B64 r;
    __builtin_memcpy(r.v, p, 64);
    return r;
}

VENTURI_INLINE float as_float(uint32_t x) {
    float r;
    __builtin_memcpy(&r, &x, 4);
    return r;
}
VENTURI_INLINE uint32_t as_bits(float x) {
    uint32_t r;
    __builtin_memcpy(&r, &x, 4);
    return r;
}
VENTURI_INLINE float half(uint16_t x) {
    const uint32_t sign = (uint32_t)(x & 0x8000) << 16, rest = x & 0x7FFF;
    if (rest >= 0x7C00) return as_float(sign | 0x7F800000 | (rest & 0x3FF) << 13);
    // Subnormal halves are multiples of 2^-24; the others only change their exponent's bias.
    const float size = rest < 0x400 ? (float)rest * 0x1p-24f : as_float((rest << 13) + 0x38000000);
    return as_float(sign | as_bits(size));
}
VENTURI_INLINE F16 load_half(const uint16_t* p) { VENTURI_LANES(F16, half(p[i])); }
VENTURI_INLINE I16 load_u16(const uint16_t* p) { VENTURI_LANES(I16, p[i]); }
VENTURI_INLINE F16 load_bfloat(const uint16_t* p) {
    VENTURI_LANES(F16, as_float((uint32_t)p[i] << 16));
}
VENTURI_INLINE I16 load_s8(const int8_t* p) { VENTURI_LANES(I16, p[i]); }
VENTURI_INLINE void store_s8(int8_t* p, I16 v) {
    for (int i = 0; i < 16; ++i) p[i] = (int8_t)(v.v[i] < -128 ? -128 : v.v[i] > 127 ? 127 : v.v[i]);
}
VENTURI_INLINE void store_s16(int16_t* p, I16 v) {
    for (int i = 0; i < 16; ++i)
        p[i] = (int16_t)(v.v[i] < -32768 ? -32768 : v.v[i] > 32767 ? 32767 : v.v[i]);
}
VENTURI_INLINE I16 load_pairs(const int8_t* p) {
    VENTURI_LANES(I16, (int32_t)((uint32_t)p[2 * i + 1] << 16 | (uint16_t)p[2 * i]));
}

VENTURI_INLINE F16 splat(float x) { VENTURI_LANES(F16, x); }
VENTURI_INLINE I16 splat(int32_t x) { VENTURI_LANES(I16, x); }
VENTURI_INLINE B64 splat4(const void* p) {
    B64 r;
    for (int i = 0; i < 16; ++i) __builtin_memcpy(r.v + 4 * i, p, 4);
    return r;
}

// Wraps around as registers do, where the sum of signed numbers would be undefined.
VENTURI_INLINE int32_t plus(int32_t a, int32_t b) { return (int32_t)((uint32_t)a + (uint32_t)b); }
VENTURI_INLINE int32_t minus(int32_t a, int32_t b) { return (int32_t)((uint32_t)a - (uint32_t)b); }

VENTURI_INLINE F16 add(F16 a, F16 b) { VENTURI_LANES(F16, a.v[i] + b.v[i]); }
VENTURI_INLINE F16 sub(F16 a, F16 b) { VENTURI_LANES(F16, a.v[i] - b.v[i]); }
VENTURI_INLINE F16 mul(F16 a, F16 b) { VENTURI_LANES(F16, a.v[i] * b.v[i]); }
VENTURI_INLINE F16 div(F16 a, F16 b) { VENTURI_LANES(F16, a.v[i] / b.v[i]); }
VENTURI_INLINE F16 sqrt(F16 a) { VENTURI_LANES(F16, __builtin_sqrtf(a.v[i])); }
VENTURI_INLINE F16 abs(F16 a) { VENTURI_LANES(F16, __builtin_fabsf(a.v[i])); }
VENTURI_INLINE F16 neg(F16 a) { VENTURI_LANES(F16, -a.v[i]); }
VENTURI_INLINE F16 max(F16 a, F16 b) { VENTURI_LANES(F16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
VENTURI_INLINE F16 min(F16 a, F16 b) { VENTURI_LANES(F16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
VENTURI_INLINE F16 fma(F16 a, F16 b, F16 c) {
    VENTURI_LANES(F16, __builtin_fmaf(a.v[i], b.v[i], c.v[i]));
}
VENTURI_INLINE F16 fnmadd(F16 a, F16 b, F16 c) {
    VENTURI_LANES(F16, __builtin_fmaf(-a.v[i], b.v[i], c.v[i]));
}
VENTURI_INLINE F16 less(F16 a, F16 b, F16 x, F16 y) {
    VENTURI_LANES(F16, a.v[i] < b.v[i] ? x.v[i] : y.v[i]);
}
VENTURI_INLINE unsigned less_mask(F16 a, F16 b) {
    unsigned mask = 0;
    for (int i = 0; i < 16; ++i) mask |= (unsigned)(a.v[i] < b.v[i]) << i;
    return mask;
}
VENTURI_INLINE void store_some(float* p, F16 v, unsigned mask) {
    for (; mask; mask &= mask - 1) *p++ = v.v[__builtin_ctz(mask)];
}
VENTURI_INLINE void store_some(int32_t* p, I16 v, unsigned mask) {
    for (; mask; mask &= mask - 1) *p++ = v.v[__builtin_ctz(mask)];
}
VENTURI_INLINE I16 add(I16 a, I16 b) { VENTURI_LANES(I16, plus(a.v[i], b.v[i])); }
VENTURI_INLINE I16 sub(I16 a, I16 b) { VENTURI_LANES(I16, minus(a.v[i], b.v[i])); }
VENTURI_INLINE I16 max(I16 a, I16 b) { VENTURI_LANES(I16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
template <int n>
VENTURI_INLINE I16 shift_left(I16 a) {
    VENTURI_LANES(I16, (int32_t)((uint32_t)a.v[i] << n));
}
template <int from, int count>
VENTURI_INLINE I16 field(I16 a) {
    VENTURI_LANES(I16, (int32_t)((uint32_t)a.v[i] >> from & ((1u << count) - 1)));
}
VENTURI_INLINE int32_t nearest(float x) {
    if (!(x >= -2147483648.0f && x < 2147483648.0f)) return INT32_MIN;
    return (int32_t)__builtin_rintf(x);
}
VENTURI_INLINE I16 round_int(F16 a) { VENTURI_LANES(I16, nearest(a.v[i])); }
VENTURI_INLINE F16 to_float(I16 a) { VENTURI_LANES(F16, (float)a.v[i]); }
VENTURI_INLINE I16 bits(F16 a) { VENTURI_LANES(I16, (int32_t)as_bits(a.v[i])); }
VENTURI_INLINE F16 floats(I16 a) { VENTURI_LANES(F16, as_float((uint32_t)a.v[i])); }

VENTURI_INLINE I16 dot4(I16 acc, B64 u, B64 s) {
    for (int i = 0; i < 16; ++i) {
        int32_t sum = 0;
        for (int j = 4 * i; j < 4 * i + 4; ++j) sum += (int32_t)u.v[j] * (int8_t)s.v[j];
        acc.v[i] = plus(acc.v[i], sum);
    }
    return acc;
}
VENTURI_INLINE I16 dot4_nibbles(I16 acc, B64 u, B64 s) { return dot4(acc, u, s); }
VENTURI_INLINE int32_t pair(int32_t a, int32_t b) {
    return plus((int32_t)(int16_t)a * (int16_t)b, (a >> 16) * (b >> 16));
}
VENTURI_INLINE I16 pairs(I16 a, I16 b) { VENTURI_LANES(I16, pair(a.v[i], b.v[i])); }
VENTURI_INLINE I16 dot2(I16 acc, I16 a, I16 b) { return add(acc, pairs(a, b)); }
VENTURI_INLINE I16 words(B64 a) {
    I16 r;
    __builtin_memcpy(r.v, a.v, 64);
    return r;
}
VENTURI_INLINE B64 low_nibbles(B64 a) {
    for (int i = 0; i < 64; ++i) a.v[i] &= 15;
    return a;
}
VENTURI_INLINE B64 high_nibbles(B64 a) {
    for (int i = 0; i < 64; ++i) a.v[i] >>= 4;
    return a;
}

VENTURI_INLINE float reduce_add(F16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] += a.v[i + width];
    return a.v[0];
}
VENTURI_INLINE float reduce_max(F16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] = a.v[i] > a.v[i + width] ? a.v[i] : a.v[i + width];
    return a.v[0];
}
VENTURI_INLINE int32_t reduce_add(I16 a) {
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] = plus(a.v[i], a.v[i + width]);
    return a.v[0];
}
VENTURI_INLINE int32_t reduce_max(I16 a) {
    for (int i = 1; i < 16; ++i) a.v[0] = a.v[0] > a.v[i] ? a.v[0] : a.v[i];
    return a.v[0];
}

VENTURI_INLINE void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }

#undef VENTURI_LANES

}  // namespace VENTURI_NAMESPACE
