// How the work of attention is cut: blocks of rows, their chunks, and which thread takes which.
#pragma once

#include "attention.h"
#include "attention_chunk.h"
#include "team.h"

namespace VENTURI_NAMESPACE {

// QueryRows of some neighbouring tokens of a sequence, for some neighbouring KV heads: those of the
// first KV head's group first, by token, then those of the next.
struct Block {
    const AttentionSequence* sequence;
    int kv_head, kv_heads;
    int token, tokens;           // the first is counted from the sequence's first row
    int chunk_begin, chunk_end;  // those that a row sees
    int64_t start, cost;         // of all chunks before; of each chunk
};

VENTURI_INLINE int group_size(const AttentionArgs& args) { return args.heads / args.kv.kv_heads; }

// Tokens of a block: about 64 rows share what is loaded of a chunk.
constexpr int kBlockRows = 64;
VENTURI_INLINE int block_tokens(const AttentionArgs& args) {
    const int tokens = kBlockRows / group_size(args);
    return tokens < 1 ? 1 : tokens > 32 ? 32 : tokens;
}

// KV heads of a block of a sequence. Those of one page lie side by side, so that taking them
// one after the other reads memory in longer runs; but there must be chunks enough for all
// threads, and a prompt's rows are many with one.
VENTURI_INLINE int block_heads(const AttentionArgs& args, const AttentionSequence& sequence,
                               int64_t chunks) {
    if (chunks < 8 * args.threads) return 1;
    const int tokens = sequence.rows < block_tokens(args) ? sequence.rows : block_tokens(args);
    const int heads = kBlockRows / (tokens * group_size(args));
    return heads < 1 ? 1 : heads < args.kv.kv_heads ? heads : args.kv.kv_heads;
}

VENTURI_INLINE int64_t context_chunks(const AttentionSequence& sequence) {
    return ceil_div(sequence.context, kChunk);
}
VENTURI_INLINE int64_t all_chunks(const AttentionArgs& args) {
    int64_t chunks = 0;
    for (int64_t s = 0; s < args.sequence_count; ++s) chunks += context_chunks(args.sequences[s]);
    return chunks;
}

// Of one KV head.
VENTURI_INLINE int head_rows(const AttentionArgs& args, const Block& block) {
    return block.tokens * group_size(args);
}
VENTURI_INLINE int block_rows(const AttentionArgs& args, const Block& block) {
    return block.kv_heads * head_rows(args, block);
}

// Rows of QueryRows::q that hold one KV head's, which begin a batch.
VENTURI_INLINE int query_rows(const AttentionArgs& args, const Block& block) {
    return (int)ceil_div(head_rows(args, block), kTogether) * kTogether;
}

// Position of a block's first token.
VENTURI_INLINE int first_place(const Block& block) {
    return block.sequence->context - block.sequence->rows + block.token;
}

VENTURI_INLINE Block make_block(const AttentionArgs& args, const AttentionSequence& sequence,
                                int kv_head, int kv_heads, int token, int64_t start) {
    const int left = sequence.rows - token, most = block_tokens(args);
    Block block{&sequence, kv_head, kv_heads, token, left < most ? left : most, 0, 0, start, 0};
    const int first = first_place(block), end = first + block.tokens;
    const int begin = args.window && first >= args.window ? first - args.window + 1 : 0;
    block.chunk_begin = begin / kChunk;
    block.chunk_end = (int)ceil_div(end, kChunk);
    // QueryRows by groups of positions, and what each costs beside that.
    const int64_t groups = ceil_div(end - begin, kLanes);
    const int64_t share = ceil_div(groups, block.chunk_end - block.chunk_begin);
    block.cost = (share + 2) * (head_rows(args, block) + 4) * kv_heads;
    return block;
}

// Calls f(block) for all blocks in their order; returns the cost of all.
template <typename F>
static int64_t for_blocks(const AttentionArgs& args, const F& f) {
    const int64_t chunks = all_chunks(args);
    int64_t start = 0;
    for (int64_t s = 0; s < args.sequence_count; ++s) {
        const AttentionSequence& sequence = args.sequences[s];
        const int most = block_heads(args, sequence, chunks);
        for (int head = 0; head < args.kv.kv_heads; head += most) {
            const int left = args.kv.kv_heads - head, heads = left < most ? left : most;
            for (int token = 0; token < sequence.rows; token += block_tokens(args)) {
                const Block block = make_block(args, sequence, head, heads, token, start);
                f(block);
                start += block.cost * (block.chunk_end - block.chunk_begin);
            }
        }
    }
    return start;
}

// The chunks of a block that are `thread`'s: those that start in its part of the cost.
VENTURI_INLINE Range thread_chunks(const Block& block, int64_t total, int thread, int threads) {
    const auto chunk_from = [&](int64_t cost) -> int64_t {
        if (cost <= block.start) return block.chunk_begin;
        const int64_t chunk = block.chunk_begin + ceil_div(cost - block.start, block.cost);
        return chunk < block.chunk_end ? chunk : block.chunk_end;
    };
    return {chunk_from(ceil_div(total * thread, threads)),
            chunk_from(ceil_div(total * (thread + 1), threads))};
}

// A thread's buffers for one block of rows. `running` is the outcome of the chunks so far;
// where a block was begun by another thread, `later(i)` is that of the i-th chunk of this one.
struct Scratch {
    int64_t rows, padded_dim;
    int8_t* q;
    int32_t* offsets;
    int32_t* places;
    float* scales;
    float* slopes;
    Weights weights;
    float* partials;

    int64_t partial_floats() const { return rows * (padded_dim + 2); }
    Partial partial(int64_t index) const {
        float* const at = partials + index * partial_floats();
        return {at, at + rows * padded_dim, at + rows * (padded_dim + 1)};
    }
    Partial chunk() const { return partial(0); }
    Partial running() const { return partial(1); }
    Partial later(int64_t index) const { return partial(2 + index); }
};

constexpr int kWeightFloats = kTogether * kChunk / 2 * 3;

struct ScratchSize {
    int64_t rows, query_rows, chunks;
    int64_t bytes;  // for each thread
};

VENTURI_INLINE ScratchSize scratch_size(const AttentionArgs& args) {
    const int64_t all = all_chunks(args), dim = args.kv.padded_dim;
    int64_t rows = 0, queries = 0, chunks = 0;
    for (int64_t s = 0; s < args.sequence_count; ++s) {
        const AttentionSequence& sequence = args.sequences[s];
        const int heads = block_heads(args, sequence, all);
        const Block block = make_block(args, sequence, 0, heads, 0, 0);
        const int own = block_rows(args, block), q = heads * query_rows(args, block);
        if (own > rows) rows = own;
        if (q > queries) queries = q;
        if (context_chunks(sequence) > chunks) chunks = context_chunks(sequence);
    }
    if (args.threads == 1) chunks = 0;
    const int64_t floats = 4 * rows + kWeightFloats + (2 + chunks) * rows * (dim + 2);
    return {rows, queries, chunks, ceil_div(queries * dim + 4 * floats, 64) * 64};
}

VENTURI_INLINE Scratch thread_scratch(const AttentionArgs& args, int thread) {
    const ScratchSize size = scratch_size(args);
    const int64_t dim = args.kv.padded_dim, rows = size.rows;
    uint8_t* const q = args.scratch + thread * size.bytes;
    float* const floats = (float*)(q + size.query_rows * dim);
    float* const scores = floats + 4 * rows;
    const Weights weights{scores, (int16_t*)(scores + kTogether * kChunk)};
    return {rows, dim, (int8_t*)q, (int32_t*)floats, (int32_t*)(floats + rows), floats + 2 * rows,
            floats + 3 * rows, weights, scores + kWeightFloats};
}

}  // namespace VENTURI_NAMESPACE
