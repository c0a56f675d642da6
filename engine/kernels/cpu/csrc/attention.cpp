#include "attention.h"

#include "attention_blocks.h"
#include "attention_chunk.h"
#include "team.h"

namespace VENTURI_NAMESPACE {

VENTURI_INLINE int row_token(const AttentionArgs& args, const Block& block, int row) {
    return row % head_rows(args, block) / group_size(args);
}
VENTURI_INLINE int row_head(const AttentionArgs& args, const Block& block, int row) {
    const int kv_head = block.kv_head + row / head_rows(args, block);
    return kv_head * group_size(args) + row % group_size(args);
}

// Where a block's i-th row lies in q or out.
VENTURI_INLINE int64_t row_offset(const AttentionArgs& args, const Block& block, int row,
                                  int64_t stride) {
    const int64_t token = block.sequence->first_row + block.token + row_token(args, block, row);
    return token * stride + (int64_t)row_head(args, block, row) * args.kv.head_dim;
}

// Where a row's first four numbers lie in QueryRows::q.
VENTURI_INLINE int64_t query_offset(const AttentionArgs& args, const Block& block, int row) {
    const int own = row % head_rows(args, block), head = row / head_rows(args, block);
    const int64_t batch = head * query_rows(args, block) + own / kTogether * kTogether;
    return batch * args.kv.padded_dim + own % kTogether * 4;
}

// Rounds a block's queries.
static QueryRows make_rows(const AttentionArgs& args, const Block& block, const Scratch& scratch) {
    const int count = block_rows(args, block), dim = args.kv.padded_dim;
    for (int row = 0; row < count; ++row) {
        int8_t* const q = scratch.q + query_offset(args, block, row);
        const float* const x = args.q + row_offset(args, block, row, args.q_stride);
        I16 sum = splat((int32_t)0);
        const auto store = [&](int d, I16 v) {
            int8_t bytes[kLanes];
            store_s8(bytes, v);
            for (int i = 0; i < kLanes; i += 4)
                __builtin_memcpy(q + (d + i) * kTogether, bytes + i, 4);
            sum = add(sum, v);
        };
        const float absmax = quantize_head(x, args.kv.head_dim, dim, store);
        scratch.offsets[row] = -128 * reduce_add(sum);
        scratch.scales[row] = absmax * kInverse127 * (args.scale * kLog2e);
        scratch.places[row] = first_place(block) + row_token(args, block, row);
        if (args.slopes) scratch.slopes[row] = args.slopes[row_head(args, block, row)] * kLog2e;
    }
    return {count,          dim,
            scratch.q,      scratch.offsets,
            scratch.scales, scratch.places,
            args.slopes ? scratch.slopes : nullptr, args.window,
            args.cap * kLog2e};
}

// Those of a block's `head`-th KV head.
VENTURI_INLINE QueryRows part_of(const QueryRows& rows, const AttentionArgs& args,
                                 const Block& block, int head) {
    const int count = head_rows(args, block), begin = head * count;
    QueryRows part = rows;
    part.count = count;
    part.q += (int64_t)head * query_rows(args, block) * rows.padded_dim;
    part.offsets += begin;
    part.scales += begin;
    part.places += begin;
    if (part.slopes) part.slopes += begin;
    return part;
}
VENTURI_INLINE Partial part_of(const Partial& partial, int begin, int dim) {
    return {partial.out + (int64_t)begin * dim, partial.tops + begin, partial.sums + begin};
}

// Looks a chunk's pages up. After the context's end, the last group stands in: it is only
// prefetched there.
static void find_chunk(const AttentionArgs& args, const Block& block, int index, int head,
                       Chunk& chunk) {
    const KvPages& kv = args.kv;
    const int32_t* const table = args.block_ids + block.sequence->first_block;
    const int in_block = kv.block_size / kLanes;
    const int last = (block.sequence->context - 1) / kLanes - index * kGroups;
    int page = index * kGroups / in_block, in_page = index * kGroups % in_block;
    for (int g = 0; g < kGroups; ++g) {
        chunk.groups[g] = kv_group(kv, table[page], head, in_page);
        if (g >= last) continue;
        if (++in_page == in_block) in_page = 0, ++page;
    }
    chunk.first = index * kChunk;
    const int first = first_place(block), end = first + block.tokens - chunk.first;
    const int begin = args.window ? first - args.window + 1 - chunk.first : 0;
    chunk.begin = begin <= 0 ? 0 : begin / kLanes;
    chunk.end = end >= kChunk ? kGroups : (int)ceil_div(end, kLanes);
}

// What 16 rows' sums so far, and those of a chunk, are multiplied with when they are added.
struct Factors {
    float old[kLanes], fresh[kLanes];
};
static Factors merge_sums(const Partial& to, const Partial& from, int row, int count) {
    const F16 before = load_part(to.tops + row, count), after = load_part(from.tops + row, count);
    const F16 top = max(before, after);
    const F16 finite = max(top, splat(-3e38f));  // where neither sees anything
    const F16 old = exp2(sub(before, finite)), fresh = exp2(sub(after, finite));
    const F16 sums = load_part(from.sums + row, count);
    Factors factors;
    store(factors.old, old);
    store(factors.fresh, fresh);
    store_part(to.sums + row, fma(sums, fresh, mul(load_part(to.sums + row, count), old)), count);
    store_part(to.tops + row, top, count);
    return factors;
}

// Adds a chunk's outcome to that of those before it.
static void merge(const Partial& to, const Partial& from, int rows, int dim) {
    for (int first = 0; first < rows; first += kLanes) {
        const int count = rows - first < kLanes ? rows - first : kLanes;
        const Factors factors = merge_sums(to, from, first, count);
        for (int i = 0; i < count; ++i) {
            if (from.sums[first + i] == 0.0f) continue;  // sees nothing of it
            const F16 old = splat(factors.old[i]), fresh = splat(factors.fresh[i]);
            float* const out = to.out + (int64_t)(first + i) * dim;
            const float* const more = from.out + (int64_t)(first + i) * dim;
            for (int d = 0; d < dim; d += kLanes)
                store(out + d, fma(load(more + d), fresh, mul(load(out + d), old)));
        }
    }
}

static void clear(const Partial& partial, int rows, int dim) {
    for (int64_t i = 0; i < (int64_t)rows * dim; i += kLanes) store(partial.out + i, zero());
    for (int row = 0; row < rows; ++row) {
        partial.tops[row] = -kInfinity;
        partial.sums[row] = 0.0f;
    }
}

static void finish(const AttentionArgs& args, const Block& block, const Partial& running) {
    const int rows = block_rows(args, block), dim = args.kv.head_dim;
    for (int row = 0; row < rows; ++row) {
        float* const out = args.out + row_offset(args, block, row, args.out_stride);
        const float* const sums = running.out + (int64_t)row * args.kv.padded_dim;
        const F16 factor = splat(1.0f / running.sums[row]);
        for (int d = 0; d < dim; d += kLanes) {
            const int left = dim - d;
            store_part(out + d, mul(load(sums + d), factor), left < kLanes ? left : kLanes);
        }
    }
}

// The same positions' pages of the next KV head, which lie beside those of this one.
static void next_head(const KvPages& kv, const Chunk& from, Chunk& to) {
    const int64_t page = 2 * (int64_t)kv.block_size * kv.padded_dim, scales = 2 * kv.block_size;
    to = from;
    for (KvGroup& group : to.groups) {
        group.keys += page;
        group.values += page;
        group.key_scales += scales;
        group.value_scales += scales;
    }
}

// A thread's chunks of a block.
struct BlockShare {
    Block block;
    Range chunks;
};

// What is read after chunk `now` for a head, `soon` being what the thread does next; null: nothing.
static const Chunk* find_next(const AttentionArgs& args, const BlockShare& share,
                              const BlockShare* soon, int64_t index, int head, const Chunk& now,
                              Chunk& chunk) {
    const Block& block = share.block;
    if (head + 1 < block.kv_heads) {
        next_head(args.kv, now, chunk);
    } else if (index + 1 < share.chunks.end) {
        find_chunk(args, block, (int)index + 1, block.kv_head, chunk);
    } else if (soon) {
        find_chunk(args, soon->block, (int)soon->chunks.begin, soon->block.kv_head, chunk);
    } else {
        return nullptr;
    }
    return &chunk;
}

static void attend_share(const AttentionArgs& args, const BlockShare& share, const BlockShare* soon,
                         const Scratch& scratch) {
    const Block& block = share.block;
    const QueryRows rows = make_rows(args, block, scratch);
    const int count = head_rows(args, block), dim = rows.padded_dim;
    const bool begins = share.chunks.begin == block.chunk_begin;
    if (begins) clear(scratch.running(), rows.count, dim);
    Chunk chunks[2];
    int at = 0;
    find_chunk(args, block, (int)share.chunks.begin, block.kv_head, chunks[at]);
    for (int64_t index = share.chunks.begin; index < share.chunks.end; ++index) {
        const Partial to = begins ? scratch.chunk() : scratch.later(index - share.chunks.begin);
        for (int head = 0; head < block.kv_heads; ++head, at = 1 - at) {
            const Chunk* next =
                find_next(args, share, soon, index, head, chunks[at], chunks[1 - at]);
            attend_chunk(part_of(rows, args, block, head), chunks[at], next, scratch.weights,
                         part_of(to, head * count, dim));
        }
        if (begins) merge(scratch.running(), to, rows.count, dim);
    }
    if (begins && share.chunks.end == block.chunk_end) finish(args, block, scratch.running());
}

int64_t attention_scratch(const AttentionArgs& args) {
    return scratch_size(args).bytes * args.threads;
}

void attention_chunks(const AttentionArgs& args, int thread, int threads) {
    const int64_t total = for_blocks(args, [](const Block&) {});
    const Scratch scratch = thread_scratch(args, thread);
    // One behind, so that the next one's memory can be asked for.
    BlockShare share{};
    bool waiting = false;
    for_blocks(args, [&](const Block& block) {
        const Range mine = thread_chunks(block, total, thread, threads);
        if (mine.begin >= mine.end) return;
        const BlockShare soon{block, mine};
        if (waiting) attend_share(args, share, &soon, scratch);
        share = soon;
        waiting = true;
    });
    if (waiting) attend_share(args, share, nullptr, scratch);
}

void attention_merge(const AttentionArgs& args, int thread, int threads) {
    if (threads == 1) return;
    const int64_t total = for_blocks(args, [](const Block&) {});
    const Scratch scratch = thread_scratch(args, thread);
    for_blocks(args, [&](const Block& block) {
        Range taken = thread_chunks(block, total, thread, threads);
        const bool began = taken.begin == block.chunk_begin && taken.begin < taken.end;
        if (!began || taken.end == block.chunk_end) return;
        const Partial running = scratch.running();
        for (int other = thread + 1; taken.end < block.chunk_end; ++other) {
            const Scratch theirs = thread_scratch(args, other);
            taken = thread_chunks(block, total, other, threads);
            for (int64_t i = 0; i < taken.end - taken.begin; ++i)
                merge(running, theirs.later(i), block_rows(args, block), args.kv.padded_dim);
        }
        finish(args, block, running);
    });
}

}  // namespace VENTURI_NAMESPACE

using namespace VENTURI_NAMESPACE;

VENTURI_EXPORT(venturi_attention_scratch)(AttentionArgs* args) {
    args->scratch_bytes = attention_scratch(*args);
}

VENTURI_EXPORT(venturi_attention)(const AttentionArgs* args) {
    run_team((int)args->threads, [&](const Team& team) {
        attention_chunks(*args, team.thread, team.threads);
        team.barrier();
        attention_merge(*args, team.thread, team.threads);
    });
}
