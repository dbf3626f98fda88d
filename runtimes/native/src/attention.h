// The interface of the attention kernel: softmax(q k^T * scale + bias) v for several heads, in one pass per head.
#pragma once
#include <stddef.h>
#include <stdint.h>

namespace mpcompile {

// A matrix [images][tokens][heads * dim] inside a larger one.
struct Heads {
    const float* values;
    int64_t image_stride, token_stride;  // in floats
};

struct Attention {
    Heads q, k, v;
    int64_t images, queries, keys, heads, dim;
    float scale;        // of q k^T
    const float* bias;  // added to the scores of a head, in its last dimension [keys]; or null
    int64_t bias_image_stride, bias_head_stride, bias_query_stride;
    float* floats;              // [images][queries][heads * dim]; or null
    uint8_t* bytes;             // the same, quantised; or null
    float inverse_scale, zero;  // of `bytes`
};

struct AttentionKernel {
    // Bytes of scratch memory, aligned to 64, that a call needs.
    size_t (*scratch_bytes)(const Attention&);
    // Computes one head of one image.
    void (*compute)(const Attention&, int64_t image, int64_t head, uint8_t* scratch);
};

}  // namespace mpcompile
