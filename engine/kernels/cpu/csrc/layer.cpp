#include "layer.h"

namespace VENTURI_NAMESPACE {

// What a step keeps between phases; sizes and places are worked out in one function.
struct Buffers {
    float* qkv;       // [T, W]
    float* attended;  // [T, heads * head_dim]
    float* branch;    // [T, K]: what attention, or the MLP, adds
    float* second;    // [T, K]: the MLP's where both are parallel
    float* gates;     // [T, gates and values]
    int8_t* q;        // of the activations that are multiplied next
    float* scale;
    int32_t* sums;
    uint8_t* expanded;  // see `linear_int8`
    uint8_t* attention;
};

static int64_t outs(const Matrix& m) { return m.grouped.records ? m.grouped.outs : m.int8.outs; }
static int64_t ins(const Matrix& m) {
    return m.grouped.records ? m.grouped.columns : m.int8.columns;
}
static int64_t group(const Matrix& m) { return m.grouped.records ? m.grouped.group : 0; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static AttentionArgs attention_args(const LayerStep& s, const Buffers& b) {
    const Layer& l = *s.layer;
    const int64_t inner = (int64_t)l.heads * s.kv.head_dim;
    AttentionArgs args{};
    args.kv = s.kv;
    args.q = b.qkv;
    args.out = b.attended;
    args.sequences = s.sequences;
    args.block_ids = s.block_ids;
    args.slopes = l.slopes;
    args.scratch = b.attention;
    args.q_stride = outs(l.qkv);
    args.out_stride = inner;
    args.sequence_count = s.sequence_count;
    args.threads = s.threads;
    args.heads = l.heads;
    args.window = l.window;
    args.scale = l.scale;
    args.cap = l.cap;
    return args;
}

// Lays the buffers out from `base` on; returns the bytes that they take.
static int64_t lay_out(const LayerStep& s, uint8_t* base, Buffers& b) {
    const Layer& l = *s.layer;
    const Matrix* const all[] = {&l.qkv, &l.o, &l.up, &l.down};
    int64_t width = 0, parts = 1, expanded = 0, used = 0;
    for (const Matrix* m : all) {
        width = most(width, padded(ins(*m), group(*m)));
        if (!m->grouped.records) expanded = most(expanded, expanded_bytes(m->int8));
        if (group(*m)) parts = most(parts, ceil_div(ins(*m), group(*m)));
    }
    const auto take = [&](int64_t bytes) {
        uint8_t* const at = base + used;
        used += ceil_div(bytes, 64) * 64;
        return at;
    };
    const int64_t floats = s.tokens * (int64_t)sizeof(float);
    b.qkv = (float*)take(floats * outs(l.qkv));
    b.attended = (float*)take(floats * ins(l.o));
    b.branch = (float*)take(floats * outs(l.o));
    b.second = l.parallel ? (float*)take(floats * outs(l.down)) : b.branch;
    b.gates = (float*)take(floats * outs(l.up));
    b.q = (int8_t*)take(s.tokens * width);
    b.scale = (float*)take(floats);
    b.sums = (int32_t*)take(floats * parts);
    b.expanded = take(s.threads * expanded);
    b.attention = take(attention_scratch(attention_args(s, b)));
    return used;
}

static Activations activations(const LayerStep& s, const Buffers& b, const Matrix& m) {
    return {b.q, b.scale, b.sums, s.tokens, ins(m), group(m)};
}

static void multiply(const LayerStep& s, const Buffers& b, const Matrix& m, float* out,
                     const Team& team) {
    const Activations a = activations(s, b, m);
    if (m.grouped.records) linear_int4(m.grouped, a, out, outs(m), team);
    else linear_int8(m.int8, a, out, outs(m), b.expanded, team);
    team.barrier();
}

// Quantises the rows of x, normed where there is a norm, for the matrix that comes next.
static void enter(const LayerStep& s, const Buffers& b, const Norm& norm, const float* x,
                  const Matrix& m, const Team& team) {
    const Activations a = activations(s, b, m);
    if (norm.weight) norm_quantize(norm, x, a, team.thread, team.threads);
    else quantize(x, a, team.thread, team.threads);
    team.barrier();
}

static void norm_in_place(const Norm& norm, float* row) {
    if (norm.weight) norm_rows(norm, row, row, 1, 0, 1);
}

// hidden = sum norm(hidden + scale * out norm(branch)). The rows of a thread are those that it
// quantises next, so that no barrier follows.
static void leave(const LayerStep& s, float* branch, const Norm& out_norm, const Norm& sum_norm,
                  const Team& team) {
    const Layer& l = *s.layer;
    const int64_t columns = outs(l.o);
    const Range rows = part(s.tokens, team.thread, team.threads);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        float* const h = s.hidden + row * columns;
        float* const x = branch + row * columns;
        norm_in_place(out_norm, x);
        for (int64_t k = 0; k < columns; k += kLanes) {
            const int rest = (int)(columns - k < kLanes ? columns - k : kLanes);
            F16 v = load_part(x + k, rest);
            if (l.residual_scale != 1.0f) v = mul(v, splat(l.residual_scale));
            store_part(h + k, add(load_part(h + k, rest), v), rest);
        }
        norm_in_place(sum_norm, h);
    }
}

static void clip(float* x, int64_t count, float bound) {
    for (int64_t k = 0; k < count; k += kLanes) {
        const int rest = (int)(count - k < kLanes ? count - k : kLanes);
        // This order keeps NaN.
        const F16 v = max(splat(-bound), min(splat(bound), load_part(x + k, rest)));
        store_part(x + k, v, rest);
    }
}

// What some families do to q, k and v before their positions are known, by rows.
static void condition(const LayerStep& s, const Buffers& b, const Team& team) {
    const Layer& l = *s.layer;
    if (!l.q_norm.weight && l.qkv_clip == 0.0f) return;
    const int64_t width = outs(l.qkv), q = (int64_t)l.heads * s.kv.head_dim;
    const int64_t k = (int64_t)s.kv.kv_heads * s.kv.head_dim;
    const Range rows = part(s.tokens, team.thread, team.threads);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        float* const x = b.qkv + row * width;
        if (l.qkv_clip != 0.0f) clip(x, width, l.qkv_clip);
        if (!l.q_norm.weight) continue;
        norm_rows(l.q_norm, x, x, q / l.q_norm.columns, 0, 1);
        norm_rows(l.k_norm, x + q, x + q, k / l.k_norm.columns, 0, 1);
    }
    team.barrier();
}

// Turns queries and keys and writes keys and values into the pages.
static void place(const LayerStep& s, const Buffers& b, const Team& team) {
    const Layer& l = *s.layer;
    const int64_t width = outs(l.qkv), dim = s.kv.head_dim;
    float* const k = b.qkv + l.heads * dim;
    float* const v = k + s.kv.kv_heads * dim;
    if (l.rope_dim) {
        RopeArgs turn{b.qkv, s.cosines, s.sines, width, s.tokens, l.heads, s.kv.head_dim, l.rope_dim};
        rope(turn, team.thread, team.threads);
        turn.x = k;
        turn.heads = s.kv.kv_heads;
        rope(turn, team.thread, team.threads);  // the same heads' keys as are written next
    }
    const KvWriteArgs write{s.kv, k, v, s.slots, width, width, s.tokens};
    kv_write(write, team.thread, team.threads);
    team.barrier();
}

static void attention(const LayerStep& s, const Buffers& b, const Team& team) {
    const Layer& l = *s.layer;
    enter(s, b, l.attention_norm, s.hidden, l.qkv, team);
    multiply(s, b, l.qkv, b.qkv, team);
    condition(s, b, team);
    place(s, b, team);
    const AttentionArgs args = attention_args(s, b);
    attention_chunks(args, team.thread, team.threads);
    team.barrier();
    attention_merge(args, team.thread, team.threads);
    team.barrier();
    enter(s, b, Norm{}, b.attended, l.o, team);
    multiply(s, b, l.o, b.branch, team);
}

static void mlp(const LayerStep& s, const Buffers& b, const Team& team) {
    const Layer& l = *s.layer;
    enter(s, b, l.mlp_norm, s.hidden, l.up, team);
    multiply(s, b, l.up, b.gates, team);
    activate_quantize((Function)l.function, l.gated, b.gates, activations(s, b, l.down),
                      team.thread, team.threads);
    team.barrier();
    multiply(s, b, l.down, b.second, team);
}

static void layer(const LayerStep& s, const Buffers& b, const Team& team) {
    const Layer& l = *s.layer;
    attention(s, b, team);
    if (!l.parallel) leave(s, b.branch, l.attention_out_norm, l.attention_sum_norm, team);
    mlp(s, b, team);
    if (l.parallel) leave(s, b.branch, Norm{}, Norm{}, team);
    leave(s, b.second, l.mlp_out_norm, l.mlp_sum_norm, team);
}

}  // namespace VENTURI_NAMESPACE

using namespace VENTURI_NAMESPACE;

VENTURI_EXPORT(venturi_layer_scratch)(LayerStep* step) {
    Buffers unused;
    step->scratch_bytes = lay_out(*step, nullptr, unused);
}

VENTURI_EXPORT(venturi_layer)(const LayerStep* step) {
    Buffers buffers;
    lay_out(*step, step->scratch, buffers);
    run_team((int)step->threads,
             [&](const Team& team) { layer(*step, buffers, team); });
}
