// The table of functions by which ONNX Runtime knows a custom operator.
#pragma once
#include <stddef.h>

#include <algorithm>
#include <initializer_list>

#include "ort_c_api.h"

namespace mpcompile {

constexpr size_t MOST_INPUTS = 8;

// A custom operator of the CPU with one output. An operator with settings of its own derives from it.
struct CustomOp : OrtCustomOp {
    const char* name;
    ort::ElementType inputs[MOST_INPUTS];
    size_t input_count;
    ort::ElementType output;
};

// Returns the operator whose kernels `create` makes, of the type Kernel. `inputs` and `output` are their element types.
template <typename Kernel>
CustomOp custom_op(const char* name, std::initializer_list<ort::ElementType> inputs, ort::ElementType output,
                   decltype(OrtCustomOp::CreateKernelV2) create, decltype(OrtCustomOp::KernelComputeV2) compute) {
    CustomOp op{};
    op.version = ort::CUSTOM_OP_VERSION;
    op.GetName = [](const OrtCustomOp* self) { return static_cast<const CustomOp*>(self)->name; };
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    op.GetInputType = [](const OrtCustomOp* self, size_t input) {
        return int(static_cast<const CustomOp*>(self)->inputs[input]);
    };
    op.GetInputTypeCount = [](const OrtCustomOp* self) { return static_cast<const CustomOp*>(self)->input_count; };
    op.GetOutputType = [](const OrtCustomOp* self, size_t) { return int(static_cast<const CustomOp*>(self)->output); };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    op.name = name;
    std::copy(inputs.begin(), inputs.end(), op.inputs);
    op.input_count = inputs.size();
    op.output = output;
    return op;
}

// Lets ONNX Runtime give the result the memory of input INPUT, of the same type and shape. Every value of it must be
// read before it is overwritten.
template <int INPUT>
void reuse_memory_of_input(CustomOp& op) {
    op.GetMayInplace = [](int** inputs, int** outputs) {
        static int input = INPUT, output = 0;
        *inputs = &input, *outputs = &output;
        return size_t(1);
    };
    op.ReleaseMayInplace = [](int*, int*) {};
}

}  // namespace mpcompile
