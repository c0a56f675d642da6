// Attention of a block of rows to one chunk of 256 positions. See attention.h.
//
// A block's rows are the heads of one KV head's group for some neighbouring tokens, so that each
// load of keys or values serves several rows.
#pragma once

#include "head_int8.h"
#include "kv.h"

namespace VENTURI_NAMESPACE {

constexpr int kChunk = 256;
constexpr int kGroups = kChunk / kLanes;
constexpr float kInfinity = __builtin_inff();

// QueryRows that share a load, and vectors of values that one pass over a chunk sums up: as many
// sums as registers hold.
constexpr int kTogether = 8;
constexpr int kVectors = 2;

// Outputs of rows before they are divided by `sums`: of one chunk, or of all chunks so far.
struct Partial {
    float* out;   // [rows][padded_dim]
    float* tops;  // the largest score
    float* sums;  // of exp(score - top)
};

// A block of rows, its queries in INT8.
struct QueryRows {
    int count, padded_dim;
    const int8_t* q;         // [count][padded_dim]
    const int32_t* offsets;  // -128 * sum of q: takes back what keys + 128 bring too much
    const float* scales;     // query scale * scale
    const int32_t* places;   // position of the row's token
    const float* slopes;     // of the row's head; null: none
    int window;
    float cap;
};

// A chunk's pages; no row sees groups before `begin` or from `end` on.
struct Chunk {
    int first;  // position
    int begin, end;
    KvGroup groups[kGroups];
};

VENTURI_INLINE F16 lane_index() {
    static const float kIndex[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return load(kIndex);
}

// The lanes of x in [low, high); the others become `rest`.
VENTURI_INLINE F16 keep(F16 x, int low, int high, float rest) {
    if (low <= 0 && high >= kLanes) return x;
    const F16 index = lane_index(), other = splat(rest);
    const F16 below = less(index, splat((float)high), x, other);
    return less(index, splat((float)low), other, below);
}

template <int N>
static void score_rows(const QueryRows& rows, int row, const KvGroup& group, float* scores) {
    const int quads = rows.padded_dim / 4;
    const int8_t* const q = rows.q + (int64_t)row * rows.padded_dim;
    I16 sums[N];
    for (int n = 0; n < N; ++n) sums[n] = splat(rows.offsets[row + n]);
    for (int quad = 0; quad < quads; ++quad) {
        const B64 keys = load_bytes(group.keys + quad * 64);
        for (int n = 0; n < N; ++n)
            sums[n] = dot4(sums[n], keys, splat4(q + n * rows.padded_dim + quad * 4));
    }
    const F16 scale = load(group.key_scales);
    for (int n = 0; n < N; ++n)
        store(scores + n * kChunk, mul(to_float(sums[n]), mul(scale, splat(rows.scales[row + n]))));
}

// Adds up features d to d + 16 V of the values, in the order of positions. Meanwhile it asks
// for the next chunk's, line by line: in a burst, most would wait for the first.
template <int N, int V>
static void weigh_values(const float* weights, const Chunk& chunk, const Chunk* next, int d,
                         int padded_dim, float* out) {
    F16 sums[N][V];
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) sums[n][v] = zero();
    for (int g = chunk.begin; g < chunk.end; ++g) {
        const int8_t* values = chunk.groups[g].values + d;
        const float* weight = weights + g * kLanes;
        for (int lane = 0; lane < kLanes; ++lane, values += padded_dim) {
            if (next && lane < 4 * V) {
                const int64_t line = (d / 4 + lane) * 64;
                prefetch_l2(next->groups[g].keys + line);
                prefetch_l2(next->groups[g].values + line);
            }
            F16 value[V];
            for (int v = 0; v < V; ++v) value[v] = to_float(load_s8(values + v * kLanes));
            for (int n = 0; n < N; ++n) {
                const F16 w = splat(weight[n * kChunk + lane]);
                for (int v = 0; v < V; ++v) sums[n][v] = fma(w, value[v], sums[n][v]);
            }
        }
    }
    for (int n = 0; n < N; ++n)
        for (int v = 0; v < V; ++v) store(out + n * padded_dim + d + v * kLanes, sums[n][v]);
}

// Positions [low, high) that a row sees, counted from the chunk's first; none where it sees none.
struct Seen {
    int low, high;
};

VENTURI_INLINE Seen seen_by(const QueryRows& rows, int row, const Chunk& chunk) {
    const int last = rows.places[row] - chunk.first;
    const int low = rows.window && last >= rows.window ? last - rows.window + 1 : 0;
    const int high = last < kChunk ? last + 1 : kChunk;
    if (high <= low) return {0, 0};
    return {low, high};
}

// Caps and masks a row's scores; returns the largest.
static float shape_scores(const QueryRows& rows, int row, const Chunk& chunk, Seen seen, float* scores) {
    F16 top = splat(-kInfinity);
    for (int g = seen.low / kLanes; g * kLanes < seen.high; ++g) {
        const int from = g * kLanes;
        F16 s = load(scores + from);
        if (rows.cap > 0.0f) s = mul(splat(rows.cap), tanh(mul(s, splat(1.0f / rows.cap))));
        if (rows.slopes) {
            const float distance = (float)(rows.places[row] - chunk.first - from);
            s = fnmadd(splat(rows.slopes[row]), sub(splat(distance), lane_index()), s);
        }
        s = keep(s, seen.low - from, seen.high - from, -kInfinity);
        store(scores + from, s);
        top = max(top, s);
    }
    return reduce_max(top);
}

// Scores become weights of the values: exp(score - top) * value scale, 0 for what is not seen.
// Stale scales may be NaN. Returns the sum of the exponentials.
static float soften(const Chunk& chunk, Seen seen, float top, float* scores) {
    F16 sum = zero();
    for (int g = chunk.begin; g < chunk.end; ++g) {
        const int from = g * kLanes, low = seen.low - from, high = seen.high - from;
        if (low >= kLanes || high <= 0) {
            store(scores + from, zero());
            continue;
        }
        const F16 e = keep(exp(sub(load(scores + from), splat(top))), low, high, 0.0f);
        sum = add(sum, e);
        store(scores + from, keep(mul(e, load(chunk.groups[g].value_scales)), low, high, 0.0f));
    }
    return reduce_add(sum);
}

template <int N>
static void attend_rows(const QueryRows& rows, int row, const Chunk& chunk, const Chunk* next,
                        float* scores, const Partial& to) {
    for (int g = chunk.begin; g < chunk.end; ++g)
        score_rows<N>(rows, row, chunk.groups[g], scores + g * kLanes);
    for (int n = 0; n < N; ++n) {
        const Seen seen = seen_by(rows, row + n, chunk);
        const float top = shape_scores(rows, row + n, chunk, seen, scores + n * kChunk);
        to.tops[row + n] = top;
        to.sums[row + n] = soften(chunk, seen, top, scores + n * kChunk);
    }
    float* const out = to.out + (int64_t)row * rows.padded_dim;
    int d = 0;
    for (; d + kVectors * kLanes <= rows.padded_dim; d += kVectors * kLanes)
        weigh_values<N, kVectors>(scores, chunk, next, d, rows.padded_dim, out);
    if (d < rows.padded_dim)
        weigh_values<N, 1>(scores, chunk, next, d, rows.padded_dim, out);
}

// All rows of a block; a row that sees nothing of the chunk gets the sum 0. `scores` holds
// kTogether * kChunk floats.
static void attend_chunk(const QueryRows& rows, const Chunk& chunk, const Chunk* next, float* scores,
                         const Partial& to) {
    for (int row = 0; row < rows.count; row += kTogether) {
        switch (rows.count - row) {
            case 1: attend_rows<1>(rows, row, chunk, next, scores, to); break;
            case 2: attend_rows<2>(rows, row, chunk, next, scores, to); break;
            case 3: attend_rows<3>(rows, row, chunk, next, scores, to); break;
            case 4: attend_rows<4>(rows, row, chunk, next, scores, to); break;
            case 5: attend_rows<5>(rows, row, chunk, next, scores, to); break;
            case 6: attend_rows<6>(rows, row, chunk, next, scores, to); break;
            case 7: attend_rows<7>(rows, row, chunk, next, scores, to); break;
            default: attend_rows<8>(rows, row, chunk, next, scores, to);
        }
        next = nullptr;
    }
}

}  // namespace VENTURI_NAMESPACE
