// Quantises float rows alone: what tests compare with the reference.
#include "activations.h"

using namespace VENTURI_NAMESPACE;

struct QuantizeArgs {
    const float* x;  // [M, K]
    Activations activations;
    int64_t threads;
};

VENTURI_EXPORT(venturi_quantize)(const QuantizeArgs* args) {
    run_team((int)args->threads, [&](const Team& team) {
        quantize(args->x, args->activations, team.thread, team.threads);
    });
}
