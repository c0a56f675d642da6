// See vec.h. AVX2 with FMA and F16C: two registers are one vector.
#pragma once

#include <immintrin.h>

namespace VENTURI_NAMESPACE {

constexpr int kRegisterRows = 3;

struct F16 {
    __m256 lo, hi;
};
struct I16 {
    __m256i lo, hi;
};
struct B64 {
    __m256i lo, hi;
};

VENTURI_INLINE __m256i lanes(int count) {
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), index);
}
VENTURI_INLINE __m256i load8(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
VENTURI_INLINE __m128i load4(const void* p) { return _mm_loadu_si128((const __m128i*)p); }

VENTURI_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
VENTURI_INLINE F16 load_part(const float* p, int n) {
    const __m256 hi = n > 8 ? _mm256_maskload_ps(p + 8, lanes(n - 8)) : _mm256_setzero_ps();
    return {_mm256_maskload_ps(p, lanes(n)), hi};
}
VENTURI_INLINE void store(float* p, F16 v) {
    _mm256_storeu_ps(p, v.lo);
    _mm256_storeu_ps(p + 8, v.hi);
}
VENTURI_INLINE void store_part(float* p, F16 v, int n) {
    _mm256_maskstore_ps(p, lanes(n), v.lo);
    if (n > 8) _mm256_maskstore_ps(p + 8, lanes(n - 8), v.hi);
}
VENTURI_INLINE B64 load_bytes(const void* p) { return {load8(p), load8((const char*)p + 32)}; }

VENTURI_INLINE F16 load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(load4(p)), _mm256_cvtph_ps(load4(p + 8))};
}
VENTURI_INLINE I16 load_u16(const uint16_t* p) {
    return {_mm256_cvtepu16_epi32(load4(p)), _mm256_cvtepu16_epi32(load4(p + 8))};
}
VENTURI_INLINE F16 load_bfloat(const uint16_t* p) {
    const I16 v = load_u16(p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(v.lo, 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(v.hi, 16))};
}
VENTURI_INLINE I16 load_s8(const int8_t* p) {
    const __m128i v = load4(p);
    return {_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))};
}
VENTURI_INLINE void store_s8(int8_t* p, I16 v) {
    // Packing works within halves of a register: the order is restored between the two steps.
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xD8);
    const __m128i lo = _mm256_castsi256_si128(words), hi = _mm256_extracti128_si256(words, 1);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(lo, hi));
}
VENTURI_INLINE void store_s16(int16_t* p, I16 v) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xD8);
    _mm256_storeu_si256((__m256i*)p, words);
}
VENTURI_INLINE I16 load_pairs(const int8_t* p) {
    return {_mm256_cvtepi8_epi16(load4(p)), _mm256_cvtepi8_epi16(load4(p + 16))};
}

VENTURI_INLINE F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
VENTURI_INLINE I16 splat(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
VENTURI_INLINE B64 splat4(const void* p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return {_mm256_set1_epi32(four), _mm256_set1_epi32(four)};
}

#define VENTURI_BOTH(name, type, op) \
    VENTURI_INLINE type name(type a, type b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
VENTURI_BOTH(add, F16, _mm256_add_ps)
VENTURI_BOTH(sub, F16, _mm256_sub_ps)
VENTURI_BOTH(mul, F16, _mm256_mul_ps)
VENTURI_BOTH(div, F16, _mm256_div_ps)
VENTURI_BOTH(max, F16, _mm256_max_ps)
VENTURI_BOTH(min, F16, _mm256_min_ps)
VENTURI_BOTH(add, I16, _mm256_add_epi32)
VENTURI_BOTH(sub, I16, _mm256_sub_epi32)
VENTURI_BOTH(max, I16, _mm256_max_epi32)
VENTURI_BOTH(pairs, I16, _mm256_madd_epi16)
#undef VENTURI_BOTH

VENTURI_INLINE F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
VENTURI_INLINE F16 abs(F16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
VENTURI_INLINE F16 neg(F16 a) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_xor_ps(sign, a.lo), _mm256_xor_ps(sign, a.hi)};
}
VENTURI_INLINE F16 fma(F16 a, F16 b, F16 c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
VENTURI_INLINE F16 fnmadd(F16 a, F16 b, F16 c) {
    return {_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
VENTURI_INLINE F16 less(F16 a, F16 b, F16 x, F16 y) {
    return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
VENTURI_INLINE unsigned less_mask(F16 a, F16 b) {
    const int lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ));
    const int hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ));
    return (unsigned)(lo | hi << 8);
}
VENTURI_INLINE void store_some(float* p, F16 v, unsigned mask) {
    if (mask == 0xFFFF) return store(p, v);
    alignas(32) float lanes[16];
    store(lanes, v);
    for (; mask; mask &= mask - 1) *p++ = lanes[__builtin_ctz(mask)];
}
VENTURI_INLINE void store_some(int32_t* p, I16 v, unsigned mask) {
    alignas(32) int32_t lanes[16];
    _mm256_store_si256((__m256i*)lanes, v.lo);
    _mm256_store_si256((__m256i*)(lanes + 8), v.hi);
    for (; mask; mask &= mask - 1) *p++ = lanes[__builtin_ctz(mask)];
}
template <int n>
VENTURI_INLINE I16 shift_left(I16 a) {
    return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)};
}
template <int from, int count>
VENTURI_INLINE I16 field(I16 a) {
    const __m256i mask = _mm256_set1_epi32((1 << count) - 1);
    return {_mm256_and_si256(_mm256_srli_epi32(a.lo, from), mask),
            _mm256_and_si256(_mm256_srli_epi32(a.hi, from), mask)};
}
VENTURI_INLINE I16 round_int(F16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
VENTURI_INLINE F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
VENTURI_INLINE I16 bits(F16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
VENTURI_INLINE F16 floats(I16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }

// vpmaddubsw would saturate: the even and the odd bytes are multiplied as int16 instead.
VENTURI_INLINE __m256i dot4_half(__m256i acc, __m256i u, __m256i s) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
VENTURI_INLINE I16 dot4(I16 acc, B64 u, B64 s) {
    return {dot4_half(acc.lo, u.lo, s.lo), dot4_half(acc.hi, u.hi, s.hi)};
}
// 2 * 15 * 128 is far from saturation.
VENTURI_INLINE I16 dot4_nibbles(I16 acc, B64 u, B64 s) {
    const __m256i one = _mm256_set1_epi16(1);
    const __m256i lo = _mm256_madd_epi16(_mm256_maddubs_epi16(u.lo, s.lo), one);
    const __m256i hi = _mm256_madd_epi16(_mm256_maddubs_epi16(u.hi, s.hi), one);
    return {_mm256_add_epi32(acc.lo, lo), _mm256_add_epi32(acc.hi, hi)};
}
VENTURI_INLINE I16 dot2(I16 acc, I16 a, I16 b) { return add(acc, pairs(a, b)); }
VENTURI_INLINE I16 words(B64 a) { return {a.lo, a.hi}; }
VENTURI_INLINE B64 low_nibbles(B64 a) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(a.lo, mask), _mm256_and_si256(a.hi, mask)};
}
VENTURI_INLINE B64 high_nibbles(B64 a) {
    return low_nibbles({_mm256_srli_epi16(a.lo, 4), _mm256_srli_epi16(a.hi, 4)});
}

VENTURI_INLINE float reduce_add(F16 a) {
    const __m256 b = _mm256_add_ps(a.lo, a.hi);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
VENTURI_INLINE float reduce_max(F16 a) {
    const __m256 b = _mm256_max_ps(a.lo, a.hi);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
VENTURI_INLINE int32_t reduce_add(I16 a) {
    const __m256i b = _mm256_add_epi32(a.lo, a.hi);
    __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xB1)));
}
VENTURI_INLINE int32_t reduce_max(I16 a) {
    const __m256i b = _mm256_max_epi32(a.lo, a.hi);
    __m128i c = _mm_max_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_max_epi32(c, _mm_shuffle_epi32(c, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xB1)));
}

VENTURI_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

}  // namespace VENTURI_NAMESPACE
