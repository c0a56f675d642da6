// W8A16 and W4A16: float activations, weights that become floats in registers.
//   sum = fma(x, float(u) - zero, sum) for a group's columns in ascending order
//   acc = fma(sum, scale, acc), groups in ascending order; out = acc (+ bias)
#pragma once

#include "grouped.h"

namespace VENTURI_NAMESPACE {

// R rows, `stride` floats apart, times column k + c of quad `words`, whose values begin at bit
// `shift` of each byte c.
template <int R, int kBits, int kShift>
VENTURI_INLINE void quad_float(I16 w0, I16 w1, const F16 (&zero)[2], const float* x, int64_t stride,
                               int64_t left, F16 (&sums)[R][2]) {
#define VENTURI_COLUMN(c)                                                          \
    if (c < left) {                                                                \
        const F16 v0 = sub(to_float(field<8 * c + kShift, kBits>(w0)), zero[0]);   \
        const F16 v1 = sub(to_float(field<8 * c + kShift, kBits>(w1)), zero[1]);   \
        for (int r = 0; r < R; ++r) {                                              \
            const F16 value = splat(x[r * stride + c]);                            \
            sums[r][0] = fma(value, v0, sums[r][0]);                               \
            sums[r][1] = fma(value, v1, sums[r][1]);                               \
        }                                                                          \
    }
    VENTURI_COLUMN(0)
    VENTURI_COLUMN(1)
    VENTURI_COLUMN(2)
    VENTURI_COLUMN(3)
#undef VENTURI_COLUMN
}

// The columns of one group, of which `left` exist: there is nothing behind the last of x.
template <int R, int kBits>
VENTURI_INLINE void group_float(const Record& record, const float* x, int64_t stride, int64_t left,
                                Ahead& ahead, F16 (&sums)[R][2]) {
    const F16 zero[2] = {to_float(record.zero[0]), to_float(record.zero[1])};
    const uint8_t* w = record.weights;
    constexpr int64_t kColumns = kBits == 4 ? 8 : 4;  // in 128 bytes
    for (int64_t k = 0; k < left; k += kColumns, w += 2 * kLine) {
        if (k % (4 * kColumns) == 0) fetch(ahead);
        const I16 w0 = words(load_bytes(w)), w1 = words(load_bytes(w + kLine));
        quad_float<R, kBits, 0>(w0, w1, zero, x + k, stride, left - k, sums);
        if (kBits == 4) quad_float<R, kBits, kBits == 4 ? 4 : 0>(w0, w1, zero, x + k + 4, stride, left - k - 4, sums);
    }
}

// R rows of x [M, K] times panel `panel`, into out [M, stride].
template <int R, int kBits>
static void rows_float(const GroupedWeights& w, const float* x, Rows at, int64_t panel, Ahead ahead,
                       float* out, int64_t stride) {
    const int64_t count = group_count(w), step = record_bytes(w), n = panel * kPanel;
    const int64_t first = at.tile.row + at.begin;
    const uint8_t* p = w.records + panel * count * step;
    F16 acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
    for (int64_t g = 0; g < count; ++g, p += step) {
        const Record record = read_record(w, p);
        F16 sums[R][2];
        for (int r = 0; r < R; ++r) sums[r][0] = sums[r][1] = zero();
        const int64_t begin = g * w.group, rest = w.columns - begin;
        group_float<R, kBits>(record, x + first * w.columns + begin, w.columns,
                              rest < w.group ? rest : w.group, ahead, sums);
        for (int r = 0; r < R; ++r)
            for (int h = 0; h < 2; ++h) acc[r][h] = fma(sums[r][h], record.scale[h], acc[r][h]);
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
            const int64_t column = n + h * kLanes;
            const F16 v = w.bias ? add(acc[r][h], load(w.bias + column)) : acc[r][h];
            store_outs(out + (first + r) * stride + column, v, w.outs - column);
        }
}

using RowsFloat = void (*)(const GroupedWeights&, const float*, Rows, int64_t, Ahead, float*,
                           int64_t);
#define VENTURI_ROWS(bits, r) rows_float<fit(r, kGroupedRows), bits>
#define VENTURI_TABLE(bits)                                                                \
    {nullptr,               VENTURI_ROWS(bits, 1), VENTURI_ROWS(bits, 2), VENTURI_ROWS(bits, 3), \
     VENTURI_ROWS(bits, 4), VENTURI_ROWS(bits, 5), VENTURI_ROWS(bits, 6)}
constexpr RowsFloat kRowsFloat4[] = VENTURI_TABLE(4);
constexpr RowsFloat kRowsFloat8[] = VENTURI_TABLE(8);
#undef VENTURI_TABLE
#undef VENTURI_ROWS

// Phase: out [M, stride] = x [M, K] x weights.
static inline void linear_float(const GroupedWeights& w, const float* x, int64_t rows, float* out,
                                int64_t stride, const Team& team) {
    const RowsFloat* kernels = w.bits == 4 ? kRowsFloat4 : kRowsFloat8;
    each_block(w.outs, rows, w.records, panel_bytes(w), kGroupedRows, team,
               [&](Rows at, int64_t panel, Ahead ahead) {
                   kernels[at.rows](w, x, at, panel, ahead, out, stride);
               });
}

}  // namespace VENTURI_NAMESPACE
