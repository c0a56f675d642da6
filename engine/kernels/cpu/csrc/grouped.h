// Weights with a scale for each group of columns: value = (u - zero) * scale, u of 4 or 8 bits.
//
// A panel of 32 out-features is a row of records, one for each group, so that all of it is one
// stream. A record is [scales][zeros][weights]:
//   scales: 32 of fp16, bf16 or fp32; the smallest that holds all of a layer's scales exactly
//   zeros: 32 of uint16, or none where all are the middle of the range (8 or 128)
//   weights: 8 bits as [group / 4][2][16][4]; 4 bits as [group / 8][2][16][4] bytes whose low
//            half is of columns 8 j + c and whose high half of columns 8 j + 4 + c
#pragma once

#include "blocks.h"

namespace VENTURI_NAMESPACE {

enum ScaleType : int64_t { kHalf = 0, kBfloat = 1, kFloat = 2 };

// Mirrored in grouped.py. The bias is padded to whole panels, and may be null.
struct GroupedWeights {
    const uint8_t* records;
    const float* bias;
    int64_t outs;     // N
    int64_t columns;  // K
    int64_t group;    // a multiple of 32; the last group is padded
    int64_t bits;
    int64_t scale_type;
    int64_t has_zeros;
};

struct Record {
    F16 scale[2];
    I16 zero[2];
    const uint8_t* weights;
};

VENTURI_INLINE int64_t record_bytes(const GroupedWeights& w) {
    return (w.scale_type == kFloat ? 128 : 64) + (w.has_zeros ? 64 : 0) + w.group * w.bits * 4;
}
VENTURI_INLINE int64_t group_count(const GroupedWeights& w) { return ceil_div(w.columns, w.group); }
VENTURI_INLINE int64_t panel_bytes(const GroupedWeights& w) {
    return group_count(w) * record_bytes(w);
}

VENTURI_INLINE Record read_record(const GroupedWeights& w, const uint8_t* p) {
    Record r;
    if (w.scale_type == kFloat) {
        for (int h = 0; h < 2; ++h) r.scale[h] = load((const float*)p + h * kLanes);
    } else {
        const uint16_t* s = (const uint16_t*)p;
        for (int h = 0; h < 2; ++h, s += kLanes)
            r.scale[h] = w.scale_type == kHalf ? load_half(s) : load_bfloat(s);
    }
    p += w.scale_type == kFloat ? 128 : 64;
    const int32_t middle = w.bits == 4 ? 8 : 128;
    for (int h = 0; h < 2; ++h)
        r.zero[h] = w.has_zeros ? load_u16((const uint16_t*)p + h * kLanes) : splat(middle);
    r.weights = p + (w.has_zeros ? 64 : 0);
    return r;
}

}  // namespace VENTURI_NAMESPACE
