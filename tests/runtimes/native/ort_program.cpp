// Runs an ONNX model with our operators in ONNX Runtime's C API, where there is no Python: the shared library of ONNX
// Runtime is linked, and its functions are declared by their index as in ort_c_api.h.
//
//     ort_program MODEL ROWS COLUMNS NAME INPUT OUTPUT
//
// INPUT holds ROWS x COLUMNS floats for the input `x`; the floats of the output NAME are written to OUTPUT.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <vector>

#include "ort_c_api.h"

struct OrtEnv;
struct OrtSession;
struct OrtMemoryInfo;
struct OrtRunOptions;
extern "C" const OrtApiBase* OrtGetApiBase();
extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*);

using namespace mpcompile::ort;

namespace {

using GetErrorMessage = Function<2, const char*(const OrtStatus*)>;
using CreateEnv = Function<3, OrtStatus*(int level, const char* name, OrtEnv**)>;
using CreateSession = Function<7, OrtStatus*(const OrtEnv*, const char* file, const OrtSessionOptions*, OrtSession**)>;
using Run = Function<9, OrtStatus*(OrtSession*, const OrtRunOptions*, const char* const* inputs, const OrtValue* const*,
                                   size_t, const char* const* outputs, size_t, OrtValue**)>;
using CreateSessionOptions = Function<10, OrtStatus*(OrtSessionOptions**)>;
using SetIntraOpNumThreads = Function<24, OrtStatus*(OrtSessionOptions*, int)>;
using CreateTensorWithData = Function<49, OrtStatus*(const OrtMemoryInfo*, void*, size_t bytes, const int64_t* shape,
                                                     size_t, ElementType, OrtValue**)>;
using GetTensorShapeElementCount = Function<64, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;
using CreateCpuMemoryInfo = Function<69, OrtStatus*(int allocator, int type, OrtMemoryInfo**)>;

const void* const* api;

void check(OrtStatus* status) {
    if (!status) return;
    std::printf("%s\n", GetErrorMessage::call(api, status));
    std::exit(1);
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 7) return 2;
    const OrtApiBase* base = OrtGetApiBase();
    api = base->GetApi(API_VERSION);
    const int64_t shape[] = {std::atoi(arguments[2]), std::atoi(arguments[3])};
    std::vector<float> x(size_t(shape[0] * shape[1]));
    const long bytes = long(x.size() * sizeof(float));
    std::ifstream(arguments[5], std::ios::binary).read(reinterpret_cast<char*>(x.data()), bytes);
    OrtEnv* environment;
    OrtSessionOptions* options;
    OrtSession* session;
    OrtMemoryInfo* memory;
    OrtValue *input, *output = nullptr;
    OrtTensorTypeAndShapeInfo* info;
    void* y;
    size_t size;
    check(CreateEnv::call(api, 3, "test", &environment));
    check(CreateSessionOptions::call(api, &options));
    check(SetIntraOpNumThreads::call(api, options, 2));
    check(RegisterCustomOps(options, base));
    check(CreateSession::call(api, environment, arguments[1], options, &session));
    check(CreateCpuMemoryInfo::call(api, 0, 0, &memory));
    check(CreateTensorWithData::call(api, memory, x.data(), size_t(bytes), shape, 2, FLOAT, &input));
    const char *x_name = "x", *y_name = arguments[4];
    check(Run::call(api, session, nullptr, &x_name, &input, 1, &y_name, 1, &output));
    check(GetTensorMutableData::call(api, output, &y));
    check(GetTensorTypeAndShape::call(api, output, &info));
    check(GetTensorShapeElementCount::call(api, info, &size));
    std::ofstream(arguments[6], std::ios::binary).write(static_cast<char*>(y), long(size * sizeof(float)));
}
