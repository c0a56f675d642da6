// RMSNorm and LayerNorm of rows, alone or together with their quantisation.
//
// A row's sums have one order, whatever rows and threads there are beside it.
#pragma once

#include "activations.h"

namespace VENTURI_NAMESPACE {

// Mirrored in norm.py. rms: x / sqrt(mean(x^2) + eps) * weight; else
// (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, where bias may be null.
struct Norm {
    const float* weight;
    const float* bias;
    int64_t columns;
    double eps;
    int64_t rms;
};

// Sum over `columns` of (x - centre)^2, or of x where `squared` is not set.
template <bool squared>
VENTURI_INLINE float row_sum(const float* x, int64_t columns, float centre) {
    static const float kOnes[kLanes] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    F16 sum = zero();
    int64_t k = 0;
    for (; k + kLanes <= columns; k += kLanes) {
        const F16 v = sub(load(x + k), splat(centre));
        sum = squared ? fma(v, v, sum) : add(sum, v);
    }
    if (k < columns) {
        const int rest = (int)(columns - k);
        const F16 v = mul(sub(load_part(x + k, rest), splat(centre)), load_part(kOnes, rest));
        sum = squared ? fma(v, v, sum) : add(sum, v);
    }
    return reduce_add(sum);
}

// A row that is normed when it is read.
struct NormedRow {
    const float* x;
    const Norm& norm;
    float centre, factor;

    NormedRow(const Norm& n, const float* row) : x(row), norm(n) {
        const float count = (float)n.columns;
        centre = n.rms ? 0.0f : row_sum<false>(row, n.columns, 0.0f) / count;
        const float mean = row_sum<true>(row, n.columns, centre) / count;
        factor = 1.0f / __builtin_sqrtf(mean + (float)n.eps);
    }
    VENTURI_INLINE_MEMBER F16 value(F16 v, F16 weight) const {
        return mul(mul(sub(v, splat(centre)), splat(factor)), weight);
    }
    VENTURI_INLINE_MEMBER F16 at(int64_t k) const {
        const F16 v = value(load(x + k), load(norm.weight + k));
        return norm.bias ? add(v, load(norm.bias + k)) : v;
    }
    // The weight's lanes behind the row are 0, and with them the values.
    VENTURI_INLINE_MEMBER F16 part(int64_t k, int count) const {
        const F16 v = value(load_part(x + k, count), load_part(norm.weight + k, count));
        return norm.bias ? add(v, load_part(norm.bias + k, count)) : v;
    }
};

// Phase: out [M, K] = the norm of x [M, K].
static inline void norm_rows(const Norm& norm, const float* x, float* out, int64_t rows, int thread,
                             int threads) {
    const Range mine = part(rows, thread, threads);
    const int64_t columns = norm.columns, whole = columns / kLanes * kLanes;
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const NormedRow source(norm, x + row * columns);
        for (int64_t k = 0; k < whole; k += kLanes) store(out + row * columns + k, source.at(k));
        if (whole < columns) {
            const int rest = (int)(columns - whole);
            store_part(out + row * columns + whole, source.part(whole, rest), rest);
        }
    }
}

// Phase: quantises the norm of x [M, K].
static inline void norm_quantize(const Norm& norm, const float* x, const Activations& a, int thread,
                                 int threads) {
    const Range mine = part(a.rows, thread, threads);
    for (int64_t row = mine.begin; row < mine.end; ++row)
        quantize_row(NormedRow(norm, x + row * a.columns), a, row);
}

}  // namespace VENTURI_NAMESPACE
