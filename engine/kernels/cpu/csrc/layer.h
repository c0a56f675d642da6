// A whole decoder layer over the paged cache in one call: any mix of decode rows and prompt chunks.
//
// The layer is made of the phases that the single kernels are made of, so that its results are
// bit-equal to theirs called one by one.
#pragma once

#include "attention.h"
#include "gate.h"
#include "kv.h"
#include "linear_int4.h"
#include "linear_int8.h"
#include "norm.h"
#include "rope.h"

namespace VENTURI_NAMESPACE {

// A matrix that multiplies int8 activations. `grouped.records` null: it is `int8`.
struct Matrix {
    Int8Weights int8;
    GroupedWeights grouped;
};

// Norms without a weight do not exist. Mirrored in layer.py.
struct Layer {
    Norm attention_norm, attention_out_norm, attention_sum_norm;
    Norm mlp_norm, mlp_out_norm, mlp_sum_norm;
    Norm q_norm, k_norm;  // of each head where their columns are head_dim, else of all heads
    Matrix qkv, o, up, down;
    const float* slopes;  // see AttentionArgs, as window, scale and cap
    int64_t function;     // of gate.h
    int64_t gated;
    int64_t parallel;     // attention and MLP read the same hidden state
    int32_t heads, window;
    int32_t rope_dim;     // features of a head that are turned; 0: none
    float scale, cap;
    float qkv_clip;       // 0: none
    float residual_scale;
};

// One step of one layer.
struct LayerStep {
    const Layer* layer;
    KvPages kv;
    float* hidden;  // [T, K], changed
    const float* cosines;
    const float* sines;
    const int64_t* slots;
    const AttentionSequence* sequences;
    const int32_t* block_ids;
    uint8_t* scratch;  // layer_scratch bytes, at a multiple of 64
    int64_t scratch_bytes;
    int64_t tokens, sequence_count, threads;
};

}  // namespace VENTURI_NAMESPACE
