// The custom operators mpcompile::LayerNormQuantize and mpcompile::…Attention…: what stands between the products of a
// transformer in 8 bits, so that no float32 tensor is written between two of them.
//
//   LayerNormQuantize          x float32 (..., columns), gamma, beta (columns); attributes epsilon, y_scale, y_zero
//   Attention                  q, k, v float32 (images, tokens, …): `heads` heads of `dim` channels each, beginning at
//                              channel q_offset, k_offset and v_offset, of `queries` tokens from first_query on, as far
//                              as q has them, and of all keys; attribute scale, of the scores. Result float32
//   AttentionQuantize          the same with a u8 result; attributes y_scale, y_zero
//   BiasedAttention…           the same with an input `bias`, added to the scores: (images or 1, heads or 1, queries or
//                              1, keys)
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "int8_kernels.h"
#include "ort_custom_op.h"
#include "ort_int8.h"
#include "ort_operators.h"
#include "ort_values.h"

namespace mpcompile {

uint8_t* scratch_bytes(size_t wanted) {
    struct Memory {
        void* bytes = nullptr;
        size_t size = 0;

        ~Memory() { free(bytes); }
    };
    static thread_local Memory memory;
    if (wanted > memory.size) {
        free(memory.bytes);
        memory.bytes = nullptr;
        memory.size = 0;
        if (posix_memalign(&memory.bytes, 64, wanted)) return nullptr;
        memory.size = wanted;
    }
    return static_cast<uint8_t*>(memory.bytes);
}

namespace {

// Found once: threads ask for them in every item of work.
const Int8Kernels& kernels() {
    static const Int8Kernels& fastest = []() -> const Int8Kernels& {
        const Int8Kernels* found[4];
        supported_int8_kernels(found);
        return *found[0];
    }();
    return fastest;
}

struct Quantisation {
    float scale = 1;
    int64_t zero = 0;
};

OrtStatus* quantisation_of(Api api, const OrtKernelInfo* info, Quantisation& found) {
    if (OrtStatus* failed = ort::GetAttributeFloat::call(api, info, "y_scale", &found.scale)) return failed;
    if (OrtStatus* failed = ort::GetAttributeInt::call(api, info, "y_zero", &found.zero)) return failed;
    if (right_quantisation(found.scale, found.zero)) return nullptr;
    return refuse(api, "mpcompile: a scale must be between 1e-38 and 1e38, and a zero point between 0 and 255");
}

// ---- LayerNormQuantize

struct NormOperator {
    Api api;
    float epsilon = 0;
    Quantisation y;
};

OrtStatus* create_norm(const OrtCustomOp*, Api api, const OrtKernelInfo* info, void** result) {
    std::unique_ptr<NormOperator> made(new (std::nothrow) NormOperator{api, 0, {}});
    if (!made) return ort::CreateStatus::call(api, ort::FAIL, "LayerNormQuantize: out of memory");
    if (OrtStatus* failed = ort::GetAttributeFloat::call(api, info, "epsilon", &made->epsilon)) return failed;
    if (!(made->epsilon >= 0 && made->epsilon < 1e38f))
        return refuse(api, "LayerNormQuantize: epsilon must be 0 or more, and finite");
    if (OrtStatus* failed = quantisation_of(api, info, made->y)) return failed;
    *result = made.release();
    return nullptr;
}

struct NormCall {
    LayerNorm norm;
    const float* x;
    uint8_t* y;
    int64_t tokens;
};

constexpr int64_t NORM_TOKENS = 16;  // of one item of work

void run_norm(void* shared, size_t item) {
    const NormCall& mine = *static_cast<const NormCall*>(shared);
    const int64_t first = int64_t(item) * NORM_TOKENS, count = std::min(NORM_TOKENS, mine.tokens - first);
    kernels().layer_norm(mine.norm, mine.x + first * mine.norm.columns, mine.y + first * mine.norm.columns, count);
}

OrtStatus* compute_norm(void* kernel, OrtKernelContext* context) {
    const NormOperator& made = *static_cast<const NormOperator*>(kernel);
    const Api api = made.api;
    const OrtValue* inputs[3];
    for (size_t i = 0; i < 3; i++)
        if (OrtStatus* failed = ort::GetInput::call(api, context, i, &inputs[i])) return failed;
    Shape shape{}, gamma{}, beta{};
    NormCall call{};
    if (OrtStatus* failed = shape_of(api, inputs[0], shape)) return failed;
    if (OrtStatus* failed = shape_of(api, inputs[1], gamma)) return failed;
    if (OrtStatus* failed = shape_of(api, inputs[2], beta)) return failed;
    if (OrtStatus* failed = data_of(api, inputs[0], call.x)) return failed;
    if (OrtStatus* failed = data_of(api, inputs[1], call.norm.gamma)) return failed;
    if (OrtStatus* failed = data_of(api, inputs[2], call.norm.beta)) return failed;
    if (!shape.count) return refuse(api, "LayerNormQuantize: x has no dimensions");
    call.norm.columns = shape.sizes[shape.count - 1];
    if (!gamma.is(&call.norm.columns, 1) || !beta.is(&call.norm.columns, 1))
        return refuse(api, "LayerNormQuantize: gamma and beta must have one value for each channel");
    call.norm.epsilon = made.epsilon;
    call.norm.inverse_scale = 1 / made.y.scale;
    call.norm.zero = float(made.y.zero);
    call.tokens = shape.product(0, shape.count - 1);
    if (OrtStatus* failed = output_of(api, context, shape, call.y)) return failed;
    if (!call.tokens || !call.norm.columns) return nullptr;
    const size_t items = size_t((call.tokens + NORM_TOKENS - 1) / NORM_TOKENS);
    return ort::ParallelFor::call(api, context, run_norm, items, 0, &call);
}

// ---- Attention

struct AttentionOp : CustomOp {
    bool biased, quantises;
};

struct AttentionOperator {
    const AttentionOp* op;
    Api api;
    int64_t heads = 0, dim = 0, offset[3] = {}, first_query = 0, queries = 0;
    float scale = 0;
    Quantisation y;
};

OrtStatus* create_attention(const OrtCustomOp* self, Api api, const OrtKernelInfo* info, void** result) {
    const auto* op = static_cast<const AttentionOp*>(self);
    std::unique_ptr<AttentionOperator> made(new (std::nothrow) AttentionOperator{op, api});
    if (!made) return ort::CreateStatus::call(api, ort::FAIL, "Attention: out of memory");
    const struct {
        const char* name;
        int64_t* value;
    } attributes[] = {{"heads", &made->heads},        {"dim", &made->dim},
                      {"q_offset", &made->offset[0]}, {"k_offset", &made->offset[1]},
                      {"v_offset", &made->offset[2]}, {"first_query", &made->first_query},
                      {"queries", &made->queries}};
    for (const auto& attribute : attributes) {
        if (OrtStatus* failed = ort::GetAttributeInt::call(api, info, attribute.name, attribute.value)) return failed;
        if (*attribute.value < 0 || *attribute.value > INT32_MAX)
            return refuse(api, "Attention: an attribute is out of range");
    }
    if (!made->heads || !made->dim || made->dim > 512)
        return refuse(api, "Attention: heads must be positive, and dim between 1 and 512");
    if (OrtStatus* failed = ort::GetAttributeFloat::call(api, info, "scale", &made->scale)) return failed;
    if (!std::isfinite(made->scale)) return refuse(api, "Attention: the scale must be finite");
    if (op->quantises)
        if (OrtStatus* failed = quantisation_of(api, info, made->y)) return failed;
    *result = made.release();
    return nullptr;
}

struct AttentionCall {
    Attention attention;
    size_t scratch;
    std::atomic<bool> failed{false};
};

void run_attention(void* shared, size_t item) {
    AttentionCall& mine = *static_cast<AttentionCall*>(shared);
    uint8_t* scratch = scratch_bytes(mine.scratch);
    if (!scratch) {
        mine.failed = true;
        return;
    }
    const int64_t heads = mine.attention.heads;
    kernels().attention.compute(mine.attention, int64_t(item) / heads, int64_t(item) % heads, scratch);
}

// Sets the strides of the bias; false if it does not fit the scores.
bool set_bias(Attention& a, const Shape& bias) {
    const int64_t wanted[4] = {a.images, a.heads, a.queries, a.keys};
    if (bias.count > 4) return false;
    int64_t sizes[4] = {1, 1, 1, 1};
    for (size_t i = 0; i < bias.count; i++) sizes[4 - bias.count + i] = bias.sizes[i];
    if (sizes[3] != a.keys) return false;
    for (size_t i = 0; i < 3; i++)
        if (sizes[i] != 1 && sizes[i] != wanted[i]) return false;
    a.bias_query_stride = sizes[2] == 1 ? 0 : a.keys;
    a.bias_head_stride = sizes[1] == 1 ? 0 : sizes[2] * a.keys;
    a.bias_image_stride = sizes[0] == 1 ? 0 : sizes[1] * sizes[2] * a.keys;
    return true;
}

OrtStatus* compute_attention(void* kernel, OrtKernelContext* context) {
    const AttentionOperator& made = *static_cast<const AttentionOperator*>(kernel);
    const Api api = made.api;
    AttentionCall call{};
    Attention& a = call.attention;
    Shape shapes[3];
    for (size_t i = 0; i < 3; i++) {
        const OrtValue* value = nullptr;
        Heads& heads = i == 0 ? a.q : i == 1 ? a.k : a.v;
        if (OrtStatus* failed = ort::GetInput::call(api, context, i, &value)) return failed;
        if (OrtStatus* failed = data_of(api, value, heads.values)) return failed;
        if (OrtStatus* failed = shape_of(api, value, shapes[i])) return failed;
        if (shapes[i].count != 3 || shapes[i].sizes[0] != shapes[0].sizes[0] ||
            shapes[i].sizes[2] < made.offset[i] + made.heads * made.dim ||
            (i == 2 && shapes[2].sizes[1] != shapes[1].sizes[1]))
            return refuse(api, "Attention: q, k and v must be (images, tokens, channels), and hold all heads");
        heads.values += made.offset[i];
        heads.token_stride = shapes[i].sizes[2];
        heads.image_stride = shapes[i].sizes[1] * shapes[i].sizes[2];
    }
    a.images = shapes[0].sizes[0];
    if (made.first_query > shapes[0].sizes[1]) return refuse(api, "Attention: first_query is beyond the tokens of q");
    a.queries = std::min(made.queries, shapes[0].sizes[1] - made.first_query);
    a.q.values += made.first_query * a.q.token_stride;
    a.keys = shapes[1].sizes[1];
    a.heads = made.heads;
    a.dim = made.dim;
    a.scale = made.scale;
    if (made.op->biased) {
        const OrtValue* value = nullptr;
        Shape bias{};
        if (OrtStatus* failed = ort::GetInput::call(api, context, 3, &value)) return failed;
        if (OrtStatus* failed = shape_of(api, value, bias)) return failed;
        if (!set_bias(a, bias)) return refuse(api, "Attention: the bias does not fit (images, heads, queries, keys)");
        if (OrtStatus* failed = data_of(api, value, a.bias)) return failed;
    }
    a.inverse_scale = 1 / made.y.scale;
    a.zero = float(made.y.zero);
    Shape shape{{a.images, a.queries, a.heads * a.dim}, 3};
    if (OrtStatus* failed =
            made.op->quantises ? output_of(api, context, shape, a.bytes) : output_of(api, context, shape, a.floats))
        return failed;
    if (!a.images || !a.queries) return nullptr;
    if (!a.keys) return refuse(api, "Attention: there are no keys");
    call.scratch = kernels().attention.scratch_bytes(a);
    const size_t items = size_t(a.images * a.heads);
    if (OrtStatus* failed = ort::ParallelFor::call(api, context, run_attention, items, 0, &call)) return failed;
    return call.failed ? ort::CreateStatus::call(api, ort::FAIL, "Attention: out of memory") : nullptr;
}

AttentionOp attention_op(const char* name, bool biased, bool quantises) {
    CustomOp op = custom_op<AttentionOperator>(name, {ort::FLOAT, ort::FLOAT, ort::FLOAT},
                                               quantises ? ort::UINT8 : ort::FLOAT, create_attention,
                                               compute_attention);
    if (biased) op.inputs[op.input_count++] = ort::FLOAT;
    return {op, biased, quantises};
}

}  // namespace

const std::vector<const OrtCustomOp*>& int8_fusion_operators() {
    static const CustomOp norm = custom_op<NormOperator>("LayerNormQuantize", {ort::FLOAT, ort::FLOAT, ort::FLOAT},
                                                         ort::UINT8, create_norm, compute_norm);
    static const AttentionOp attention[] = {
        attention_op("Attention", false, false),
        attention_op("AttentionQuantize", false, true),
        attention_op("BiasedAttention", true, false),
        attention_op("BiasedAttentionQuantize", true, true),
    };
    static const std::vector<const OrtCustomOp*> all{&norm, &attention[0], &attention[1], &attention[2], &attention[3]};
    return all;
}

}  // namespace mpcompile
