// The custom operators mpcompile::NMConv and NMConv2d…: a convolution over images (images, channels, height,
// width) with an N:M weight in the streams of nm_gemm.h. Column k of the weight is channel k % channels of tap k / channels.
//
// Inputs: x, and the constants values, places, common, order, bias, as of NMGemm. Attributes: those of NMGemm, and
// kernel_shape, strides, pads and dilations as of a Conv in ONNX.
//
//   NMConv           without the latter attributes: a 1x1 convolution with stride 1 of x (images, channels, ...)
//   NMConv2d         the convolution
//   NMConv2dAdd      adds the input `residual`, of the shape of the result
//   …Relu, …Relu6    then clips to [0, inf) or [0, 6]
#include <algorithm>
#include <atomic>
#include <mutex>
#include <new>
#include <thread>

#include "conv_scheduler.h"
#include "ort_custom_op.h"
#include "ort_operators.h"
#include "ort_weights.h"
#include "ort_window.h"

namespace mpcompile {
namespace {

constexpr float INFINITE = __builtin_inff();

struct ConvOp : CustomOp {
    bool windowed, adds;
    float low, high;
};

const ConvOp& conv_op(const OrtCustomOp* op) { return *static_cast<const ConvOp*>(op); }

struct Operator {
    const ConvOp& op;
    Api api;
    const Kernel* kernel;
    Weights weights{};    // its pointers are set in each call
    ConvWindow window{};  // its sizes are set in each call
    std::once_flag row_panels_made{};
    RowPanels* row_panels = nullptr;
    // The threads of the session's pool are not known. Until one thread has computed all items of several calls, two or
    // more are assumed.
    std::atomic<int> threads{2}, calls_of_one{0};

    Operator(const ConvOp& op, Api api, const Kernel* kernel) : op(op), api(api), kernel(kernel) {}
    ~Operator() { free_row_panels(row_panels); }
};

OrtStatus* set_window(Api api, const OrtKernelInfo* info, Operator& made) {
    ConvWindow& window = made.window;
    if (!made.op.windowed) {
        window = {{{1, 1}, {1, 1}, {1, 1}, {}, {}}, {}, {}, made.weights.columns};
        return nullptr;
    }
    if (OrtStatus* failed = integers_of(api, info, "kernel_shape", 2, 1, window.kernel)) return failed;
    if (OrtStatus* failed = window_of(api, info, window)) return failed;
    if (made.weights.columns % window.taps()) return refuse(api, "NMConv2d: kernel_shape does not divide the columns");
    window.channels = made.weights.columns / window.taps();
    return nullptr;
}

OrtStatus* create(const OrtCustomOp* self, Api api, const OrtKernelInfo* info, void** result) {
    const Kernel* kernels[4];
    supported_kernels(kernels);
    Operator* made = new (std::nothrow) Operator(conv_op(self), api, kernels[0]);
    if (!made) return ort::CreateStatus::call(api, ort::FAIL, "NMConv2d: out of memory");
    OrtStatus* failed = weights_of(api, info, made->weights);
    if (!failed) failed = set_window(api, info, *made);
    if (failed) {
        delete made;
        return failed;
    }
    *result = made;
    return nullptr;
}

// What the threads of ONNX Runtime's pool share during one call.
struct Call {
    const ConvScheduler& scheduler;
    std::atomic<bool> failed{false};
    std::mutex counting{};
    std::thread::id seen[16]{};
    int threads = 0;

    void count() {
        const std::lock_guard<std::mutex> locked(counting);
        const std::thread::id mine = std::this_thread::get_id();
        if (threads < 16 && std::find(seen, seen + threads, mine) == seen + threads) seen[threads++] = mine;
    }
};

void run_item(void* call, size_t item) {
    Call& mine = *static_cast<Call*>(call);
    mine.count();
    if (!mine.scheduler.run(int64_t(item))) mine.failed = true;
}

constexpr int CALLS_TO_KNOW = 4;

void learn_threads(Operator& made, const Call& call, int64_t items) {
    if (call.threads > 1)
        made.threads = std::max(made.threads.load(), call.threads);
    else if (items > 1 && made.threads == 2 && ++made.calls_of_one == CALLS_TO_KNOW)
        made.threads = 1;
}

// With few tokens: on the kernel that has output rows in its SIMD lanes. The layout for it is made at the first call
// that needs it. Returns false if the other kernel must be used.
bool run_few(Operator& made, const Weights& w, const Activations& a, bool& failed) {
    const SkinnyKernel& skinny = *made.kernel->skinny;
    if (a.window || a.tokens > skinny.most[w.rows_per_pattern]) return false;
    std::call_once(made.row_panels_made, [&] { made.row_panels = make_row_panels(w, skinny.permutes); });
    if (!made.row_panels) return false;
    const TileScheduler scheduler(*made.kernel, w, a, made.row_panels);
    for (int64_t item = 0; item < scheduler.items(); item++) failed = !scheduler.run(item) || failed;
    return true;
}

OrtStatus* run(Operator& made, OrtKernelContext* context, const Weights& w, const Activations& a) {
    const ConvScheduler scheduler(*made.kernel, w, a, made.threads);
    Call call{scheduler};
    bool failed = false;
    if (!run_few(made, w, a, failed)) {
        const size_t items = size_t(scheduler.items());
        if (OrtStatus* status = ort::ParallelFor::call(made.api, context, run_item, items, 0, &call)) return status;
        learn_threads(made, call, scheduler.items());
    }
    return failed || call.failed ? ort::CreateStatus::call(made.api, ort::FAIL, "NMConv2d: out of memory") : nullptr;
}

// Sets the sizes of the images, and those of the result in `shape`, which is the shape of x.
OrtStatus* set_sizes(const Operator& made, Shape& shape, ConvWindow& window) {
    const bool right = made.op.windowed ? shape.count == 4 : shape.count >= 3;
    if (!right || shape.sizes[1] != window.channels)
        return refuse_input(made.api, "has another number of input channels than the weights, or of axes", 0);
    shape.sizes[1] = made.weights.rows;
    if (!made.op.windowed) {
        window.in[0] = window.out[0] = 1;
        window.in[1] = window.out[1] = shape.product(2, shape.count);
        return nullptr;
    }
    for (int axis = 0; axis < 2; axis++) {
        window.in[axis] = shape.sizes[2 + axis];
        shape.sizes[2 + axis] = window.out[axis] = window.outputs(axis, window.in[axis]);
        if (!window.out[axis]) return refuse(made.api, "NMConv2d: the kernel is larger than the padded image");
    }
    return nullptr;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    Operator& made = *static_cast<Operator*>(kernel);
    const Api api = made.api;
    Weights w = made.weights;
    ConvWindow window = made.window;
    Activations a{};
    Shape shape{}, residual_shape{};
    const OrtValue *x = nullptr, *residual = nullptr;
    if (OrtStatus* failed = ort::GetInput::call(api, context, 0, &x)) return failed;
    if (OrtStatus* failed = data_of(api, x, a.x)) return failed;
    if (OrtStatus* failed = streams_of(api, context, w)) return failed;
    if (OrtStatus* failed = shape_of(api, x, shape)) return failed;
    if (OrtStatus* failed = set_sizes(made, shape, window)) return failed;
    if (made.op.adds) {
        if (OrtStatus* failed = ort::GetInput::call(api, context, WEIGHT_INPUTS, &residual)) return failed;
        if (OrtStatus* failed = shape_of(api, residual, residual_shape)) return failed;
        if (!residual_shape.is(shape.sizes, 4)) return refuse_input(api, "has another shape than y", WEIGHT_INPUTS);
        if (OrtStatus* failed = data_of(api, residual, a.residual)) return failed;
    }
    if (OrtStatus* failed = output_of(api, context, shape, a.y)) return failed;
    a.pixels = window.out[0] * window.out[1];
    a.tokens = shape.sizes[0] * a.pixels;
    a.low = made.op.low, a.high = made.op.high;
    if (!window.pointwise()) a.window = &window;
    return a.tokens ? run(made, context, w, a) : nullptr;
}

ConvOp named(const char* name, bool windowed, bool adds, float low, float high) {
    CustomOp op = weighted_op<Operator>(name, create, compute);
    if (adds) {
        op.inputs[op.input_count++] = ort::FLOAT;
        reuse_memory_of_input<WEIGHT_INPUTS>(op);
    }
    return {op, windowed, adds, low, high};
}

}  // namespace

const std::vector<const OrtCustomOp*>& conv_operators() {
    static const ConvOp ops[] = {
        named("NMConv", false, false, -INFINITE, INFINITE),  named("NMConv2d", true, false, -INFINITE, INFINITE),
        named("NMConv2dRelu", true, false, 0, INFINITE),     named("NMConv2dRelu6", true, false, 0, 6),
        named("NMConv2dAdd", true, true, -INFINITE, INFINITE), named("NMConv2dAddRelu", true, true, 0, INFINITE),
        named("NMConv2dAddRelu6", true, true, 0, 6),
    };
    static const std::vector<const OrtCustomOp*> all{&ops[0], &ops[1], &ops[2], &ops[3], &ops[4], &ops[5], &ops[6]};
    return all;
}

}  // namespace mpcompile
