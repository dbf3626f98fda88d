// What the int8 operators share.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "ort_c_api.h"

namespace mpcompile {

constexpr int64_t MOST_COLUMNS = 65536;  // 65,536 * 255 * 127 < 2^31: sums stay inside 32 bits

// Below 1e-38, 1 / scale would be infinite.
inline bool right_quantisation(float scale, int64_t zero) {
    return scale >= 1e-38f && scale < 1e38f && zero >= 0 && zero <= 255;
}

inline OrtStatus* refuse(const void* const* api, const char* what) {
    return ort::CreateStatus::call(api, ort::INVALID_GRAPH, what);
}

// Memory of the calling thread, aligned to 64 bytes, that is kept for later calls; null if there is none left.
uint8_t* scratch_bytes(size_t wanted);

// A custom operator of the CPU with one output. Its name, types and number of inputs are left to be set.
inline OrtCustomOp custom_op(OrtStatus* (*create)(const OrtCustomOp*, const void* const*, const OrtKernelInfo*, void**),
                             OrtStatus* (*compute)(void*, OrtKernelContext*), void (*destroy)(void*)) {
    OrtCustomOp op{};
    op.version = ort::CUSTOM_OP_VERSION;
    op.GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
    op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t(1); };
    op.KernelDestroy = destroy;
    op.GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    op.GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    op.GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    op.CreateKernelV2 = create;
    op.KernelComputeV2 = compute;
    return op;
}

}  // namespace mpcompile
