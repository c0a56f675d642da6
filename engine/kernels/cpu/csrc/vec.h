// Vectors of 16 lanes, whatever the machine's registers hold, so that sums have one order.
//
// Each source is compiled once for each instruction set, in a namespace of its own. Everything
// here and in the vec_*.h files is static and always inlined, and no templates of the standard
// library are used: a function that the linker could share between the sets might carry
// instructions that the machine lacks. Results are bit-identical across the sets: products are
// added with fma where `fma` says so and nowhere else (-ffp-contract=off).
//
// What a vec_<set>.h file defines, F16 being 16 floats, I16 16 int32, B64 64 bytes:
//   load, load_part(p, count)     the rest of a partial load is 0
//   store, store_part(p, v, count)
//   load_half, load_bfloat        16 floats of fp16 or bf16
//   load_s8                       16 bytes to int32
//   store_s8, store_s16           int32 to 16 bytes or int16, saturated
//   load_pairs(p)                 32 bytes to int16, two to a lane
//   splat, splat4(p)              one number; four bytes, 16 times
//   add, sub, mul, div, sqrt, neg, abs, max, min
//   fma(a, b, c) = a * b + c, fnmadd(a, b, c) = c - a * b, each rounded once
//   max(a, b) = a > b ? a : b     so that b is the result where either is NaN; min likewise
//   less(a, b, x, y)              a < b ? x : y in each lane
//   less_mask(a, b)               a bit for each lane, the first lane's lowest
//   store_some(p, v, mask)        the lanes of `mask`, side by side; may write 16
//   round_int                     to nearest, ties to even; INT_MIN where int32 has no such number
//   to_float(I16), bits(F16), floats(I16)
//   shift_left<n>                 of int32
//   dot4(acc, u, s)               acc + 16 exact sums of 4 products of u8 and s8 bytes
//   dot4_nibbles                  the same, for u8 bytes below 16
//   pairs(a, b)                   sums of 2 products of int16, as vpmaddwd has it
//   dot2(acc, a, b)               acc + pairs(a, b)
//   low_nibbles, high_nibbles     of each byte
//   field<from, count>            bits `from` to `from + count` of each int32, as unsigned
//   kRegisterRows                 rows whose 32 sums each fit the registers, 12 at most
//   reduce_add, reduce_max        lanes i and i + 8 first, then i + 4, i + 2, i + 1
#pragma once

#include <stddef.h>
#include <stdint.h>

#define VENTURI_PASTE_(a, b) a##_##b
#define VENTURI_PASTE(a, b) VENTURI_PASTE_(a, b)
#define VENTURI_NAMESPACE VENTURI_PASTE(venturi, VENTURI_ISA)
#define VENTURI_INLINE static inline __attribute__((always_inline))
#define VENTURI_INLINE_LAMBDA __attribute__((always_inline))
// Of functions whose sums would not fit the registers beside those of their callers.
#define VENTURI_APART static __attribute__((noinline))
#define VENTURI_INLINE_MEMBER inline __attribute__((always_inline))
// An entry point for Python: name_<set>.
#define VENTURI_EXPORT(name) \
    extern "C" __attribute__((visibility("default"))) void VENTURI_PASTE(name, VENTURI_ISA)

#include VENTURI_VECTOR

namespace VENTURI_NAMESPACE {

constexpr int kLanes = 16;

VENTURI_INLINE F16 zero() { return splat(0.0f); }

// e^x with a relative error of about 1e-7; x is clamped to [-87, 88], NaN stays NaN.
// After Cephes: x = n ln 2 + r, a polynomial in r, and n added to the exponent.
VENTURI_INLINE F16 exp(F16 x) {
    x = max(splat(-87.0f), min(splat(88.0f), x));
    const I16 n = round_int(mul(x, splat(1.44269504f)));
    F16 r = fnmadd(to_float(n), splat(0.693359375f), x);
    r = fnmadd(to_float(n), splat(-2.12194440e-4f), r);
    F16 p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, splat(1.0f)));
    return mul(p, floats(shift_left<23>(add(n, splat(127)))));
}

// 2^x of x <= 0 with a relative error of about 2e-7; below -100 it stays 2^-100, NaN stays NaN.
// x = n + r, the best polynomial with p(0) = 1 for |r| <= 1/2, and n added to the exponent.
VENTURI_INLINE F16 exp2(F16 x) {
    x = max(splat(-100.0f), x);
    const I16 n = round_int(x);
    const F16 r = sub(x, to_float(n));
    F16 p = fma(splat(1.32647273e-3f), r, splat(9.67151299e-3f));
    p = fma(p, r, splat(5.55073358e-2f));
    p = fma(p, r, splat(2.40222424e-1f));
    p = fma(p, r, splat(6.93146974e-1f));
    p = fma(p, r, splat(1.0f));
    return floats(add(bits(p), shift_left<23>(n)));
}

// tanh with a relative error of about 2e-7: a polynomial near 0, else by e^2|x|.
VENTURI_INLINE F16 tanh(F16 x) {
    const F16 z = mul(x, x);
    F16 p = fma(splat(-5.70498872745e-3f), z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    const F16 near = fma(mul(p, z), x, x);
    const F16 e = exp(mul(splat(2.0f), abs(x)));
    const F16 far = sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f))));
    return less(abs(x), splat(0.625f), near, less(x, zero(), neg(far), far));
}

// erf with an absolute error of about 2e-7 (Abramowitz and Stegun, 7.1.26).
VENTURI_INLINE F16 erf(F16 x) {
    const F16 size = abs(x);
    const F16 t = div(splat(1.0f), fma(splat(0.3275911f), size, splat(1.0f)));
    F16 p = fma(splat(1.061405429f), t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    const F16 far = fnmadd(mul(p, t), exp(neg(mul(x, x))), splat(1.0f));
    return less(x, zero(), neg(far), far);
}

}  // namespace VENTURI_NAMESPACE
