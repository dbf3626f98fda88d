// The kernels of the int8 operators for one instruction set.
#pragma once
#include "attention.h"
#include "int8_gemm.h"
#include "layer_norm.h"

namespace mpcompile {

struct Int8Kernels {
    const char* name;
    Int8Kernel gemm;
    AttentionKernel attention;
    LayerNormKernel layer_norm;
};

extern const Int8Kernels int8_baseline;

// The kernels that this processor can run, fastest first, ending with int8_baseline; returns their number.
int supported_int8_kernels(const Int8Kernels* (&found)[4]);

}  // namespace mpcompile
