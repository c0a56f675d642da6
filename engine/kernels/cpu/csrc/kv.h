// Pages of the INT8 KV cache: their layout, and the phase that writes keys and values.
#pragma once

#include "vec.h"

namespace VENTURI_NAMESPACE {

// Mirrored in kv.py, as the structures of arguments are.
//
// One layer's pages. A page holds one KV head's tokens of one block: keys as q + 128 in groups
// of 16 tokens, [block_size / 16][padded_dim / 4][16][4], then values in pairs of tokens,
// [block_size / 2][padded_dim][2].
// Pages lie [block][KV head], scales [block][KV head][key, value][block_size]. block_size and
// padded_dim are multiples of 16; what pads a head is never multiplied with anything but 0.
struct KvPages {
    uint8_t* pages;
    float* scales;
    int32_t block_size, kv_heads, head_dim, padded_dim;
};

// Where 16 neighbouring tokens of one KV head lie.
struct KvGroup {
    uint8_t* keys;   // [padded_dim / 4][16][4]
    int8_t* values;  // [8][padded_dim][2]
    float* key_scales;
    float* value_scales;
};

VENTURI_INLINE KvGroup kv_group(const KvPages& kv, int64_t block, int head, int group) {
    const int64_t page = block * kv.kv_heads + head;
    const int64_t half = (int64_t)kv.block_size * kv.padded_dim;
    const int64_t offset = (int64_t)group * kLanes * kv.padded_dim;
    uint8_t* const keys = kv.pages + page * 2 * half;
    float* const scales = kv.scales + page * 2 * kv.block_size + group * kLanes;
    return {keys + offset, (int8_t*)keys + half + offset, scales, scales + kv.block_size};
}

// float32 keys and values [tokens][KV head][head_dim], rows stride floats apart, for slots
// block * block_size + offset.
struct KvWriteArgs {
    KvPages kv;
    const float* keys;
    const float* values;
    const int64_t* slots;
    int64_t key_stride, value_stride, tokens;
};

// x ~ q * scale with q = round_half_even(x * (127 / absmax)) and scale = absmax * (1 / 127),
// over one token and head.
void kv_write(const KvWriteArgs& args, int thread, int threads);

}  // namespace VENTURI_NAMESPACE
