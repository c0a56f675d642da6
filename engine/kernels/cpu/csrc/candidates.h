// The tokens of a row that may be drawn, and the cuts that make them fewer.
//
// Everything is one row's: sums have one order, so that a row's token is the same in any batch,
// with any number of threads and any instruction set.
#pragma once

#include "vocabulary.h"

namespace VENTURI_NAMESPACE {

// Logits, their weights e^((logit - most) / temperature), and their columns, in column order.
struct Candidates {
    float* logit;
    float* weight;
    int32_t* token;
    int64_t count;
    double total;  // weight of all columns, of those left out too
};

// Takes columns whose weight is at least e^-depth. Weights below e^-87 count as none.
static void collect(const float* x, int64_t columns, float most, float temperature, float depth,
                    Candidates& found) {
    const F16 top = splat(most), scale = splat(temperature), bound = splat(-depth);
    for (int i = 0; i < kLanes; ++i) found.token[i] = i;
    I16 token = words(load_bytes(found.token));
    found.count = 0;
    found.total = 0.0;
    F16 sum = zero();
    for (int64_t k = 0; k < columns; k += kLanes) {
        const F16 v = load_filled(x, k, columns, -INFINITY);
        const F16 power = div(sub(v, top), scale);
        const F16 weight = less(power, splat(-87.0f), zero(), exp(power));
        sum = add(sum, weight);
        if ((k + kLanes) % kPart == 0) {
            found.total += reduce_add(sum);
            sum = zero();
        }
        const unsigned kept = ~less_mask(power, bound) & 0xFFFF;
        if (kept) {
            store_some(found.logit + found.count, v, kept);
            store_some(found.weight + found.count, weight, kept);
            store_some(found.token + found.count, token, kept);
            found.count += __builtin_popcount(kept);
        }
        token = add(token, splat((int32_t)kLanes));
    }
    found.total += reduce_add(sum);
    // So that whole vectors may be read.
    for (int64_t i = found.count; i % kLanes; ++i) {
        found.logit[i] = -INFINITY;
        found.weight[i] = 0.0f;
    }
}

// What candidates at and above `bound` amount to, and the logits next to it.
struct Above {
    double amount;
    float least;  // at or above the bound
    float below;  // the largest under it
};

template <bool kWeights>
VENTURI_INLINE Above above(const Candidates& c, float bound) {
    const F16 limit = splat(bound);
    F16 sum = zero(), least = splat(INFINITY), below = splat(-INFINITY);
    Above found{0.0, 0.0f, 0.0f};
    for (int64_t k = 0; k < c.count; k += kLanes) {
        const F16 v = load(c.logit + k);
        const F16 amount = kWeights ? load(c.weight + k) : splat(1.0f);
        sum = add(sum, less(v, limit, zero(), amount));
        least = min(less(v, limit, splat(INFINITY), v), least);
        below = max(less(v, limit, v, splat(-INFINITY)), below);
        if ((k + kLanes) % kPart == 0) {
            found.amount += reduce_add(sum);
            sum = zero();
        }
    }
    found.amount += reduce_add(sum);
    found.least = -reduce_max(neg(least));
    found.below = reduce_max(below);
    return found;
}

// Keeps the first candidates, from the largest logit down and of equal ones from the first column
// on, until they are `goal` in number or weight: the weights of all others become 0.
template <bool kWeights>
static void cut(Candidates& c, const Extent& row, double goal) {
    float low = row.least, high = row.most;
    Above top = above<kWeights>(c, high);
    if (top.amount >= goal) {
        low = high;
        top.amount = 0.0;
    } else {
        // Candidates from `low` up reach the goal, those from `high` up do not.
        if (above<kWeights>(c, low).amount < goal) return;
        while (top.below > low) {
            float middle = low * 0.5f + high * 0.5f;
            if (!(middle > low)) middle = high;
            if (middle > top.below) middle = top.below;
            const Above found = above<kWeights>(c, middle);
            if (found.amount >= goal) {
                low = found.least;
            } else {
                high = found.least;
                top = found;
            }
        }
        low = top.below;
    }
    double left = goal - top.amount;
    const F16 limit = splat(low);
    for (int64_t k = 0; k < c.count; k += kLanes) {
        const F16 v = load(c.logit + k), weight = load(c.weight + k);
        const unsigned others = ~less_mask(limit, v) & 0xFFFF;
        if (!others) continue;
        store(c.weight + k, less(limit, v, weight, zero()));
        float before[kLanes];
        store(before, weight);
        for (unsigned equal = others & ~less_mask(v, limit); equal; equal &= equal - 1) {
            if (!(left > 0.0)) break;
            const int i = __builtin_ctz(equal);
            c.weight[k + i] = before[i];
            left -= kWeights ? (double)before[i] : 1.0;
        }
    }
}

// Drops what is less than `share` as likely as the likeliest, whose weight is 1.
VENTURI_INLINE void drop_below(Candidates& c, float share) {
    for (int64_t k = 0; k < c.count; k += kLanes) {
        const F16 weight = load(c.weight + k);
        store(c.weight + k, less(weight, splat(share), zero(), weight));
    }
}

VENTURI_INLINE double part_weight(const Candidates& c, int64_t begin) {
    F16 sum = zero();
    for (int64_t k = begin; k < begin + kPart && k < c.count; k += kLanes)
        sum = add(sum, load(c.weight + k));
    return reduce_add(sum);
}

VENTURI_INLINE double weight(const Candidates& c) {
    double sum = 0.0;
    for (int64_t k = 0; k < c.count; k += kPart) sum += part_weight(c, k);
    return sum;
}

// Inverts the cumulative distribution over columns at `point`, below the weight of all.
static int32_t at(const Candidates& c, double point) {
    double sum = 0.0;
    int32_t last = c.token[0];
    for (int64_t k = 0; k < c.count; k += kPart) {
        const double here = part_weight(c, k);
        if (sum + here <= point) {
            sum += here;
            continue;
        }
        for (int64_t i = k; i < k + kPart && i < c.count; ++i) {
            if (c.weight[i] == 0.0f) continue;
            sum += c.weight[i];
            last = c.token[i];
            if (sum > point) return last;
        }
    }
    // Rounding left the point above the sum: the last of those with a weight.
    for (int64_t i = c.count - 1; i >= 0; --i)
        if (c.weight[i] > 0.0f) return c.token[i];
    return last;
}

}  // namespace VENTURI_NAMESPACE
