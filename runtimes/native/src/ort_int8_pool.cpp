// The custom operator mpcompile::MaxPoolInt8: the largest byte of each window and channel, with the channels last.
//
// Input: x u8 (images, height, width, channels). Attributes: kernel_shape, strides, dilations and pads as those of a
// MaxPool. Padding does not take part.
#include <memory>
#include <new>
#include <vector>

#include "int8_conv.h"
#include "ort_custom_op.h"
#include "ort_int8.h"
#include "ort_operators.h"
#include "ort_values.h"
#include "ort_window.h"

namespace mpcompile {
namespace {

struct Operator {
    Api api;
    Window window;
};

OrtStatus* create(const OrtCustomOp*, Api api, const OrtKernelInfo* info, void** result) {
    std::unique_ptr<Operator> made(new (std::nothrow) Operator{api, {}});
    if (!made) return ort::CreateStatus::call(api, ort::FAIL, "MaxPoolInt8: out of memory");
    if (OrtStatus* failed = window_of(api, info, made->window)) return failed;
    if (OrtStatus* failed = integers_of(api, info, "kernel_shape", 2, 1, made->window.kernel)) return failed;
    *result = made.release();
    return nullptr;
}

struct Call {
    const Window& window;
    ConvInput input;
    uint8_t* y;
};

// One row of outputs of an image.
void run_row(void* shared, size_t item) {
    const Call& mine = *static_cast<const Call*>(shared);
    const Window& window = mine.window;
    const ConvInput& in = mine.input;
    const int64_t image = int64_t(item) / in.out_height, row = int64_t(item) % in.out_height, channels = in.channels;
    uint8_t* y = mine.y + int64_t(item) * in.out_width * channels;
    memset(y, 0, size_t(in.out_width * channels));
    for (int64_t column = 0; column < in.out_width; column++, y += channels)
        for (int64_t ky = 0; ky < window.kernel[0]; ky++) {
            const int64_t at_y = row * window.stride[0] - window.before[0] + ky * window.dilation[0];
            if (at_y < 0 || at_y >= in.height) continue;
            for (int64_t kx = 0; kx < window.kernel[1]; kx++) {
                const int64_t at_x = column * window.stride[1] - window.before[1] + kx * window.dilation[1];
                if (at_x < 0 || at_x >= in.width) continue;
                const uint8_t* x = in.x + ((image * in.height + at_y) * in.width + at_x) * channels;
                for (int64_t c = 0; c < channels; c++) y[c] = std::max(y[c], x[c]);
            }
        }
}

OrtStatus* compute(void* kernel, OrtKernelContext* context) {
    const Operator& made = *static_cast<const Operator*>(kernel);
    const Api api = made.api;
    const OrtValue* x = nullptr;
    Shape shape{};
    Call call{made.window, {}, nullptr};
    ConvInput& input = call.input;
    if (OrtStatus* failed = ort::GetInput::call(api, context, 0, &x)) return failed;
    if (OrtStatus* failed = data_of(api, x, input.x)) return failed;
    if (OrtStatus* failed = shape_of(api, x, shape)) return failed;
    if (shape.count != 4) return refuse(api, "MaxPoolInt8: x must be (images, height, width, channels)");
    input.height = shape.sizes[1];
    input.width = shape.sizes[2];
    input.channels = shape.sizes[3];
    input.out_height = shape.sizes[1] = made.window.outputs(0, input.height);
    input.out_width = shape.sizes[2] = made.window.outputs(1, input.width);
    if (input.out_height <= 0 || input.out_width <= 0) return refuse(api, "MaxPoolInt8: the image is too small");
    if (OrtStatus* failed = output_of(api, context, shape, call.y)) return failed;
    const size_t rows = size_t(shape.sizes[0] * input.out_height);
    return rows ? ort::ParallelFor::call(api, context, run_row, rows, 0, &call) : nullptr;
}

}  // namespace

const std::vector<const OrtCustomOp*>& int8_pool_operators() {
    static const CustomOp pool = custom_op<Operator>("MaxPoolInt8", {ort::UINT8}, ort::UINT8, create, compute);
    static const std::vector<const OrtCustomOp*> all{&pool};
    return all;
}

}  // namespace mpcompile
