// Who multiplies what, and in which order, so that each byte of weights comes from memory once.
//
// Weights lie in panels of 32 out-features. All rows that fit the registers go through a panel at
// once; where there are more, a block of panels stays in the L2 cache until all rows have gone
// through it. Meanwhile the next block is fetched, so that memory and arithmetic are busy at the
// same time.
#pragma once

#include "activations.h"

namespace VENTURI_NAMESPACE {

constexpr int kPanel = 32;
constexpr int kLine = 64;
constexpr int64_t kDistance = 12 << 10;  // measured: at 4 KB, 8 rows wait for memory
constexpr int64_t kBlock = 256 << 10;    // half of the L2 cache of a small core

// A thread's part of a product: panels of out-features, and tiles of rows where there are more
// threads than panels.
struct Share {
    Range panels, tiles;
};
VENTURI_INLINE Share share(int64_t panels, int64_t tiles, int thread, int threads) {
    const int across = (int)(panels < threads ? panels : threads), down = threads / across;
    const int rows = (int)(tiles < down ? tiles : down);
    if (thread >= across * rows) return {{0, 0}, {0, 0}};
    return {part(panels, thread % across, across), part(tiles, thread / across, rows)};
}

// Rows `begin` to `begin + rows` of a tile.
struct Rows {
    Tile tile;
    int begin, rows;
};

// What is fetched meanwhile: `lines` cache lines from `from` on for every 512 bytes of weights.
struct Ahead {
    const uint8_t* from;
    int lines;
};
VENTURI_INLINE void fetch(Ahead& ahead) {
    for (int i = 0; i < ahead.lines; ++i) prefetch_l2(ahead.from + i * kLine);
    ahead.from += ahead.lines * kLine;
}

VENTURI_INLINE void fetch_line(Ahead& ahead) {
    prefetch_l2(ahead.from);
    ahead.from += kLine;
}

// Panels of `bytes` bytes that stay in the cache together.
VENTURI_INLINE int64_t block_panels(int64_t bytes) { return bytes < kBlock ? kBlock / bytes : 1; }

// Calls `body(Rows, panel, Ahead)` for all of a thread's share, with `most` rows at most. A panel
// lies at `where(panel)`, before the next one, and is multiplied as `bytes` bytes. Where panels are
// used more than once, `prepare(first, end)` comes before all bodies of a block of them.
template <typename Where, typename Prepare, typename Body>
VENTURI_INLINE void each_block(int64_t outs, int64_t rows, const Where& where, int64_t bytes,
                               int most, int thread, int threads, const Prepare& prepare,
                               const Body& body) {
    const Share mine = share(ceil_div(outs, kPanel), tiles(rows), thread, threads);
    const int parts = (int)ceil_div(tile(rows, 0).rows, most);
    const int64_t passes = parts * (mine.tiles.end - mine.tiles.begin);
    const int64_t block = passes > 1 ? block_panels(bytes) : 1, last = ceil_div(outs, kPanel);
    for (int64_t first = mine.panels.begin; first < mine.panels.end; first += block) {
        const int64_t end = first + block < mine.panels.end ? first + block : mine.panels.end;
        if (passes > 1) prepare(first, end);
        for (int64_t pass = 0; pass < passes; ++pass) {
            const Tile at = tile(rows, mine.tiles.begin + pass / parts);
            const Range own = part(at.rows, (int)(pass % parts), parts);
            for (int64_t p = first; p < end; ++p) {
                // A lone pass runs through memory and fetches what is some lines ahead. Else each
                // pass fetches its part of the panel that comes `block` later.
                const uint8_t* panel = where(p);
                const int64_t stored = where(p + 1) - panel;
                Ahead ahead{panel + kDistance, (int)ceil_div(8 * stored, bytes)};
                if (passes > 1) {
                    const int lines = (int)ceil_div(8 * stored, bytes * passes);
                    const uint8_t* next = where(p + block < last ? p + block : last);
                    ahead = {next + pass * lines * (bytes / 8), lines};
                }
                body(Rows{at, (int)own.begin, (int)(own.end - own.begin)}, p, ahead);
            }
        }
    }
}

// As above, for panels of `bytes` bytes from `weights` on.
template <typename Body>
VENTURI_INLINE void each_block(int64_t outs, int64_t rows, const uint8_t* weights, int64_t bytes,
                               int most, int thread, int threads, const Body& body) {
    each_block(
        outs, rows, [=](int64_t panel) { return weights + panel * bytes; }, bytes, most, thread,
        threads, [](int64_t, int64_t) {}, body);
}

// Tables of kernels by rows have no entries of their own for more rows than ever come at once.
constexpr int fit(int rows, int most) { return rows <= most ? rows : most; }
constexpr int kGroupedRows = (kRegisterRows + 1) / 2;  // those kernels have two sums for each result

// Stores 16 of a panel's results for one row, of which `left` are out-features.
VENTURI_INLINE void store_outs(float* row, F16 v, int64_t left) {
    if (left >= kLanes) store(row, v);
    else if (left > 0) store_part(row, v, (int)left);
}

}  // namespace VENTURI_NAMESPACE
