// One W8A16 or W4A16 linear layer.
#include "linear_float.h"

using namespace VENTURI_NAMESPACE;

// Mirrored in grouped.py.
struct LinearFloatArgs {
    const float* x;  // [M, K]
    GroupedWeights weights;
    float* out;  // [M, N]
    int64_t rows;
    int64_t threads;
};

VENTURI_EXPORT(venturi_linear_float)(const LinearFloatArgs* args) {
    const GroupedWeights& w = args->weights;
    const int threads = paying_threads(args->threads, args->rows, w.outs * w.columns);
    run_team(threads, [&](const Team& team) {
        linear_float(w, args->x, args->rows, args->out, w.outs, team);
    });
}
