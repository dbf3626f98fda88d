// All custom operators of the library, for the function that registers them.
#pragma once
#include <vector>

#include "ort_c_api.h"

namespace mpcompile {

const std::vector<const OrtCustomOp*>& float_operators();        // ort_operator.cpp
const std::vector<const OrtCustomOp*>& conv_operators();         // ort_conv.cpp
const std::vector<const OrtCustomOp*>& int8_gemm_operators();    // ort_int8_gemm.cpp
const std::vector<const OrtCustomOp*>& int8_conv_operators();    // ort_int8_conv.cpp
const std::vector<const OrtCustomOp*>& int8_pool_operators();    // ort_int8_pool.cpp
const std::vector<const OrtCustomOp*>& int8_fusion_operators();  // ort_int8_fusions.cpp

}  // namespace mpcompile
