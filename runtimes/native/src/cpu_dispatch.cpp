// Selects the kernels that this processor can run.
#include "int8_kernels.h"
#include "nm_gemm.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

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

#if defined(NM_HAS_INT8_i8mm) || defined(NM_HAS_INT8_dotprod)
// The product and LayerNorm; attention runs on the baseline kernel.
#define NM_INT8_ARM(set)                                                                                          \
    extern const Int8Kernel int8_gemm_##set;                                                                      \
    extern const LayerNormKernel layer_norm_##set;                                                                \
    static const Int8Kernels& int8_##set() {                                                                      \
        static const Int8Kernels kernels{"int8_" #set, int8_gemm_##set, int8_baseline.attention, layer_norm_##set}; \
        return kernels;                                                                                           \
    }
#if defined(__linux__)
// Bits of Linux's interface for aarch64, whose header may be older.
static bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
static bool has_i8mm() { return getauxval(AT_HWCAP2) >> 13 & 1; }
#elif defined(__APPLE__)
static bool has_feature(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
static bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
static bool has_i8mm() { return has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
static bool has_dotprod() { return false; }
static bool has_i8mm() { return false; }
#endif
#endif
#if defined(NM_HAS_INT8_i8mm)
NM_INT8_ARM(i8mm)
#endif
#if defined(NM_HAS_INT8_dotprod)
NM_INT8_ARM(dotprod)
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
#if defined(NM_HAS_INT8_i8mm)
    if (has_dotprod() && has_i8mm()) found[count++] = &int8_i8mm();
#endif
#if defined(NM_HAS_INT8_dotprod)
    if (has_dotprod()) found[count++] = &int8_dotprod();
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
