// Selects the kernels that this processor can run.
#include "nm_gemm.h"

namespace mpcompile {

// build.py defines NM_HAS_… for each instruction set whose kernel it links into the library.
extern const Kernel kernel_avx512, kernel_avx2, kernel_baseline;

int supported_kernels(const Kernel* (&found)[4]) {
    int count = 0;
#if defined(NM_HAS_avx512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        found[count++] = &kernel_avx512;
#endif
#if defined(NM_HAS_avx2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &kernel_avx2;
#endif
    found[count++] = &kernel_baseline;
    return count;
}

}  // namespace mpcompile
