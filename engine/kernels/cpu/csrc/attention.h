// Causal grouped-query attention of a whole batch over INT8 pages.
//
// A row's result has the same bits whatever the batch, the chunking of its prompt, the places of
// its pages and the number of threads: positions are taken in chunks of 256, counted from
// position 0, each with a softmax of its own, and chunks are merged in ascending order. Threads
// share the chunks out by cost; where a boundary cuts a block of rows, the later threads leave
// the results of its chunks to the thread that began it.
//
// Queries are rounded to INT8 by row and head. score = float(int32 sum) * (key scale * (query
// scale * scale * log2 e)), and 2^score takes the place of e^score. Within a chunk, a row's weights
// w = 2^(score - top) * value scale are rounded to q = round_half_even(w * (32767 / largest w));
// the sums of q * value are exact in int32, and float(sum) * (largest w / 32767) is the chunk's
// output. 15 bits, since the values' own rounding then outweighs that of the weights by far, also
// where a few positions dominate; with 8 bits it would not.
#pragma once

#include "kv.h"

namespace VENTURI_NAMESPACE {

// A sequence's rows of the batch, which are the last ones of its context.
struct AttentionSequence {
    int32_t first_row, rows;
    int32_t context;      // tokens up to and with the last row
    int32_t first_block;  // where its blocks begin in block_ids
};

// Mirrored in attention.py.
struct AttentionArgs {
    KvPages kv;
    const float* q;  // [T][heads][head_dim], rows q_stride floats apart
    float* out;      // likewise, rows out_stride floats apart; may be q
    const AttentionSequence* sequences;
    const int32_t* block_ids;
    const float* slopes;  // ALiBi: a score falls by a head's slope per position; null: none
    uint8_t* scratch;     // attention_scratch bytes, at a multiple of 64
    int64_t q_stride, out_stride, sequence_count;
    int64_t scratch_bytes;  // what attention_scratch says
    int64_t threads;  // that may come: how the work is cut must not depend on how many do
    int32_t heads;
    int32_t window;  // positions that a row sees, its own among them; 0: all
    float scale;     // of q.k
    float cap;       // scores become cap * tanh(score / cap); 0: they stay
};

// Bytes of scratch, from the sequences, heads and KvPages of args.
int64_t attention_scratch(const AttentionArgs& args);

// Two phases: the second finishes the blocks of rows that several threads shared.
void attention_chunks(const AttentionArgs& args, int thread, int threads);
void attention_merge(const AttentionArgs& args, int thread, int threads);

}  // namespace VENTURI_NAMESPACE
