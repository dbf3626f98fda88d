// The part of ONNX Runtime's C interface that the operator uses.
//
// Its wheel ships no header. The table of functions only ever grows at its end, and the layout of OrtCustomOp too, so
// the few places used are declared here by number; GetApi(17) is the version in which the last of them came
// (ONNX Runtime 1.17). mpcompile.runtimes.native tries all of this in a process of its own before a model relies on it.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" {
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;

struct OrtApiBase {
    const void* const* (*GetApi)(uint32_t version);
    const char* (*GetVersionString)();
};

// Up to what version 16 brought; what came later is not looked at where `version` says 16.
struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp*, const void* const* api, const OrtKernelInfo*);
    const char* (*GetName)(const OrtCustomOp*);
    const char* (*GetExecutionProviderType)(const OrtCustomOp*);
    int (*GetInputType)(const OrtCustomOp*, size_t);
    size_t (*GetInputTypeCount)(const OrtCustomOp*);
    int (*GetOutputType)(const OrtCustomOp*, size_t);
    size_t (*GetOutputTypeCount)(const OrtCustomOp*);
    void (*KernelCompute)(void* kernel, OrtKernelContext*);
    void (*KernelDestroy)(void* kernel);
    int (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
    int (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
    int (*GetInputMemoryType)(const OrtCustomOp*, size_t);
    int (*GetVariadicInputMinArity)(const OrtCustomOp*);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const void* const* api, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
    const void* later[16];
};
}

namespace mpcompile::ort {

constexpr uint32_t API_VERSION = 17, CUSTOM_OP_VERSION = 16;
enum ElementType { FLOAT = 1, UINT16 = 4, INT32 = 6 };
enum ErrorCode { FAIL = 1, INVALID_ARGUMENT = 2, INVALID_GRAPH = 10 };

template <int PLACE, typename Signature>
struct Function;

template <int PLACE, typename Result, typename... Arguments>
struct Function<PLACE, Result(Arguments...)> {
    static Result call(const void* const* api, Arguments... arguments) {
        return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api[PLACE]))(arguments...);
    }
};

using CreateStatus = Function<0, OrtStatus*(ErrorCode, const char*)>;
using CreateCustomOpDomain = Function<26, OrtStatus*(const char*, OrtCustomOpDomain**)>;
using CustomOpDomainAdd = Function<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Function<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Function<51, OrtStatus*(OrtValue*, void**)>;
using GetDimensionsCount = Function<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;
using GetDimensions = Function<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>;
using GetTensorTypeAndShape = Function<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>;
using GetAttributeInt = Function<86, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>;
using GetInput = Function<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using GetOutput = Function<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>;
using ReleaseStatus = Function<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Function<99, void(OrtTensorTypeAndShapeInfo*)>;
using GetConstantInput = Function<249, OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>;
using ParallelFor =
    Function<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t total, size_t batches, void*)>;

}  // namespace mpcompile::ort
