// See vec.h. AVX512 F, BW, VL, DQ and VNNI: one register is one vector.
#pragma once

#include <immintrin.h>

namespace VENTURI_NAMESPACE {

constexpr int kRegisterRows = 12;

using F16 = __m512;
using I16 = __m512i;
struct B64 {
    __m512i v;
};

VENTURI_INLINE __mmask16 lanes(int count) { return (__mmask16)((1u << count) - 1u); }

VENTURI_INLINE F16 load(const float* p) { return _mm512_loadu_ps(p); }
VENTURI_INLINE F16 load_part(const float* p, int n) { return _mm512_maskz_loadu_ps(lanes(n), p); }
VENTURI_INLINE void store(float* p, F16 v) { _mm512_storeu_ps(p, v); }
VENTURI_INLINE void store_part(float* p, F16 v, int n) { _mm512_mask_storeu_ps(p, lanes(n), v); }
VENTURI_INLINE B64 load_bytes(const void* p) { return {_mm512_loadu_si512(p)}; }

VENTURI_INLINE F16 load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
VENTURI_INLINE I16 load_u16(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
VENTURI_INLINE F16 load_bfloat(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(load_u16(p), 16));
}
VENTURI_INLINE I16 load_s8(const int8_t* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
}
VENTURI_INLINE void store_s8(int8_t* p, I16 v) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(v));
}
VENTURI_INLINE void store_s16(int16_t* p, I16 v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(v));
}
VENTURI_INLINE I16 load_pairs(const int8_t* p) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
}

VENTURI_INLINE F16 splat(float x) { return _mm512_set1_ps(x); }
VENTURI_INLINE I16 splat(int32_t x) { return _mm512_set1_epi32(x); }
VENTURI_INLINE B64 splat4(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return {_mm512_set1_epi32(four)};
}

VENTURI_INLINE F16 add(F16 a, F16 b) { return _mm512_add_ps(a, b); }
VENTURI_INLINE F16 sub(F16 a, F16 b) { return _mm512_sub_ps(a, b); }
VENTURI_INLINE F16 mul(F16 a, F16 b) { return _mm512_mul_ps(a, b); }
VENTURI_INLINE F16 div(F16 a, F16 b) { return _mm512_div_ps(a, b); }
VENTURI_INLINE F16 sqrt(F16 a) { return _mm512_sqrt_ps(a); }
VENTURI_INLINE F16 abs(F16 a) { return _mm512_abs_ps(a); }
VENTURI_INLINE F16 neg(F16 a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
VENTURI_INLINE F16 max(F16 a, F16 b) { return _mm512_max_ps(a, b); }
VENTURI_INLINE F16 min(F16 a, F16 b) { return _mm512_min_ps(a, b); }
VENTURI_INLINE F16 fma(F16 a, F16 b, F16 c) { return _mm512_fmadd_ps(a, b, c); }
VENTURI_INLINE F16 fnmadd(F16 a, F16 b, F16 c) { return _mm512_fnmadd_ps(a, b, c); }
VENTURI_INLINE F16 less(F16 a, F16 b, F16 x, F16 y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
VENTURI_INLINE unsigned less_mask(F16 a, F16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
// Compressed in a register: the form that writes to memory is slow on some machines.
VENTURI_INLINE void store_some(float* p, F16 v, unsigned mask) {
    _mm512_storeu_ps(p, _mm512_maskz_compress_ps((__mmask16)mask, v));
}
VENTURI_INLINE void store_some(int32_t* p, I16 v, unsigned mask) {
    _mm512_storeu_si512(p, _mm512_maskz_compress_epi32((__mmask16)mask, v));
}

VENTURI_INLINE I16 add(I16 a, I16 b) { return _mm512_add_epi32(a, b); }
VENTURI_INLINE I16 sub(I16 a, I16 b) { return _mm512_sub_epi32(a, b); }
VENTURI_INLINE I16 max(I16 a, I16 b) { return _mm512_max_epi32(a, b); }
template <int n>
VENTURI_INLINE I16 shift_left(I16 a) {
    return _mm512_slli_epi32(a, n);
}
template <int from, int count>
VENTURI_INLINE I16 field(I16 a) {
    return _mm512_and_si512(_mm512_srli_epi32(a, from), _mm512_set1_epi32((1 << count) - 1));
}
VENTURI_INLINE I16 round_int(F16 a) { return _mm512_cvtps_epi32(a); }
VENTURI_INLINE F16 to_float(I16 a) { return _mm512_cvtepi32_ps(a); }
VENTURI_INLINE I16 bits(F16 a) { return _mm512_castps_si512(a); }
VENTURI_INLINE F16 floats(I16 a) { return _mm512_castsi512_ps(a); }

// In assembly, because gcc copies and spills the sums of large tiles around the intrinsic.
VENTURI_INLINE I16 dot4(I16 acc, B64 u, B64 s) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u.v), "v"(s.v));
    return acc;
}
VENTURI_INLINE I16 dot4_nibbles(I16 acc, B64 u, B64 s) { return dot4(acc, u, s); }
VENTURI_INLINE I16 pairs(I16 a, I16 b) { return _mm512_madd_epi16(a, b); }
VENTURI_INLINE I16 dot2(I16 acc, I16 a, I16 b) {
    asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
    return acc;
}
VENTURI_INLINE I16 words(B64 a) { return a.v; }
VENTURI_INLINE B64 low_nibbles(B64 a) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(15))}; }
VENTURI_INLINE B64 high_nibbles(B64 a) {
    return {_mm512_and_si512(_mm512_srli_epi16(a.v, 4), _mm512_set1_epi8(15))};
}

VENTURI_INLINE float reduce_add(F16 a) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
VENTURI_INLINE float reduce_max(F16 a) { return _mm512_reduce_max_ps(a); }
VENTURI_INLINE int32_t reduce_add(I16 a) { return _mm512_reduce_add_epi32(a); }
VENTURI_INLINE int32_t reduce_max(I16 a) { return _mm512_reduce_max_epi32(a); }

VENTURI_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

}  // namespace VENTURI_NAMESPACE
