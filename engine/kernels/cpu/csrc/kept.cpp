// Leaves the zeros of int8 panels out, and puts them back; at load, and for tests of the kernels.
#include "linear_int8.h"

using namespace VENTURI_NAMESPACE;

// Mirrored in sparse.py.
struct KeptArgs {
    uint8_t* whole;    // [P, K / 4, 2, 64]
    uint8_t* records;  // see lines.h
    int64_t* begins;   // [P + 1], from the first record on
    int64_t panels;
    int64_t quads;     // of columns, K / 4
};

// Whole panels to records, of at most 72 bytes for each line.
VENTURI_EXPORT(venturi_keep)(const KeptArgs* args) {
    const uint8_t* line = args->whole;
    uint8_t* out = args->records;
    for (int64_t panel = 0; panel < args->panels; ++panel) {
        args->begins[panel] = out - args->records;
        for (int64_t k = 0; k < args->quads; k += kChunkQuads) {
            const int64_t rest = args->quads - k;
            const int64_t lines = 2 * (rest < kChunkQuads ? rest : kChunkQuads);
            uint8_t* masks = out;
            out += lines * sizeof(uint64_t);
            for (int64_t i = 0; i < lines; ++i, line += kLine, masks += sizeof(uint64_t)) {
                uint64_t mask = 0;
                for (int b = 0; b < kLine; ++b) {
                    const bool kept = line[b] != 128;
                    mask |= (uint64_t)kept << b;
                    *out = line[b];
                    out += kept;
                }
                __builtin_memcpy(masks, &mask, sizeof mask);
            }
        }
    }
    args->begins[args->panels] = out - args->records;
}

// Records to whole panels.
VENTURI_EXPORT(venturi_expand)(const KeptArgs* args) {
    for (int64_t panel = 0; panel < args->panels; ++panel)
        expand_panel(KeptLines<false>{args->records + args->begins[panel]}, args->quads,
                     args->whole + panel * args->quads * 2 * kLine);
}
