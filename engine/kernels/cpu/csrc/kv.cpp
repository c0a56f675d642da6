#include "kv.h"

#include "head_int8.h"
#include "rope.h"
#include "team.h"

namespace VENTURI_NAMESPACE {

// A group's keys as they lie: four features of each of 16 tokens follow each other. Quantised
// values are taken from where they have just been written, which spares a buffer.
static void interleave_key(const int8_t* q, uint8_t* keys, int place, int padded_dim) {
    uint8_t* out = keys + place * 4;
    for (int d = 0; d < padded_dim; d += 4, out += 4 * kLanes) {
        uint32_t four;
        __builtin_memcpy(&four, q + d, 4);
        four ^= 0x80808080u;  // q + 128
        __builtin_memcpy(out, &four, 4);
    }
}

void kv_write(const KvWriteArgs& args, int thread, int threads) {
    const KvPages& kv = args.kv;
    const Range mine = part(args.tokens * kv.kv_heads, thread, threads);
    for (int64_t index = mine.begin; index < mine.end; ++index) {
        const int64_t token = index / kv.kv_heads;
        const int head = (int)(index % kv.kv_heads);
        const int64_t block = args.slots[token] / kv.block_size;
        const int offset = (int)(args.slots[token] % kv.block_size), place = offset % kLanes;
        const KvGroup group = kv_group(kv, block, head, offset / kLanes);
        int8_t* const values = group.values + (int64_t)place * kv.padded_dim;
        const float* const k = args.keys + token * args.key_stride + (int64_t)head * kv.head_dim;
        const float* const v =
            args.values + token * args.value_stride + (int64_t)head * kv.head_dim;
        group.key_scales[place] =
            quantize_head(k, kv.head_dim, values, kv.padded_dim) * kInverse127;
        interleave_key(values, group.keys, place, kv.padded_dim);
        group.value_scales[place] =
            quantize_head(v, kv.head_dim, values, kv.padded_dim) * kInverse127;
    }
}

}  // namespace VENTURI_NAMESPACE

using namespace VENTURI_NAMESPACE;

// Mirrored in kv.py.
struct KvStepArgs {
    RopeArgs q, k;
    KvWriteArgs write;
    int64_t threads;
};

VENTURI_EXPORT(venturi_kv_step)(const KvStepArgs* args) {
    run_team((int)args->threads, [&](const Team& team) {
        rope(args->q, team.thread, team.threads);
        rope(args->k, team.thread, team.threads);
        if (args->k.tokens) team.barrier();
        kv_write(args->write, team.thread, team.threads);
    });
}
