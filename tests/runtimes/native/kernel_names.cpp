// Prints the float32 kernel and the int8 kernels that this processor would use.
#include <cstdio>

extern "C" const char* mpcompile_kernel();
extern "C" const char* mpcompile_int8_kernel();

int main() { std::printf("%s %s\n", mpcompile_kernel(), mpcompile_int8_kernel()); }
