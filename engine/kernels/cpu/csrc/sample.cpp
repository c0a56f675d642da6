// Draws the next token of each row of logits, as `sample` of engine/kernels/reference.py has it.
#include "candidates.h"

using namespace VENTURI_NAMESPACE;

// How a row is drawn. Mirrored in sample.py.
struct Draw {
    double temperature, top_p, min_p;
    int64_t top_k;  // 0: all
    uint64_t seed, position, choice;
};

// Mirrored in sample.py.
struct SampleArgs {
    const float* logits;  // [R, V]
    const Draw* draws;    // [R]
    int32_t* tokens;      // [R]; -1 where a row has none
    void* scratch;        // [threads][3 (V + 32)] numbers of 4 bytes
    int64_t rows, columns;
    int64_t edited;  // -inf is a token that is not allowed, and the caller has looked for NaN
    int64_t threads;
};

namespace {

constexpr int32_t kNotFinite = -1;

uint64_t splitmix64(uint64_t value) {
    value += 0x9E3779B97F4A7C15u;
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
    value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
    return value ^ (value >> 31);
}

// `uniform_number` of engine/uniform.py.
double uniform(const Draw& draw) {
    const uint64_t seed = draw.choice ? splitmix64(draw.seed ^ splitmix64(draw.choice)) : draw.seed;
    return (double)(splitmix64(splitmix64(seed) + draw.position) >> 11) * 0x1p-53;
}

// Columns whose weight is below e^-depth together weigh less than what top-p leaves out.
float depth(const Draw& draw, int64_t columns) {
    if (draw.top_k || draw.top_p >= 1.0) return 87.0f;
    const double enough = log((double)columns / (1.0 - draw.top_p)) + 0.01;
    return enough < 87.0 ? (float)enough : 87.0f;
}

int32_t drawn(const float* x, int64_t columns, const Extent& row, const Draw& draw, float* scratch) {
    const int64_t width = columns + 2 * kLanes;
    Candidates found{scratch, scratch + width, (int32_t*)(scratch + 2 * width), 0, 0.0};
    // The reference's bounds: none of these makes NaN of a difference of logits.
    double temperature = draw.temperature > FLT_MIN ? draw.temperature : FLT_MIN;
    if (temperature > 1e30) temperature = 1e30;
    collect(x, columns, row.most, (float)temperature, depth(draw, columns), found);
    if (draw.top_k) {
        cut<false>(found, row, (double)draw.top_k);
        found.total = weight(found);
    }
    if (draw.top_p < 1.0) cut<true>(found, row, draw.top_p * found.total);
    if (draw.min_p > 0.0) drop_below(found, (float)draw.min_p);
    return at(found, uniform(draw) * weight(found));
}

int32_t next(const SampleArgs& args, int64_t index, float* scratch) {
    const float* x = args.logits + index * args.columns;
    const Draw& draw = args.draws[index];
    const Extent row = extent(x, args.columns);
    if (!(row.most > -INFINITY) || (!args.edited && !row.finite)) return kNotFinite;
    if (draw.temperature == 0.0) return (int32_t)column_of(x, args.columns, row.most);
    return drawn(x, args.columns, row, draw, scratch);
}

}  // namespace

VENTURI_EXPORT(venturi_sample)(const SampleArgs* args) {
    const int threads = paying_threads(args->threads, args->rows, args->columns);
    run_team(threads, [&](const Team& team) {
        float* scratch = (float*)args->scratch + team.thread * 3 * (args->columns + 2 * kLanes);
        const Range rows = part(args->rows, team.thread, team.threads);
        for (int64_t row = rows.begin; row < rows.end; ++row)
            args->tokens[row] = next(*args, row, scratch);
    });
}
