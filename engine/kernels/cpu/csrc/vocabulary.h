// A row of logits: one number for each token of the vocabulary.
#pragma once

#include <float.h>
#include <math.h>

#include "team.h"

namespace VENTURI_NAMESPACE {

// Numbers that are added as floats in 16 lanes before their sum is added as double.
constexpr int64_t kPart = 16 * kLanes;

// 16 numbers from column `k` of a row; `fill` past its end.
VENTURI_INLINE F16 load_filled(const float* x, int64_t k, int64_t columns, float fill) {
    if (k + kLanes <= columns) return load(x + k);
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = k + i < columns ? x[k + i] : fill;
    return load(lanes);
}

struct Extent {
    float most, least;  // of those above -inf
    bool finite;        // all of them
};

VENTURI_INLINE Extent extent(const float* x, int64_t columns) {
    F16 most = splat(-INFINITY), least = splat(INFINITY), other = zero();
    const F16 lowest = splat(-FLT_MAX), infinity = splat(INFINITY);
    for (int64_t k = 0; k < columns; k += kLanes) {
        const F16 v = load_filled(x, k, columns, x[0]);
        most = max(v, most);
        least = min(less(v, lowest, infinity, v), least);
        other = fma(v, zero(), other);  // NaN where v is not finite
    }
    return {reduce_max(most), -reduce_max(neg(least)), reduce_add(other) == 0.0f};
}

// The first column that holds `value`.
VENTURI_INLINE int64_t column_of(const float* x, int64_t columns, float value) {
    const F16 wanted = splat(value);
    for (int64_t k = 0; k < columns; k += kLanes) {
        const unsigned below = less_mask(load_filled(x, k, columns, -INFINITY), wanted);
        if (below != 0xFFFF) return k + __builtin_ctz(~below);
    }
    return -1;
}

}  // namespace VENTURI_NAMESPACE
