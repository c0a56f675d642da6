// Activation functions of an MLP, times the value beside the gate where there is one.
#pragma once

#include "activations.h"

namespace VENTURI_NAMESPACE {

// Mirrored in norm.py.
enum Function : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

template <Function function>
VENTURI_INLINE F16 activate(F16 x) {
    if (function == kSilu) {
        x = max(splat(-88.0f), x);  // where exp is bounded; the result is 0 to 36 digits
        return div(x, add(splat(1.0f), exp(neg(x))));
    }
    if (function == kRelu) return max(zero(), x);  // this order keeps NaN
    F16 inner;
    if (function == kGelu) {
        inner = erf(mul(x, splat(0.70710678f)));
    } else {
        const F16 cube = mul(mul(x, x), x);
        inner = tanh(mul(splat(0.79788456f), fma(splat(0.044715f), cube, x)));
    }
    return mul(mul(splat(0.5f), x), add(splat(1.0f), inner));
}

// A row of x becomes its activations in place; `up` is null, or what they are multiplied by.
template <Function function>
static void activate_row(float* x, const float* up, int64_t columns) {
    int64_t k = 0;
    for (; k + kLanes <= columns; k += kLanes) {
        const F16 v = activate<function>(load(x + k));
        store(x + k, up ? mul(v, load(up + k)) : v);
    }
    if (k < columns) {
        const int rest = (int)(columns - k);
        const F16 v = activate<function>(load_part(x + k, rest));
        store_part(x + k, up ? mul(v, load_part(up + k, rest)) : v, rest);
    }
}

using ActivateRow = void (*)(float*, const float*, int64_t);
constexpr ActivateRow kActivateRow[] = {activate_row<kSilu>, activate_row<kGelu>,
                                        activate_row<kGeluTanh>, activate_row<kRelu>};

// A row's activations, in place of its gates where it has gates and values. Returns their place.
VENTURI_INLINE float* activate_at(Function function, bool gated, float* x, int64_t row,
                                  int64_t columns) {
    float* const at = x + row * columns * (gated ? 2 : 1);
    kActivateRow[function](at, gated ? at + columns : nullptr, columns);
    return at;
}

// Phase: the activations of x [M, K], or of the gates where x is [M, 2 K] of gates and values.
static inline void activate_rows(Function function, bool gated, float* x, int64_t rows,
                                 int64_t columns, int thread, int threads) {
    const Range mine = part(rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row)
        activate_at(function, gated, x, row, columns);
}

// Phase: quantises the activations of x [M, K], or of the gates where x is [M, 2 K] of gates and
// values; they are left in place of the gates.
static inline void activate_quantize(Function function, bool gated, float* x, const Activations& a,
                                     int thread, int threads) {
    const Range mine = part(a.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row)
        quantize_row(PlainRow{activate_at(function, gated, x, row, a.columns)}, a, row);
}

}  // namespace VENTURI_NAMESPACE
