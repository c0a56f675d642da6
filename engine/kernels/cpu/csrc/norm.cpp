// The phases before a product, each alone: what Python calls and tests compare.
#include "gate.h"
#include "norm.h"

using namespace VENTURI_NAMESPACE;

// Mirrored in norm.py.
struct NormArgs {
    const float* x;  // [M, K]
    Norm norm;
    float* out;  // [M, K]
    int64_t rows;
    int64_t threads;
};
struct NormQuantizeArgs {
    const float* x;  // [M, K]
    Norm norm;
    Activations activations;
    int64_t threads;
};
struct ActivateQuantizeArgs {
    float* x;  // [M, K], or [M, 2 K] where gated; changed
    int64_t function;
    int64_t gated;
    Activations activations;
    int64_t threads;
};

struct ActivateArgs {
    float* x;  // [M, K], or [M, 2 K] where gated; changed
    int64_t function;
    int64_t gated;
    int64_t rows, columns;  // M, K
    int64_t threads;
};

VENTURI_EXPORT(venturi_norm)(const NormArgs* args) {
    const int threads = paying_threads(args->threads, args->rows, args->norm.columns);
    run_team(threads, [&](const Team& team) {
        norm_rows(args->norm, args->x, args->out, args->rows, team.thread, team.threads);
    });
}

VENTURI_EXPORT(venturi_norm_quantize)(const NormQuantizeArgs* args) {
    run_team((int)args->threads, [&](const Team& team) {
        norm_quantize(args->norm, args->x, args->activations, team.thread, team.threads);
    });
}

VENTURI_EXPORT(venturi_activate_quantize)(const ActivateQuantizeArgs* args) {
    run_team((int)args->threads, [&](const Team& team) {
        activate_quantize((Function)args->function, args->gated, args->x, args->activations,
                          team.thread, team.threads);
    });
}

VENTURI_EXPORT(venturi_activate)(const ActivateArgs* args) {
    const int threads = paying_threads(args->threads, args->rows, args->columns);
    run_team(threads, [&](const Team& team) {
        activate_rows((Function)args->function, args->gated, args->x, args->rows, args->columns,
                      team.thread, team.threads);
    });
}
