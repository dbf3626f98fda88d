// Vectors of bytes and floats for the int8 kernels, in the intrinsics of NEON with sdot, or with usdot of i8mm.
//
// usdot multiplies u8 by s8. Without i8mm there is only s8 by s8: activations are then loaded with their highest bit
// inverted, which is 128 less, and X_OFFSET tells the packing to add 128 times the sum of a row's weights.
#pragma once
#include <arm_neon.h>

#define NM_VNNI 0
#define NM_SATURATES 0
#define NM_KEEP(vector) __asm__ volatile("" : "+w"(vector))

namespace {

using Bytes = uint8x16_t;
using Floats = float32x4_t;
constexpr int LANES = 4, SPLITS = 1;  // of 32 bits
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int X_OFFSET = 0;
#else
constexpr int X_OFFSET = 128;
#endif

NM_INLINE Bytes zeros() { return vdupq_n_u8(0); }
NM_INLINE Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
NM_INLINE void store_bytes(void* p, Bytes v) { vst1q_u8(static_cast<uint8_t*>(p), v); }
// 16 or 8 activations, as bytes that add_products reads. `flip` is flips().
NM_INLINE Bytes flips() { return vdupq_n_u8(0x80); }
NM_INLINE Bytes load_activations(const uint8_t* p, [[maybe_unused]] Bytes flip) {
    return X_OFFSET ? veorq_u8(load_bytes(p), flip) : load_bytes(p);
}
NM_INLINE uint8x8_t load_8_activations(const uint8_t* p, [[maybe_unused]] Bytes flip) {
    return X_OFFSET ? veor_u8(vld1_u8(p), vget_low_u8(flip)) : vld1_u8(p);
}
// sum += x * w, four products in each 32-bit lane.
NM_INLINE void add_products(Bytes& sum, Bytes x, Bytes w) {
    const int32x4_t to = vreinterpretq_s32_u8(sum);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    sum = vreinterpretq_u8_s32(vusdotq_s32(to, x, vreinterpretq_s8_u8(w)));
#else
    sum = vreinterpretq_u8_s32(vdotq_s32(to, vreinterpretq_s8_u8(x), vreinterpretq_s8_u8(w)));
#endif
    NM_KEEP(sum);
}
// The same with four activations for all lanes: those of part PART, 0 or 1, of `x`.
template <int PART>
NM_INLINE void add_products_of_part(Bytes& sum, uint8x8_t x, Bytes w) {
    const int32x4_t to = vreinterpretq_s32_u8(sum);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    sum = vreinterpretq_u8_s32(vsudotq_lane_s32(to, vreinterpretq_s8_u8(w), x, PART));
#else
    sum = vreinterpretq_u8_s32(vdotq_lane_s32(to, vreinterpretq_s8_u8(w), vreinterpret_s8_u8(x), PART));
#endif
    NM_KEEP(sum);
}
// Stores the sums [TOKENS][GROUPS * SHARED] of a panel, `stride` apart for each token. Rows that share a pattern are
// neighbours: row r of the group in lane l of each vector is row l * SHARED + r.
template <int TOKENS, int GROUPS, int SHARED>
NM_INLINE void store_sums(const Bytes* sums, int32_t* to, int64_t stride) {
    const auto lanes = [sums](int i) __attribute__((always_inline)) { return vreinterpretq_s32_u8(sums[i]); };
    NM_UNROLL for (int t = 0; t < TOKENS; t++) NM_UNROLL for (int g = 0; g < GROUPS; g++) {
        const int i = (t * GROUPS + g) * SHARED;
        int32_t* at = to + t * stride + g * SHARED * LANES;
        if constexpr (SHARED == 1) vst1q_s32(at, lanes(i));
        if constexpr (SHARED == 2) vst2q_s32(at, int32x4x2_t{{lanes(i), lanes(i + 1)}});
        if constexpr (SHARED == 4)
            vst4q_s32(at, int32x4x4_t{{lanes(i), lanes(i + 1), lanes(i + 2), lanes(i + 3)}});
    }
}
// Bytes whose index is above 15 are 0.
NM_INLINE Bytes shuffled(Bytes v, Bytes control) { return vqtbl1q_u8(v, control); }
NM_INLINE Bytes add32(Bytes a, Bytes b) {
    return vreinterpretq_u8_u32(vaddq_u32(vreinterpretq_u32_u8(a), vreinterpretq_u32_u8(b)));
}
NM_INLINE Floats to_floats(Bytes v) { return vcvtq_f32_s32(vreinterpretq_s32_u8(v)); }
NM_INLINE Bytes rounded(Floats v) { return vreinterpretq_u8_s32(vcvtnq_s32_f32(v)); }
NM_INLINE Floats load_floats(const float* p) { return vld1q_f32(p); }
NM_INLINE void store_floats(float* p, Floats v) { vst1q_f32(p, v); }
NM_INLINE Floats all(float v) { return vdupq_n_f32(v); }
NM_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
// Of an operand that is NaN, the second one, as on x86: vmaxq_f32 and vminq_f32 would give NaN.
NM_INLINE Floats largest(Floats a, Floats b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
NM_INLINE Floats least(Floats a, Floats b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
NM_INLINE float sum_of(Floats v) { return vaddvq_f32(v); }
// 2^x of attention.cpp, which has no build for NEON.
NM_INLINE Floats nearest_integer(Floats v) { return vrndnq_f32(v); }
NM_INLINE Floats times_power(Floats v, Floats n) {
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(v), vshlq_n_s32(vcvtnq_s32_f32(n), 23)));
}
// LANES bytes as integers.
NM_INLINE Bytes load_low_bytes(const uint8_t* p) {
    uint32_t four;
    memcpy(&four, p, LANES);
    return vreinterpretq_u8_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
}
// Stores the low bytes of LANES integers between 0 and 255.
NM_INLINE void store_low_bytes(uint8_t* p, Bytes v) {
    const uint16x4_t words = vmovn_u32(vreinterpretq_u32_u8(v));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    memcpy(p, &bytes, LANES);
}

}  // namespace
