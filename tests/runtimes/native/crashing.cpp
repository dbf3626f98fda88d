// A library that crashes where ONNX Runtime registers it: what the self-test has to survive and report.
#include <cstdlib>

extern "C" void* RegisterCustomOps(void*, const void*) { std::abort(); }
