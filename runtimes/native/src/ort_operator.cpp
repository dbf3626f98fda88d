// The custom operator mpcompile::NMGemm of ONNX Runtime: y = x W^T + bias, where W is N:M in the streams of nm_gemm.h.
//
// Inputs: x (..., columns), and the constants values, places, common, order, bias. Attributes: rows, columns, share,
// block, chunk.
// Pruned weights are not in the streams and not multiplied: unlike a dense product, 0 * inf and 0 * NaN do not occur.
#include <atomic>
#include <mutex>
#include <new>

#include "ort_operators.h"
#include "ort_values.h"
#include "ort_weights.h"
#include "tile_scheduler.h"

namespace mpcompile {
namespace {

struct Operator {
    Api api;
    const Kernel* kernel;
    Weights weights;  // its pointers are set in each call
    std::once_flag row_panels_made;
    RowPanels* row_panels = nullptr;

    ~Operator() { free_row_panels(row_panels); }
};

// The layout for few tokens, made at the first call that needs it; null if the other layout is as fast, or if there is
// no memory for a second one.
const RowPanels* row_panels_for(Operator& op, const Weights& w, int64_t tokens) {
    const SkinnyKernel& skinny = *op.kernel->skinny;
    if (tokens > skinny.most[w.rows_per_pattern]) return nullptr;
    std::call_once(op.row_panels_made, [&] { op.row_panels = make_row_panels(w, skinny.permutes); });
    return op.row_panels;
}

OrtStatus* create(const OrtCustomOp*, Api api, const OrtKernelInfo* info, void** made) {
    const Kernel* kernels[4];
    supported_kernels(kernels);
    Operator* op = new (std::nothrow) Operator{api, kernels[0], {}, {}};
    if (!op) return ort::CreateStatus::call(api, ort::FAIL, "NMGemm: out of memory");
    if (OrtStatus* failed = weights_of(api, info, op->weights)) {
        delete op;
        return failed;
    }
    *made = op;
    return nullptr;
}

// What the threads of ONNX Runtime's pool share during one call.
struct Call {
    const TileScheduler& scheduler;
    std::atomic<bool> failed{false};
};

void run_item(void* call, size_t item) {
    Call& mine = *static_cast<Call*>(call);
    if (!mine.scheduler.run(int64_t(item))) mine.failed = true;
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    Operator& op = *static_cast<Operator*>(kernel);
    Weights w = op.weights;
    const OrtValue* x = nullptr;
    if (OrtStatus* failed = ort::GetInput::call(op.api, context, 0, &x)) return failed;
    Activations a{};
    if (OrtStatus* failed = data_of(op.api, x, a.x)) return failed;
    if (OrtStatus* failed = streams_of(op.api, context, w)) return failed;
    Shape shape{};
    if (OrtStatus* failed = shape_of(op.api, x, shape)) return failed;
    const size_t axis = shape.count - 1;
    if (shape.count < 1 || shape.sizes[axis] != w.columns)
        return refuse_input(op.api, "has another number of input channels than the weights", 0);
    a.tokens = shape.product(0, axis);
    shape.sizes[axis] = w.rows;
    if (OrtStatus* failed = output_of(op.api, context, shape, a.y)) return failed;
    if (a.tokens == 0) return nullptr;
    const TileScheduler scheduler(*op.kernel, w, a, row_panels_for(op, w, a.tokens));
    Call call{scheduler};
    OrtStatus* failed = ort::ParallelFor::call(op.api, context, run_item, size_t(scheduler.items()), 0, &call);
    if (failed) return failed;
    return call.failed ? ort::CreateStatus::call(op.api, ort::FAIL, "NMGemm: out of memory") : nullptr;
}

}  // namespace

const std::vector<const OrtCustomOp*>& float_operators() {
    static const CustomOp gemm = weighted_op<Operator>("NMGemm", create, compute);
    static const std::vector<const OrtCustomOp*> all{&gemm};
    return all;
}

}  // namespace mpcompile
