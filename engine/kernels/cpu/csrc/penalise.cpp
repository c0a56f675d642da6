// Makes tokens that came before less likely, as engine/penalties.py has it.
#include <string.h>

#include "team.h"

using namespace VENTURI_NAMESPACE;

// Of one row. Mirrored in penalise.py.
struct Penalty {
    const int32_t *prompt, *generated;
    int64_t prompt_length, generated_length;
    int64_t row;
    float repetition, frequency, presence, unused;
};

// Mirrored in penalise.py.
struct PenaliseArgs {
    float* logits;             // [R, V]
    const Penalty* penalties;  // [count], each of another row
    int32_t* scratch;          // [threads][V]
    int64_t count, columns;
    int64_t threads;
};

namespace {

constexpr int32_t kDone = -1;

void change(const Penalty& penalty, const int32_t* tokens, int64_t length, float* x,
            int32_t* times) {
    for (int64_t i = 0; i < length; ++i) {
        const int32_t token = tokens[i], count = times[token];
        if (count == kDone) continue;
        float logit = x[token];
        logit = logit > 0.0f ? logit / penalty.repetition : logit * penalty.repetition;
        x[token] = logit - (penalty.frequency * (float)count + (count ? penalty.presence : 0.0f));
        times[token] = kDone;
    }
}

void penalise(const Penalty& penalty, float* x, int32_t* times) {
    const int32_t *prompt = penalty.prompt, *generated = penalty.generated;
    for (int64_t i = 0; i < penalty.generated_length; ++i) ++times[generated[i]];
    change(penalty, generated, penalty.generated_length, x, times);
    change(penalty, prompt, penalty.prompt_length, x, times);
    for (int64_t i = 0; i < penalty.generated_length; ++i) times[generated[i]] = 0;
    for (int64_t i = 0; i < penalty.prompt_length; ++i) times[prompt[i]] = 0;
}

}  // namespace

VENTURI_EXPORT(venturi_penalise)(const PenaliseArgs* args) {
    // Some nanoseconds a token: less than a second thread costs to wake.
    int64_t tokens = 0;
    for (int64_t i = 0; i < args->count; ++i)
        tokens += args->penalties[i].prompt_length + args->penalties[i].generated_length;
    run_team(paying_threads(args->threads, 16, tokens), [&](const Team& team) {
        int32_t* times = args->scratch + team.thread * args->columns;
        memset(times, 0, (size_t)args->columns * sizeof *times);
        const Range rows = part(args->count, team.thread, team.threads);
        for (int64_t i = rows.begin; i < rows.end; ++i) {
            const Penalty& penalty = args->penalties[i];
            penalise(penalty, args->logits + penalty.row * args->columns, times);
        }
    });
}
