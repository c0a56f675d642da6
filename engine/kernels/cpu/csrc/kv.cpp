#include "kv.h"

#include "head_int8.h"
#include "rope.h"
#include "team.h"

namespace VENTURI_NAMESPACE {

// 16 features of a group's key number `place`, four by four.
VENTURI_INLINE void store_key(uint8_t* keys, int place, int d, I16 q) {
    int8_t bytes[kLanes];
    store_s8(bytes, q);
    for (int i = 0; i < kLanes; i += 4) {
        uint32_t four;
        __builtin_memcpy(&four, bytes + i, 4);
        four ^= 0x80808080u;  // q + 128
        __builtin_memcpy(keys + (d + i) * kLanes + place * 4, &four, 4);
    }
}

// Those of a value. The other token of the pair may be another thread's: bytes are written.
VENTURI_INLINE void store_value(int8_t* values, int place, int padded_dim, int d, I16 q) {
    int8_t bytes[kLanes];
    store_s8(bytes, q);
    int8_t* const out = values + place / 2 * 2 * padded_dim + 2 * d + place % 2;
    for (int i = 0; i < kLanes; ++i) out[2 * i] = bytes[i];
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
        const float* const k = args.keys + token * args.key_stride + (int64_t)head * kv.head_dim;
        const float* const v =
            args.values + token * args.value_stride + (int64_t)head * kv.head_dim;
        const int dim = kv.padded_dim;
        const auto key = [&](int d, I16 q) { store_key(group.keys, place, d, q); };
        const auto value = [&](int d, I16 q) { store_value(group.values, place, dim, d, q); };
        group.key_scales[place] = quantize_head(k, kv.head_dim, dim, key) * kInverse127;
        group.value_scales[place] = quantize_head(v, kv.head_dim, dim, value) * kInverse127;
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
