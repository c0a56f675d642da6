// The lines of 64 bytes of an int8 panel, as they lie in memory or with their zeros put back.
//
// Without zeros a panel is chunks of 64 lines (the last may have fewer), so that it is one stream:
//   [a mask of 64 bits for each line][the bytes whose bit is set, line after line]
// A byte whose bit is not set is 128, which stands for 0. Expanding reads up to a line's length
// beyond the last byte.
#pragma once

#include "blocks.h"

namespace VENTURI_NAMESPACE {

struct WholeLines {
    static constexpr bool kFetches = false;  // one row is so fast that the processor does that itself
    const uint8_t* at;

    // The lines of quads `k` to the returned one come next, two for each.
    VENTURI_INLINE_MEMBER int64_t chunk(int64_t, int64_t quads) { return quads; }
    VENTURI_INLINE_MEMBER B64 next() {
        const B64 line = load_bytes(at);
        at += kLine;
        return line;
    }
};

constexpr int64_t kChunkQuads = 32;

// kNative: with the processor's instruction.
template <bool kNative>
struct KeptLines {
    static constexpr bool kFetches = true;
    const uint8_t* values;
    const uint8_t* masks;

    explicit VENTURI_INLINE_MEMBER KeptLines(const uint8_t* panel) : values(panel), masks(panel) {}

    VENTURI_INLINE_MEMBER int64_t chunk(int64_t k, int64_t quads) {
        const int64_t end = k + kChunkQuads < quads ? k + kChunkQuads : quads;
        masks = values;
        values += (end - k) * 2 * sizeof(uint64_t);
        return end;
    }
    VENTURI_INLINE_MEMBER B64 next() {
        uint64_t mask;
        __builtin_memcpy(&mask, masks, sizeof mask);
        masks += sizeof mask;
        const B64 line = expand<kNative>(mask, values);
        values += __builtin_popcountll(mask);
        return line;
    }
};

// Puts the zeros of a panel back, into quads * 128 bytes.
template <typename Lines>
static void expand_panel(Lines lines, int64_t quads, uint8_t* out) {
    for (int64_t k = 0; k < quads;)
        for (const int64_t end = lines.chunk(k, quads); k < end; ++k, out += 2 * kLine) {
            store_bytes(out, lines.next());
            store_bytes(out + kLine, lines.next());
        }
}

}  // namespace VENTURI_NAMESPACE
