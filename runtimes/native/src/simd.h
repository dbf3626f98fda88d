// SIMD vectors of floats with the vector extensions of GCC and Clang: one source for AVX-512, AVX2, SSE2 and NEON.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define NM_INLINE static inline __attribute__((always_inline))
#define NM_MEMBER inline __attribute__((always_inline))
#ifdef __clang__
#define NM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define NM_UNROLL _Pragma("GCC unroll 16")
#endif

#if defined(__AVX512F__)
#define NM_LANES 16
#define NM_REGISTERS 32
#elif defined(__AVX__)
#define NM_LANES 8
#define NM_REGISTERS 16
#elif defined(__aarch64__)
#define NM_LANES 4
#define NM_REGISTERS 32
#else
#define NM_LANES 4
#define NM_REGISTERS 16
#endif

// The registers that a multiplication and addition needs beside its operands: the product, unless one instruction does
// both.
#if defined(__FMA__) || defined(__aarch64__)
#define NM_PRODUCT_REGISTERS 0
#else
#define NM_PRODUCT_REGISTERS 1
#endif

// Keeps a loaded vector in a register. Otherwise GCC repeats the load as a memory operand of each multiplication, and
// the load ports become the limit: 84 % of the peak instead of 99 % if two rows share a load.
#if defined(__AVX512F__)
#define NM_HOLD(vector) __asm__("" : "+v"(vector))
#elif defined(__x86_64__)
#define NM_HOLD(vector) __asm__("" : "+x"(vector))
#elif defined(__aarch64__)
#define NM_HOLD(vector) __asm__("" : "+w"(vector))
#else
#define NM_HOLD(vector)
#endif

// Keeps a computed address in one register. Otherwise GCC adds base and index in each multiplication with a memory
// operand, which was slower on an Intel Xeon, most of all if hyper-threads share the core (NOTES.md).
#if defined(__GNUC__)
#define NM_POINTER(pointer) __asm__("" : "+r"(pointer))
#else
#define NM_POINTER(pointer)
#endif

// The low half of a vector of 16 lanes that are all equal.
#if defined(__clang__) || __GNUC__ >= 12
#define NM_LOW_HALF(vector) __builtin_shufflevector(vector, vector, 0, 1, 2, 3, 4, 5, 6, 7)
#else
#define NM_LOW_HALF(vector) (vector[0] - f8{})
#endif

// No functions of the standard library here: inline ones would be compiled once for each instruction set, and the
// linker would keep an arbitrary one of them.
namespace {

typedef float f4 __attribute__((vector_size(16)));
typedef float f8 __attribute__((vector_size(32)));
typedef float f16 __attribute__((vector_size(64)));

template <typename V>
NM_INLINE V load(const float* p) {
    return *reinterpret_cast<const V*>(p);
}

template <typename V>
NM_INLINE void store(float* p, V v) {
    *reinterpret_cast<V*>(p) = v;
}

// Loads from and stores to any address, with one unaligned instruction.
NM_INLINE f8 load_anywhere(const float* p) {
    f8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

NM_INLINE void store_anywhere(float* p, f8 v) { memcpy(p, &v, sizeof v); }

template <typename V>
NM_INLINE V splat(const float* p) {
    return *p - V{};
}

#if defined(__clang__) || __GNUC__ >= 12
#define NM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int i8 __attribute__((vector_size(32)));
#define NM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, i8{__VA_ARGS__})
#endif

// to[c][r] = from[r][c] + add[r] for 8 x 8 floats.
NM_INLINE void transpose8(const float* from, size_t from_stride, float* to, size_t to_stride, f8 add) {
    f8 r[8], t[8];
    NM_UNROLL for (int i = 0; i < 8; i++) r[i] = load_anywhere(from + i * from_stride);
    NM_UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = NM_SHUFFLE(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = NM_SHUFFLE(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    NM_UNROLL for (int i = 0; i < 8; i += 4) NM_UNROLL for (int j = 0; j < 2; j++) {
        r[i + 2 * j] = NM_SHUFFLE(t[i + j], t[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
        r[i + 2 * j + 1] = NM_SHUFFLE(t[i + j], t[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
    NM_UNROLL for (int i = 0; i < 4; i++) {
        store_anywhere(to + i * to_stride, NM_SHUFFLE(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + add);
        store_anywhere(to + (i + 4) * to_stride, NM_SHUFFLE(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15) + add);
    }
}

}  // namespace
