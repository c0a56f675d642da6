#include "rope.h"

#include "team.h"

namespace VENTURI_NAMESPACE {

VENTURI_INLINE void turn(float* x, const float* cosines, const float* sines, int half, int i,
                         int count) {
    const F16 a = load_part(x + i, count), b = load_part(x + half + i, count);
    const F16 cos_a = load_part(cosines + i, count), sin_a = load_part(sines + i, count);
    const F16 cos_b = load_part(cosines + half + i, count);
    const F16 sin_b = load_part(sines + half + i, count);
    store_part(x + i, sub(mul(a, cos_a), mul(b, sin_a)), count);
    store_part(x + half + i, add(mul(b, cos_b), mul(a, sin_b)), count);
}

void rope(const RopeArgs& args, int thread, int threads) {
    const Range mine = part(args.tokens * args.heads, thread, threads);
    const int half = args.dim / 2;
    for (int64_t index = mine.begin; index < mine.end; ++index) {
        const int64_t token = index / args.heads, head = index % args.heads;
        float* const x = args.x + token * args.stride + head * args.head_dim;
        const float* const cosines = args.cosines + token * args.dim;
        const float* const sines = args.sines + token * args.dim;
        for (int i = 0; i < half; i += kLanes)
            turn(x, cosines, sines, half, i, half - i < kLanes ? half - i : kLanes);
    }
}

}  // namespace VENTURI_NAMESPACE
