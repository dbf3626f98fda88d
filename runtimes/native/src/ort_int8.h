// What the int8 operators share.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>

#include "ort_c_api.h"

namespace mpcompile {

constexpr int64_t MOST_COLUMNS = 65536;  // 65,536 * 255 * 127 < 2^31: sums stay inside 32 bits

// Below 1e-38, 1 / scale would be infinite.
inline bool right_quantisation(float scale, int64_t zero) {
    return scale >= 1e-38f && scale < 1e38f && zero >= 0 && zero <= 255;
}

// Memory of the calling thread, aligned to 64 bytes, that is kept for later calls; null if there is none left.
uint8_t* scratch_bytes(size_t wanted);

}  // namespace mpcompile
