// Log-probabilities of a token of each row, and of the row's likeliest ones.
#include "vocabulary.h"

using namespace VENTURI_NAMESPACE;

// Mirrored in sample.py.
struct LogprobsArgs {
    const float* logits;    // [R, V]
    const int32_t* tokens;  // [R]
    float* own;             // [R]: of the token
    int64_t* rank;          // [R]: 1 and how many logits are above the token's
    float* values;          // [R, C], in descending order; of equals the first column first
    int32_t* ids;           // [R, C]
    int64_t rows, columns, count;
    int64_t threads;
};

namespace {

// Puts a logit where it belongs in `count` sorted ones, the last of which it may push out.
void insert(float* values, int32_t* ids, int64_t count, float value, int32_t id) {
    int64_t i = count - 1;
    for (; i > 0 && values[i - 1] < value; --i) {
        values[i] = values[i - 1];
        ids[i] = ids[i - 1];
    }
    values[i] = value;
    ids[i] = id;
}

void largest(const float* x, int64_t columns, float* values, int32_t* ids, int64_t count) {
    for (int64_t i = 0; i < count; ++i) insert(values, ids, i + 1, x[i], (int32_t)i);
    if (!count) return;
    for (int64_t k = count / kLanes * kLanes; k < columns; k += kLanes) {
        const F16 v = load_filled(x, k, columns, -INFINITY);
        unsigned above = less_mask(splat(values[count - 1]), v);
        if (k < count) above &= 0xFFFFu << (count - k);
        for (; above; above &= above - 1) {
            const int64_t column = k + __builtin_ctz(above);
            if (x[column] > values[count - 1])
                insert(values, ids, count, x[column], (int32_t)column);
        }
    }
}

void report(const LogprobsArgs& args, int64_t row) {
    const float* x = args.logits + row * args.columns;
    const F16 top = splat(extent(x, args.columns).most), own = splat(x[args.tokens[row]]);
    double total = 0.0;
    int64_t rank = 1;
    F16 sum = zero();
    for (int64_t k = 0; k < args.columns; k += kLanes) {
        const F16 v = load_filled(x, k, args.columns, -INFINITY), power = sub(v, top);
        sum = add(sum, less(power, splat(-87.0f), zero(), exp(power)));
        rank += __builtin_popcount(less_mask(own, v));
        if ((k + kLanes) % kPart == 0) {
            total += reduce_add(sum);
            sum = zero();
        }
    }
    total = log(total + reduce_add(sum)) + (double)reduce_max(top);
    args.own[row] = (float)(x[args.tokens[row]] - total);
    args.rank[row] = rank;
    float* values = args.values + row * args.count;
    largest(x, args.columns, values, args.ids + row * args.count, args.count);
    for (int64_t i = 0; i < args.count; ++i) values[i] = (float)(values[i] - total);
}

}  // namespace

VENTURI_EXPORT(venturi_logprobs)(const LogprobsArgs* args) {
    const int threads = paying_threads(args->threads, args->rows, args->columns);
    run_team(threads, [&](const Team& team) {
        const Range rows = part(args->rows, team.thread, team.threads);
        for (int64_t row = rows.begin; row < rows.end; ++row) report(*args, row);
    });
}
