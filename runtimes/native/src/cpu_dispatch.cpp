// Selects the kernels that this processor can run.
#include "int8_kernels.h"
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

#define NM_INT8(set)                                                                                        \
    extern const Int8Kernel int8_gemm_##set;                                                                \
    extern const AttentionKernel attention_##set;                                                           \
    extern const LayerNormKernel layer_norm_##set;                                                          \
    static const Int8Kernels& int8_##set() {                                                                \
        static const Int8Kernels kernels{"int8_" #set, int8_gemm_##set, attention_##set, layer_norm_##set}; \
        return kernels;                                                                                     \
    }
#if defined(NM_HAS_INT8_avx512vnni)
NM_INT8(avx512vnni)
#endif
#if defined(NM_HAS_INT8_avx2)
NM_INT8(avx2)
#endif

int supported_int8_kernels(const Int8Kernels* (&found)[4]) {
    int count = 0;
#if defined(NM_HAS_INT8_avx512vnni)
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        found[count++] = &int8_avx512vnni();
#endif
#if defined(NM_HAS_INT8_avx2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found[count++] = &int8_avx2();
#endif
    found[count++] = &int8_baseline;
    return count;
}

}  // namespace mpcompile

// The names of the instruction sets that calls use, for reports: of the float32 kernels and of the int8 kernels.
extern "C" __attribute__((visibility("default"))) const char* mpcompile_kernel() {
    const mpcompile::Kernel* kernels[4];
    mpcompile::supported_kernels(kernels);
    return kernels[0]->name;
}

extern "C" __attribute__((visibility("default"))) const char* mpcompile_int8_kernel() {
    const mpcompile::Int8Kernels* kernels[4];
    mpcompile::supported_int8_kernels(kernels);
    return kernels[0]->name;
}
