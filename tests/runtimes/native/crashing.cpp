// A library that crashes when ONNX Runtime registers it: the self-test must survive and report it.
#include <cstdlib>

extern "C" void* RegisterCustomOps(void*, const void*) { std::abort(); }
