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
constexpr int64_t kPiece = 64 << 10;     // that a thread takes at a time
constexpr int64_t kBlock = 256 << 10;    // half of the L2 cache of a small core

// A thread's part of a product: panels of out-features, and tiles of rows where there are more
// threads than panels.
struct Share {
    Range panels, tiles;
};
VENTURI_INLINE Share share_of(int64_t panels, int64_t tiles, int thread, int threads) {
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

// Calls `body(Rows, panel, Ahead)` for one block of panels, `most` rows at most at a time.
template <typename Body>
VENTURI_INLINE void one_block(Range panels, Range row_tiles, int64_t rows, const uint8_t* weights,
                              int64_t bytes, int64_t block, int parts, const Body& body) {
    const int64_t passes = parts * (row_tiles.end - row_tiles.begin);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const Tile at = tile(rows, row_tiles.begin + pass / parts);
        const Range own = part(at.rows, (int)(pass % parts), parts);
        for (int64_t p = panels.begin; p < panels.end; ++p) {
            // A lone pass runs through memory and fetches what is some lines ahead. Else each
            // pass fetches its part of the panel that comes `block` later.
            const uint8_t* panel = weights + p * bytes;
            Ahead ahead{panel + kDistance, 8};
            if (passes > 1) {
                const int lines = (int)ceil_div(8, passes);
                ahead = {panel + block * bytes + pass * lines * (bytes / 8), lines};
            }
            body(Rows{at, (int)own.begin, (int)(own.end - own.begin)}, p, ahead);
        }
    }
}

// Phase: calls `body(Rows, panel, Ahead)` for all panels and rows.
template <typename Body>
VENTURI_INLINE void each_block(int64_t outs, int64_t rows, const uint8_t* weights, int64_t bytes,
                               int most, const Team& team, const Body& body) {
    const int parts = (int)ceil_div(tile(rows, 0).rows, most);
    for (int step = 0; step < team.threads; ++step) {
        const int owner = (team.thread + step) % team.threads;
        const Share share = share_of(ceil_div(outs, kPanel), tiles(rows), owner, team.threads);
        const int64_t passes = parts * (share.tiles.end - share.tiles.begin);
        if (!passes) continue;
        const int64_t bound = passes > 1 ? kBlock : kPiece;
        const int64_t block = bytes < bound ? bound / bytes : 1;
        for (;;) {
            const int64_t first = share.panels.begin + block * team.take(owner);
            if (first >= share.panels.end) break;
            const int64_t end = first + block < share.panels.end ? first + block : share.panels.end;
            one_block({first, end}, share.tiles, rows, weights, bytes, block, parts, body);
        }
    }
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
