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

// QueryRows that share a load, and what one pass takes for N of them, groups of keys or vectors of
// values: as many sums as registers hold.
constexpr int kTogether = 8;
constexpr int at_once(int N) { return N == kTogether / 2 ? 4 : 2; }
constexpr float kLevels = 32767.0f;    // of weights: 256 products with values fit an int32
constexpr float kSmallest = 1e-34f;    // kLevels / it is finite
constexpr float kLog2e = 1.44269504f;

// Outputs of rows before they are divided by `sums`: of one chunk, or of all chunks so far.
struct Partial {
    float* out;   // [rows][padded_dim]
    float* tops;  // the largest score
    float* sums;  // of 2^(score - top)
};

// A block of rows, its queries in INT8.
struct QueryRows {
    int count, padded_dim;
    const int8_t* q;         // [count / kTogether][padded_dim / 4][kTogether][4]
    const int32_t* offsets;  // -128 * sum of q: takes back what keys + 128 bring too much
    const float* scales;     // query scale * scale * log2(e)
    const int32_t* places;   // position of the row's token
    const float* slopes;     // of the row's head, times log2(e); null: none
    int window;
    float cap;  // times log2(e)

    const int8_t* batch(int row) const { return q + (int64_t)row * padded_dim; }
};

// What a thread keeps of kTogether rows for one chunk.
struct Weights {
    float* scores;    // [kTogether][kChunk], in base 2, then 2^(score - top) * value scale
    int16_t* levels;  // [kTogether][kChunk]
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

// The next chunk's memory is asked for all along, since in a burst most lines would wait for the
// first: scales and every second group's keys while scores are computed, the other keys between the
// softmaxes of the rows, values while values are weighed.
VENTURI_INLINE void fetch_keys(const Chunk* next, int g, int padded_dim) {
    for (int line = 0; line < padded_dim * kLanes; line += 64)
        prefetch_l2(next->groups[g].keys + line);
}

// Scores of G groups from g on, and the largest of each lane so far.
template <int N, int G>
VENTURI_INLINE void score_groups(const QueryRows& rows, int row, const Chunk& chunk,
                                 const Chunk* next, int g, float* scores, F16 (&tops)[N]) {
    const int8_t* q = rows.batch(row);
    I16 sums[N][G];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int i = 0; i < G; ++i) sums[n][i] = splat(rows.offsets[row + n]);
    for (int line = 0; line < rows.padded_dim * kLanes; line += 64, q += 4 * kTogether) {
        B64 keys[G];
#pragma GCC unroll 4
        for (int i = 0; i < G; ++i) {
            keys[i] = load_bytes(chunk.groups[g + i].keys + line);
            if (next && i % 2 == 0) prefetch_l2(next->groups[g + i].keys + line);
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const B64 four = splat4(q + 4 * n);
#pragma GCC unroll 4
            for (int i = 0; i < G; ++i) sums[n][i] = dot4(sums[n][i], keys[i], four);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < G; ++i) {
        const F16 scale = load(chunk.groups[g + i].key_scales);
        if (next) {
            prefetch_l2(next->groups[g + i].key_scales);
            prefetch_l2(next->groups[g + i].value_scales);
        }
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
            const F16 factor = mul(scale, splat(rows.scales[row + n]));
            const F16 score = mul(to_float(sums[n][i]), factor);
            store(scores + n * kChunk + (g + i) * kLanes, score);
            tops[n] = max(tops[n], score);
        }
    }
}

// Those of a chunk.
template <int N>
VENTURI_APART void score_chunk(const QueryRows& rows, int row, const Chunk& chunk,
                               const Chunk* next, float* scores, F16 (&tops)[N]) {
    for (int n = 0; n < N; ++n) tops[n] = splat(-kInfinity);
    constexpr int kMost = at_once(N);
    int g = chunk.begin;
    for (; g + kMost <= chunk.end; g += kMost)
        score_groups<N, kMost>(rows, row, chunk, next, g, scores, tops);
    for (; g < chunk.end; ++g) score_groups<N, 1>(rows, row, chunk, next, g, scores, tops);
}

// Exact sums of the levels of positions times features d to d + 16 V of their values, times what
// a level is worth.
template <int N, int V>
VENTURI_APART void weigh_values(const int16_t* levels, const float* worth, const Chunk& chunk,
                         const Chunk* next, int d, int padded_dim, float* out) {
    I16 sums[N][V];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[n][v] = splat((int32_t)0);
    for (int g = chunk.begin; g < chunk.end; ++g) {
        const int8_t* values = chunk.groups[g].values + 2 * d;
        const int16_t* level = levels + g * kLanes;
        for (int pair = 0; pair < kLanes / 2; ++pair, values += 2 * padded_dim) {
            if (next)
                for (int line = pair * V / 2; line < (pair + 1) * V / 2; ++line)
                    prefetch_l2(next->groups[g].values + (d / 4 + line) * 64);
            I16 value[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) value[v] = load_pairs(values + 2 * v * kLanes);
#pragma GCC unroll 8
            for (int n = 0; n < N; ++n) {
                const I16 two = words(splat4(level + n * kChunk + 2 * pair));
#pragma GCC unroll 4
                for (int v = 0; v < V; ++v) sums[n][v] = dot2(sums[n][v], value[v], two);
            }
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            store(out + n * padded_dim + d + v * kLanes,
                  mul(to_float(sums[n][v]), splat(worth[n])));
}

// Positions [low, high) that a row sees, counted from the chunk's first; none where it sees none.
struct Seen {
    int low, high;

    int begin() const { return low / kLanes; }  // groups
    int end() const { return (high + kLanes - 1) / kLanes; }
};

VENTURI_INLINE Seen seen_by(const QueryRows& rows, int row, const Chunk& chunk) {
    const int last = rows.places[row] - chunk.first;
    const int low = rows.window && last >= rows.window ? last - rows.window + 1 : 0;
    const int high = last < kChunk ? last + 1 : kChunk;
    if (high <= low) return {0, 0};
    return {low, high};
}

// Calls f(group, edge) in order for the groups of which a row sees something; of an `edge` it may
// not see all.
template <typename F>
VENTURI_INLINE void each_group(Seen seen, const F& f) {
    int g = seen.begin();
    const int end = seen.end(), full = seen.high / kLanes;
    if (g < end && (seen.low % kLanes || g >= full)) f(g++, true);
    for (; g < full; ++g) f(g, false);
    if (g < end) f(g, true);
}

// Caps and masks a row's scores; returns the largest.
static float shape_scores(const QueryRows& rows, int row, const Chunk& chunk, Seen seen,
                          float* scores) {
    F16 top = splat(-kInfinity);
    for (int g = seen.begin(); g < seen.end(); ++g) {
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

// Scores become weights: 2^(score - top) * value scale, 0 for what is not seen. Stale scales may
// be NaN. Returns the largest weight, NaN where one is; the sum of the powers is left at `sum`.
static float soften(const Chunk& chunk, Seen seen, float top, float* scores, float* sum) {
    const F16 highest = splat(top);
    F16 total = zero();
    I16 peak = splat((int32_t)0);
    each_group(seen, [&](int g, bool edge) VENTURI_INLINE_LAMBDA {
        const int from = g * kLanes, low = seen.low - from, high = seen.high - from;
        F16 e = exp2(sub(load(scores + from), highest));
        if (edge) e = keep(e, low, high, 0.0f);
        F16 w = mul(e, load(chunk.groups[g].value_scales));
        if (edge) w = keep(w, low, high, 0.0f);
        total = add(total, e);
        // As integers, these have the order of floats, with NaN above all.
        peak = max(peak, bits(abs(w)));
        store(scores + from, w);
    });
    *sum = reduce_add(total);
    const int32_t largest = reduce_max(peak);
    float result;
    __builtin_memcpy(&result, &largest, 4);
    return result;
}

// Rounds weights to levels of the largest.
static void round_weights(const Chunk& chunk, Seen seen, float peak, const float* weights,
                          int16_t* levels) {
    const F16 factor = splat(peak >= kSmallest ? kLevels / peak : 0.0f);
    int g = chunk.begin;
    for (; g < seen.begin() && g < chunk.end; ++g) store_s16(levels + g * kLanes, splat((int32_t)0));
    for (; g < seen.end(); ++g)
        store_s16(levels + g * kLanes, round_int(mul(load(weights + g * kLanes), factor)));
    for (; g < chunk.end; ++g) store_s16(levels + g * kLanes, splat((int32_t)0));
}

template <int N>
static void attend_rows(const QueryRows& rows, int row, const Chunk& chunk, const Chunk* next,
                        const Weights& weights, const Partial& to) {
    F16 tops[N];
    score_chunk<N>(rows, row, chunk, next, weights.scores, tops);
    // One after the other for all rows, so that a row's reductions do not hold the next one up.
    Seen seen[N];
    float peaks[N];
    for (int n = 0; n < N; ++n) {
        seen[n] = seen_by(rows, row + n, chunk);
        float* const scores = weights.scores + n * kChunk;
        const bool all = seen[n].low == chunk.begin * kLanes && seen[n].high == chunk.end * kLanes;
        to.tops[row + n] = all && !rows.slopes && rows.cap == 0.0f
                               ? reduce_max(tops[n])
                               : shape_scores(rows, row + n, chunk, seen[n], scores);
    }
    for (int n = 0; n < N; ++n) {
        if (next)
            for (int g = chunk.begin + 1 + 2 * n; g < chunk.end; g += 2 * N)
                fetch_keys(next, g, rows.padded_dim);
        peaks[n] = soften(chunk, seen[n], to.tops[row + n], weights.scores + n * kChunk,
                          to.sums + row + n);
    }
    for (int n = 0; n < N; ++n) {
        round_weights(chunk, seen[n], peaks[n], weights.scores + n * kChunk,
                      weights.levels + n * kChunk);
        peaks[n] *= 1.0f / kLevels;
    }
    float* const out = to.out + (int64_t)row * rows.padded_dim;
    constexpr int kMost = at_once(N);
    int d = 0;
    for (; d + kMost * kLanes <= rows.padded_dim; d += kMost * kLanes)
        weigh_values<N, kMost>(weights.levels, peaks, chunk, next, d, rows.padded_dim, out);
    for (; d < rows.padded_dim; d += kLanes)
        weigh_values<N, 1>(weights.levels, peaks, chunk, next, d, rows.padded_dim, out);
}

// All rows of a block; a row that sees nothing of the chunk gets the sum 0.
static void attend_chunk(const QueryRows& rows, const Chunk& chunk, const Chunk* next,
                         const Weights& weights, const Partial& to) {
    for (int row = 0; row < rows.count; row += kTogether) {
        switch (rows.count - row) {
            case 1: attend_rows<1>(rows, row, chunk, next, weights, to); break;
            case 2: attend_rows<2>(rows, row, chunk, next, weights, to); break;
            case 3: attend_rows<3>(rows, row, chunk, next, weights, to); break;
            case 4: attend_rows<4>(rows, row, chunk, next, weights, to); break;
            case 5: attend_rows<5>(rows, row, chunk, next, weights, to); break;
            case 6: attend_rows<6>(rows, row, chunk, next, weights, to); break;
            case 7: attend_rows<7>(rows, row, chunk, next, weights, to); break;
            default: attend_rows<8>(rows, row, chunk, next, weights, to);
        }
        next = nullptr;
    }
}

}  // namespace VENTURI_NAMESPACE
