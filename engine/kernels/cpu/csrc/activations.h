// Activations as the integer products read them: int8 rows in tiles, a scale for each row.
//
// M rows are divided into ceil(M / 12) tiles whose heights differ by 1 at most. A tile of r rows
// lies in memory as [K / 4][r][4], so that a kernel reads it as one stream; with one row that is
// the row itself. Columns are padded with zeros to a multiple of 16, or of the group.
#pragma once

#include "team.h"

namespace VENTURI_NAMESPACE {

constexpr int kTileRows = 12;

// Mirrored in linear.py.
struct Activations {
    int8_t* q;      // [tile][padded / 4][r][4]
    float* scale;   // [M]
    int32_t* sums;  // [tile][groups][r]: of q over each group of columns
    int64_t rows;
    int64_t columns;
    int64_t group;  // columns that share a weight scale; 0: all
};

struct Tile {
    int64_t row;  // the first
    int rows;
};

VENTURI_INLINE int64_t padded(int64_t columns, int64_t group) {
    const int64_t unit = group ? group : 16;
    return ceil_div(columns, unit) * unit;
}
VENTURI_INLINE int64_t groups(const Activations& a) {
    return a.group ? ceil_div(a.columns, a.group) : 1;
}
VENTURI_INLINE int64_t tiles(int64_t rows) { return ceil_div(rows, kTileRows); }
VENTURI_INLINE Tile tile(int64_t rows, int64_t index) {
    const int64_t count = tiles(rows), height = rows / count, taller = rows % count;
    return {index * height + (index < taller ? index : taller), (int)(height + (index < taller))};
}
// Where `row` is.
VENTURI_INLINE Tile tile_of(int64_t rows, int64_t row) {
    const int64_t count = tiles(rows), height = rows / count, taller = rows % count;
    const int64_t low = row / (height + 1);
    return tile(rows, low < taller ? low : taller + (row - taller * (height + 1)) / height);
}

// Quantises one row, whose 16 values from column k on `source.at(k)` gives, and from column k on
// only `count` of them `source.part(k, count)`, then zeros.
//   q = round_half_even(x * (127 / absmax)), scale = absmax * (1 / 127); absmax is NaN if one is.
template <typename Source>
VENTURI_INLINE void quantize_row(const Source& source, const Activations& a, int64_t row) {
    const int64_t columns = a.columns, whole = columns / 16 * 16;
    const int rest = (int)(columns - whole);
    // As integers, the absolute values of floats have their own order, with NaN above all.
    I16 most = splat((int32_t)0);
    for (int64_t k = 0; k < whole; k += 16) most = max(most, bits(abs(source.at(k))));
    if (rest) most = max(most, bits(abs(source.part(whole, rest))));
    const int32_t most_bits = reduce_max(most);
    float absmax;
    __builtin_memcpy(&absmax, &most_bits, 4);
    a.scale[row] = absmax * (1.0f / 127.0f);
    const F16 factor = splat(absmax > 0.0f ? 127.0f / absmax : 0.0f);

    const Tile at = tile_of(a.rows, row);
    const int64_t width = padded(a.columns, a.group), step = a.group ? a.group : width;
    int8_t* q = a.q + at.row * width + (row - at.row) * 4;
    int32_t* sums = a.sums + at.row * (width / step) + (row - at.row);
    for (int64_t begin = 0; begin < width; begin += step, sums += at.rows) {
        I16 sum = splat((int32_t)0);
        for (int64_t k = begin; k < begin + step; k += 16) {
            F16 x = zero();
            if (k < whole) x = source.at(k);
            else if (k < columns) x = source.part(k, rest);
            // The bounds matter where 127 / absmax overflows, and for NaN.
            const F16 bounded = min(max(mul(x, factor), splat(-127.0f)), splat(127.0f));
            const I16 v = round_int(bounded);
            sum = add(sum, v);
            int8_t bytes[16];
            store_s8(bytes, v);
            for (int i = 0; i < 4; ++i)
                __builtin_memcpy(q + (k / 4 + i) * at.rows * 4, bytes + 4 * i, 4);
        }
        *sums = reduce_add(sum);
    }
}

// A row in memory.
struct PlainRow {
    const float* x;
    VENTURI_INLINE_MEMBER F16 at(int64_t k) const { return load(x + k); }
    VENTURI_INLINE_MEMBER F16 part(int64_t k, int count) const { return load_part(x + k, count); }
};

// Phase: quantises rows of `x` [M, K].
static inline void quantize(const float* x, const Activations& a, int thread, int threads) {
    const Range rows = part(a.rows, thread, threads);
    for (int64_t row = rows.begin; row < rows.end; ++row)
        quantize_row(PlainRow{x + row * a.columns}, a, row);
}

}  // namespace VENTURI_NAMESPACE
