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

// Panels of `bytes` bytes that stay in the cache together.
VENTURI_INLINE int64_t block_panels(int64_t bytes) { return bytes < kBlock ? kBlock / bytes : 1; }

// What a product runs through. A panel lies at `where(panel)`, before the next one, and is
// multiplied as `bytes` bytes.
template <typename Where>
struct Panels {
    Where where;
    int64_t bytes, count;
};

// Calls `body(Rows, panel, Ahead)` for one block of panels, with the rows in `parts` a tile.
template <typename Where, typename Body>
VENTURI_INLINE void one_block(const Panels<Where>& panels, Range range, Range row_tiles,
                              int64_t rows, int parts, const Body& body) {
    const int64_t block = range.end - range.begin, passes = parts * (row_tiles.end - row_tiles.begin);
    for (int64_t pass = 0; pass < passes; ++pass) {
        const Tile at = tile(rows, row_tiles.begin + pass / parts);
        const Range own = part(at.rows, (int)(pass % parts), parts);
        for (int64_t p = range.begin; p < range.end; ++p) {
            // A lone pass runs through memory and fetches what is some lines ahead. Else each
            // pass fetches its part of the panel that comes `block` later.
            const uint8_t* panel = panels.where(p);
            const int64_t stored = panels.where(p + 1) - panel;
            Ahead ahead{panel + kDistance, (int)ceil_div(8 * stored, panels.bytes)};
            if (passes > 1) {
                const int lines = (int)ceil_div(8 * stored, panels.bytes * passes);
                const int64_t later = p + block < panels.count ? p + block : panels.count;
                ahead = {panels.where(later) + pass * lines * (panels.bytes / 8), lines};
            }
            body(Rows{at, (int)own.begin, (int)(own.end - own.begin)}, p, ahead);
        }
    }
}

// Phase: calls `body(Rows, panel, Ahead)` for all panels and rows, `most` rows at most at a time.
// `prepare(first, end)` comes before all bodies of a block of panels that are used more than once;
// of such as are used once, with no panels.
template <typename Where, typename Prepare, typename Body>
VENTURI_INLINE void each_block(const Panels<Where>& panels, int64_t rows, int most, const Team& team,
                               const Prepare& prepare, const Body& body) {
    const int parts = (int)ceil_div(tile(rows, 0).rows, most);
    for (int step = 0; step < team.threads; ++step) {
        const int owner = (team.thread + step) % team.threads;
        const Share share = share_of(panels.count, tiles(rows), owner, team.threads);
        const int64_t passes = parts * (share.tiles.end - share.tiles.begin);
        if (!passes) continue;
        const int64_t piece = panels.bytes < kPiece ? kPiece / panels.bytes : 1;
        const int64_t block = passes > 1 ? block_panels(panels.bytes) : piece;
        for (;;) {
            const int64_t first = share.panels.begin + block * team.take(owner);
            if (first >= share.panels.end) break;
            const int64_t end = first + block < share.panels.end ? first + block : share.panels.end;
            prepare(first, passes > 1 ? end : first);
            one_block(panels, {first, end}, share.tiles, rows, parts, body);
        }
    }
}

// As above, for panels of `bytes` bytes from `weights` on.
template <typename Body>
VENTURI_INLINE void each_block(int64_t outs, int64_t rows, const uint8_t* weights, int64_t bytes,
                               int most, const Team& team, const Body& body) {
    const auto where = [=](int64_t panel) { return weights + panel * bytes; };
    const Panels<decltype(where)> panels{where, bytes, ceil_div(outs, kPanel)};
    each_block(panels, rows, most, team, [](int64_t, int64_t) {}, body);
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
