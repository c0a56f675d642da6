// One W8A8 linear layer in one call: quantises the activations, then multiplies.
#include "linear_int8.h"

using namespace VENTURI_NAMESPACE;

// Mirrored in linear.py.
struct LinearInt8Args {
    const float* x;  // [M, K]
    Activations activations;
    Int8Weights weights;
    float* out;  // [M, N]
    uint8_t* scratch;  // of `linear_int8`
    int64_t threads;
};

VENTURI_EXPORT(venturi_linear_int8)(const LinearInt8Args* args) {
    const Activations& a = args->activations;
    const Int8Weights& w = args->weights;
    const int threads = paying_threads(args->threads, a.rows, w.outs * a.columns);
    run_team(threads, [&](const Team& team) {
        quantize(args->x, a, team.thread, team.threads);
        team.barrier();
        linear_int8(w, a, args->out, w.outs, args->scratch, team);
    });
}
