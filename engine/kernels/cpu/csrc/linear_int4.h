// W4A8: int4 weights with a scale for each group of columns, int8 activations.
//   acc = fma(float(sum over the group of (u - zero) * q), scale, acc), groups in ascending order
//   out = acc * row scale (+ bias)
#pragma once

#include "grouped.h"

namespace VENTURI_NAMESPACE {

// The sums of a group for R rows, which begin at -zero * (the group's sum of q). A single row has
// too few sums to hide the latency of dot4: it takes four for each.
template <int R>
VENTURI_INLINE void group_int4(const Record& record, const int8_t* q, int64_t stride,
                               const int32_t* sums, int64_t group, Ahead& ahead, I16 (&out)[R][2]) {
    constexpr int kSets = R == 1 ? 4 : 1;
    I16 acc[kSets][R][2];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
            acc[0][r][h] = pairs(record.zero[h], splat(-sums[r]));
            for (int s = 1; s < kSets; ++s) acc[s][r][h] = splat((int32_t)0);
        }
    const uint8_t* w = record.weights;
    for (int64_t k = 0; k < group; k += 32) {
        fetch(ahead);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u, w += 2 * kLine, q += 2 * stride) {
            const B64 w0 = load_bytes(w), w1 = load_bytes(w + kLine);
            const B64 low0 = low_nibbles(w0), low1 = low_nibbles(w1);
            const B64 high0 = high_nibbles(w0), high1 = high_nibbles(w1);
            const int a = 2 * u % kSets, b = (2 * u + 1) % kSets;
#pragma GCC unroll 6
            for (int r = 0; r < R; ++r) {
                const B64 first = splat4(q + 4 * r), second = splat4(q + stride + 4 * r);
                acc[a][r][0] = dot4_nibbles(acc[a][r][0], low0, first);
                acc[a][r][1] = dot4_nibbles(acc[a][r][1], low1, first);
                acc[b][r][0] = dot4_nibbles(acc[b][r][0], high0, second);
                acc[b][r][1] = dot4_nibbles(acc[b][r][1], high1, second);
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
            out[r][h] = acc[0][r][h];
            for (int s = 1; s < kSets; ++s) out[r][h] = add(out[r][h], acc[s][r][h]);
        }
}

// R rows of a tile times panel `panel`, into out [M, stride].
template <int R>
static void rows_int4(const GroupedWeights& w, const Activations& a, Rows at, int64_t panel,
                      Ahead ahead, float* out, int64_t stride) {
    const int64_t count = group_count(w), step = record_bytes(w), n = panel * kPanel;
    const int64_t first = at.tile.row + at.begin, quads = at.tile.rows * 4;
    const uint8_t* p = w.records + panel * count * step;
    const int8_t* q = a.q + at.tile.row * count * w.group + at.begin * 4;
    const int32_t* sums = a.sums + at.tile.row * count + at.begin;
    F16 acc[R][2];
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = zero();
    for (int64_t g = 0; g < count; ++g, p += step, q += w.group * at.tile.rows, sums += at.tile.rows) {
        fetch_line(ahead);  // the record's head
        const Record record = read_record(w, p);
        I16 products[R][2];
        group_int4<R>(record, q, quads, sums, w.group, ahead, products);
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r)
            for (int h = 0; h < 2; ++h)
                acc[r][h] = fma(to_float(products[r][h]), record.scale[h], acc[r][h]);
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
            const int64_t column = n + h * kLanes;
            F16 v = mul(acc[r][h], splat(a.scale[first + r]));
            if (w.bias) v = add(v, load(w.bias + column));
            store_outs(out + (first + r) * stride + column, v, w.outs - column);
        }
}

using RowsInt4 = void (*)(const GroupedWeights&, const Activations&, Rows, int64_t, Ahead, float*,
                          int64_t);
#define VENTURI_ROWS(r) rows_int4<fit(r, kGroupedRows)>
constexpr RowsInt4 kRowsInt4[] = {nullptr,         VENTURI_ROWS(1), VENTURI_ROWS(2), VENTURI_ROWS(3),
                                  VENTURI_ROWS(4), VENTURI_ROWS(5), VENTURI_ROWS(6)};
#undef VENTURI_ROWS

// Phase: out [M, stride] = activations x weights. The activations, quantised with the weights'
// group, are whole before it begins.
static inline void linear_int4(const GroupedWeights& w, const Activations& a, float* out,
                               int64_t stride, const Team& team) {
    each_block(w.outs, a.rows, w.records, panel_bytes(w), kGroupedRows, team,
               [&](Rows at, int64_t panel, Ahead ahead) {
                   kRowsInt4[at.rows](w, a, at, panel, ahead, out, stride);
               });
}

}  // namespace VENTURI_NAMESPACE
