// The part of ONNX Runtime's C API that the operator uses.
//
// Its wheel has no header. The function table and OrtCustomOp only ever grow at their end, so the functions that are
// used are declared here by their index. The newest of them came with version 18 of the API (ONNX Runtime 1.18).
// mpcompile.runtimes.native tests all this in a separate process before a model relies on it.
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

// The fields up to version 18; ONNX Runtime ignores later ones if `version` is 18.
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
    OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, void*);
    int (*GetStartVersion)(const OrtCustomOp*);
    int (*GetEndVersion)(const OrtCustomOp*);
    // Output (*outputs)[i] may have the memory of input (*inputs)[i], if nothing else reads that input. Returns the number
    // of such pairs.
    size_t (*GetMayInplace)(int** inputs, int** outputs);
    void (*ReleaseMayInplace)(int* inputs, int* outputs);
    const void* later[16];
};
}

namespace mpcompile::ort {

constexpr uint32_t API_VERSION = 17, CUSTOM_OP_VERSION = 18;
enum ElementType { FLOAT = 1, UINT8 = 2, INT8 = 3, UINT16 = 4, INT32 = 6 };
enum ErrorCode { FAIL = 1, INVALID_ARGUMENT = 2, INVALID_GRAPH = 10 };

template <int INDEX, typename Signature>
struct Function;

template <int INDEX, typename Result, typename... Arguments>
struct Function<INDEX, Result(Arguments...)> {
    static Result call(const void* const* api, Arguments... arguments) {
        return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(api[INDEX]))(arguments...);
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
using GetAttributeFloat = Function<85, OrtStatus*(const OrtKernelInfo*, const char*, float*)>;
using GetAttributeInt = Function<86, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*)>;
using GetAttributeInts = Function<163, OrtStatus*(const OrtKernelInfo*, const char*, int64_t*, size_t* count)>;
using GetInput = Function<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using GetOutput = Function<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>;
using ReleaseStatus = Function<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Function<99, void(OrtTensorTypeAndShapeInfo*)>;
using GetConstantInput = Function<249, OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>;
using ParallelFor =
    Function<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t total, size_t batches, void*)>;

}  // namespace mpcompile::ort
