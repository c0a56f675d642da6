// Rotary positions in half-split order, of queries and keys.
#pragma once

#include "vec.h"

namespace VENTURI_NAMESPACE {

// Turns the first `dim` of `head_dim` features of float32 [tokens][heads][head_dim] in place;
// rows are `stride` floats apart. Cosines and sines are those of the tokens, [tokens][dim].
struct RopeArgs {
    float* x;
    const float* cosines;
    const float* sines;
    int64_t stride, tokens;
    int32_t heads, head_dim, dim;
};

// x * cos + (-second half, first half) * sin, each product rounded, as torch has it.
void rope(const RopeArgs& args, int thread, int threads);

}  // namespace VENTURI_NAMESPACE
