// One head's vector in INT8: of keys and values as they are stored, of queries as they are asked.
#pragma once

#include "vec.h"

namespace VENTURI_NAMESPACE {

// The first `count` lanes of a vector that ends with its head, the rest 0.
VENTURI_INLINE F16 load_head(const float* p, int count) {
    return count < kLanes ? load_part(p, count) : load(p);
}

// q = round_half_even(x * (127 / absmax)) of `dim` floats, zeros up to `padded`, by
// store(d, I16) of 16 each; returns absmax, or NaN where a float is not finite: a score of -inf
// would hide it from the softmax.
template <typename Store>
VENTURI_INLINE float quantize_head(const float* x, int dim, int padded, const Store& store) {
    // As integers, absolute values have the order of floats, with NaN above all.
    I16 top = splat((int32_t)0);
    for (int d = 0; d < dim; d += kLanes) top = max(top, bits(abs(load_head(x + d, dim - d))));
    const int32_t largest = reduce_max(top);
    float absmax;
    __builtin_memcpy(&absmax, &largest, 4);
    const F16 factor = splat(absmax > 0.0f ? 127.0f / absmax : 0.0f);
    for (int d = 0; d < padded; d += kLanes) {
        const F16 v = d < dim ? load_head(x + d, dim - d) : zero();
        // The bounds matter where 127 / absmax overflows, and for NaN.
        const F16 bounded = min(max(mul(v, factor), splat(-127.0f)), splat(127.0f));
        store(d, round_int(bounded));
    }
    return absmax + (absmax - absmax);
}

constexpr float kInverse127 = (float)(1.0 / 127.0);

}  // namespace VENTURI_NAMESPACE
