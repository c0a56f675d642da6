// Reads memory and does nothing else: the ceiling that bench/kernels.py measures kernels against.
#include "team.h"

using namespace VENTURI_NAMESPACE;

// Mirrored in bench/kernels.py.
struct ReadArgs {
    const uint8_t* bytes;
    int64_t count;   // a multiple of 256
    int32_t* sums;   // [threads], so that the reads are needed
    int64_t threads;
};

VENTURI_EXPORT(venturi_read)(const ReadArgs* args) {
    run_team((int)args->threads, [&](const Team& team) {
        const Range mine = part(args->count / 256, team.thread, team.threads);
        const uint8_t* p = args->bytes + mine.begin * 256;
        I16 sums[4] = {splat((int32_t)0), splat((int32_t)0), splat((int32_t)0), splat((int32_t)0)};
        for (int64_t i = mine.begin; i < mine.end; ++i, p += 256) {
            prefetch_l2(p + 4096);
            prefetch_l2(p + 4160);
            prefetch_l2(p + 4224);
            prefetch_l2(p + 4288);
            for (int j = 0; j < 4; ++j) sums[j] = add(sums[j], words(load_bytes(p + 64 * j)));
        }
        args->sums[team.thread] = reduce_add(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    });
}
