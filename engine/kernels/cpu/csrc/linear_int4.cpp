// One W4A8 linear layer in one call: quantises the activations, then multiplies.
#include "linear_int4.h"

using namespace VENTURI_NAMESPACE;

// Mirrored in grouped.py.
struct LinearInt4Args {
    const float* x;  // [M, K]
    Activations activations;
    GroupedWeights weights;
    float* out;  // [M, N]
    int64_t threads;
};

VENTURI_EXPORT(venturi_linear_int4)(const LinearInt4Args* args) {
    const Activations& a = args->activations;
    const int threads = paying_threads(args->threads, a.rows, args->weights.outs * a.columns);
    run_team(threads, [&](const Team& team) {
        quantize(args->x, a, team.thread, team.threads);
        team.barrier();
        linear_int4(args->weights, a, args->out, args->weights.outs, team);
    });
}
