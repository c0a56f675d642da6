// W8A8: int8 weights with a scale for each out-feature, int8 activations, exact int32 sums.
//
// Panels are lines [K / 4][2] of [16][4] bytes of w + 128: one gives dot4 16 out-features and 4
// columns. The offset is taken back with the activations' sum:
//   sum((w + 128) * q) - 128 * sum(q) = sum(w * q).
#pragma once

#include "lines.h"

namespace VENTURI_NAMESPACE {

// Mirrored in linear.py. Scale and bias are padded to whole panels; bias may be null.
struct Int8Weights {
    const uint8_t* weights;  // panels, or what lines.h has of them where zeros are left out
    const float* scale;
    const float* bias;
    int64_t outs;           // N
    int64_t columns;        // K
    const int64_t* begins;  // where each panel without zeros begins, and their end; else null
    int64_t expands;        // whether the processor has kExpands
};

// R rows times one panel over `quads` quads of columns (a multiple of 4), added to `sums`.
// `stride` is the distance in bytes between two quads of one row.
template <int R, typename Lines>
VENTURI_INLINE void panel_int8(Lines lines, const int8_t* q, int64_t stride, int64_t quads,
                               Ahead ahead, I16 (&sums)[R][2]) {
    // A single row has too few sums to hide the latency of dot4: it takes two for each.
    constexpr int kSets = R == 1 ? 2 : 1;
    I16 acc[kSets][R][2];
    for (int s = 0; s < kSets; ++s)
        for (int r = 0; r < R; ++r) acc[s][r][0] = acc[s][r][1] = splat((int32_t)0);
    for (int64_t k = 0; k < quads;) {
        for (const int64_t end = lines.chunk(k, quads); k < end; k += 4) {
            if (R > 1 || Lines::kFetches) fetch(ahead);
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u, q += stride) {
                const B64 w0 = lines.next(), w1 = lines.next();
#pragma GCC unroll 12
                for (int r = 0; r < R; ++r) {
                    const B64 four = splat4(q + 4 * r);
                    acc[u % kSets][r][0] = dot4(acc[u % kSets][r][0], w0, four);
                    acc[u % kSets][r][1] = dot4(acc[u % kSets][r][1], w1, four);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int h = 0; h < 2; ++h) {
            sums[r][h] = acc[0][r][h];
            if (kSets == 2) sums[r][h] = add(sums[r][h], acc[kSets - 1][r][h]);
        }
}

// R rows of a tile times panel `panel`, scaled, into out [M, stride].
template <int R, typename Lines>
static void rows_int8(const Int8Weights& w, Lines lines, const Activations& a, Rows at,
                      int64_t panel, Ahead ahead, float* out, int64_t stride) {
    const int64_t width = padded(a.columns, 0), n = panel * kPanel, first = at.tile.row + at.begin;
    const int8_t* q = a.q + at.tile.row * width + at.begin * 4;
    I16 sums[R][2];
    panel_int8<R>(lines, q, at.tile.rows * 4, width / 4, ahead, sums);
    for (int r = 0; r < R; ++r) {
        const I16 offset = splat(128 * a.sums[first + r]);
        const F16 scale = splat(a.scale[first + r]);
        for (int h = 0; h < 2; ++h) {
            const int64_t column = n + h * kLanes;
            F16 v = mul(to_float(sub(sums[r][h], offset)), mul(scale, load(w.scale + column)));
            if (w.bias) v = add(v, load(w.bias + column));
            store_outs(out + (first + r) * stride + column, v, w.outs - column);
        }
    }
}

template <typename Lines>
using RowsInt8 = void (*)(const Int8Weights&, Lines, const Activations&, Rows, int64_t, Ahead,
                          float*, int64_t);
#define VENTURI_ROWS(r) rows_int8<fit(r, kRegisterRows), Lines>
template <typename Lines>
constexpr RowsInt8<Lines> kRowsInt8[] = {
    nullptr,         VENTURI_ROWS(1), VENTURI_ROWS(2),  VENTURI_ROWS(3),  VENTURI_ROWS(4),
    VENTURI_ROWS(5), VENTURI_ROWS(6), VENTURI_ROWS(7),  VENTURI_ROWS(8),  VENTURI_ROWS(9),
    VENTURI_ROWS(10), VENTURI_ROWS(11), VENTURI_ROWS(12)};
#undef VENTURI_ROWS

VENTURI_INLINE int64_t panel_bytes(const Int8Weights& w) { return kPanel * padded(w.columns, 0); }

// Bytes that each thread needs to put zeros back.
VENTURI_INLINE int64_t expanded_bytes(const Int8Weights& w) {
    return w.begins ? block_panels(panel_bytes(w)) * panel_bytes(w) : 0;
}

// As `linear_int8`, of panels without zeros. A panel that is used once is expanded in registers,
// else a block of them in `scratch`.
template <typename Lines>
static inline void linear_sparse(const Int8Weights& w, const Activations& a, float* out,
                                 int64_t stride, uint8_t* scratch, const Team& team) {
    const int64_t bytes = panel_bytes(w), quads = padded(w.columns, 0) / 4;
    const auto where = [&](int64_t panel) { return w.weights + w.begins[panel]; };
    const Panels<decltype(where)> panels{where, bytes, ceil_div(w.outs, kPanel)};
    Range expanded{0, 0};
    each_block(
        panels, a.rows, kRegisterRows, team,
        [&](int64_t first, int64_t end) {
            expanded = {first, end};
            for (int64_t p = first; p < end; ++p)
                expand_panel(Lines{where(p)}, quads, scratch + (p - first) * bytes);
        },
        [&](Rows at, int64_t panel, Ahead ahead) {
            if (expanded.begin == expanded.end) {
                kRowsInt8<Lines>[at.rows](w, Lines{where(panel)}, a, at, panel, ahead, out, stride);
                return;
            }
            const WholeLines lines{scratch + (panel - expanded.begin) * bytes};
            kRowsInt8<WholeLines>[at.rows](w, lines, a, at, panel, ahead, out, stride);
        });
}

// Phase: out [M, stride] = activations x weights. The activations are whole before it begins.
// `scratch`: `expanded_bytes` for each thread.
static inline void linear_int8(const Int8Weights& w, const Activations& a, float* out,
                               int64_t stride, uint8_t* scratch, const Team& team) {
    uint8_t* const own = scratch + team.thread * expanded_bytes(w);
    if (w.begins && kExpands && w.expands)
        return linear_sparse<KeptLines<kExpands>>(w, a, out, stride, own, team);
    if (w.begins) return linear_sparse<KeptLines<false>>(w, a, out, stride, own, team);
    const int64_t bytes = panel_bytes(w);
    each_block(w.outs, a.rows, w.weights, bytes, kRegisterRows, team,
               [&](Rows at, int64_t panel, Ahead ahead) {
                   const WholeLines lines{w.weights + panel * bytes};
                   kRowsInt8<WholeLines>[at.rows](w, lines, a, at, panel, ahead, out, stride);
               });
}

}  // namespace VENTURI_NAMESPACE
