// The weights of the float32 operators: the inputs values, places, common, order and bias, and the attributes rows,
// columns, share, block and chunk.
#pragma once
#include "nm_gemm.h"
#include "ort_c_api.h"
#include "ort_custom_op.h"
#include "ort_values.h"

namespace mpcompile {

constexpr size_t WEIGHT_INPUTS = 6;  // with x, the first

// A status: the input of this number, or the residual after them, `what`.
OrtStatus* refuse_input(Api api, const char* what, size_t input);

// Reads and validates the weights, once, when the session is created. The pointers are left to `streams_of`.
OrtStatus* weights_of(Api api, const OrtKernelInfo* info, Weights& weights);

// Sets the pointers for one call.
OrtStatus* streams_of(Api api, const OrtKernelContext* context, Weights& weights);

// Returns an operator whose inputs are x and the weights.
template <typename Kernel>
CustomOp weighted_op(const char* name, decltype(OrtCustomOp::CreateKernelV2) create,
                     decltype(OrtCustomOp::KernelComputeV2) compute) {
    return custom_op<Kernel>(name, {ort::FLOAT, ort::FLOAT, ort::UINT16, ort::UINT16, ort::INT32, ort::FLOAT},
                             ort::FLOAT, create, compute);
}

}  // namespace mpcompile
