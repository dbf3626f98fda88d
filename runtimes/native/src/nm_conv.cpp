// Packs and stores the tiles of convolutions. It is compiled once for each instruction set, with NM_CONV as the name of
// the ConvKernel that it defines.
//
// A convolution is a GEMM whose columns are the channels of each tap. The matrix of shifted images is never in memory:
// each tile is packed from the images themselves, one row of the tile for each channel of each tap. Eight tokens are
// mostly neighbouring pixels of one row of the input (or every second one), so a vector of a packed row is one load and a
// mask for padding. Loads and masks are the same for all channels of a tap.
#include "nm_gemm.h"
#include "simd.h"

namespace {

using mpcompile::Activations;
using mpcompile::ConvWindow;
using mpcompile::Tile;
using mpcompile::Weights;

typedef int mask8 __attribute__((vector_size(32)));

constexpr int64_t MOST_TOKENS = 112;  // of a tile (WIDEST in nm_gemm.cpp)

// The lanes [from, to) of eight.
NM_INLINE mask8 lanes_between(int64_t from, int64_t to) {
    alignas(32) static const int ones[24] = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
    mask8 first, last;
    memcpy(&first, ones + 8 - from, sizeof first);
    memcpy(&last, ones + 16 - to, sizeof last);
    return first & last;
}

// Some lanes of a vector of a packed row: those in `mask` are pixels, the first lane being at `offset` in channel 0.
struct Part {
    mask8 mask;
    int64_t offset, vector;
};

// A row of a packed tile for one tap: for each vector of eight tokens a part, whose mask is empty if there are no
// pixels, and more parts where tokens of one vector lie in several rows of the image.
struct Row {
    Part first[MOST_TOKENS / 8], more[MOST_TOKENS];
    int64_t vectors = 0, others = 0;
    int64_t lowest = 0, highest = 0;  // offsets that the parts read: [lowest, highest)

    NM_MEMBER void add(int64_t at, int64_t count, int64_t offset, int64_t stride) {
        for (int64_t vector = at / 8; vector * 8 < at + count; vector++) {
            const int64_t start = vector * 8, from = at > start ? at - start : 0;
            const int64_t to = at + count < start + 8 ? at + count - start : 8;
            const int64_t low = offset + (start - at) * stride, high = low + 8 * stride;
            if (highest == lowest) lowest = low, highest = high;
            if (low < lowest) lowest = low;
            if (high > highest) highest = high;
            const Part part = {lanes_between(from, to), low, vector};
            while (vectors < vector) first[vectors++] = {mask8{}, low, 0};  // zeros
            if (vectors == vector)
                first[vectors++] = part;
            else
                more[others++] = part;
        }
    }
};

// A 1x1 convolution with stride 1 and without padding: its images have one long row of pixels.
ConvWindow pointwise(const Weights& w, const Activations& a) {
    return {{{1, 1}, {1, 1}, {1, 1}, {}, {}}, {1, a.pixels}, {1, a.pixels}, w.columns};
}

// The number of output columns before the first that reads input column `offset` or a later one.
int64_t columns_before(int64_t offset, int64_t stride) {
    return offset <= 0 ? 0 : stride == 1 ? offset : (offset + stride - 1) / stride;
}

int64_t clipped(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

Row row_of(const ConvWindow& c, const Activations& a, const Tile& tile, int64_t tap) {
    Row made;
    const int64_t down = tap / c.kernel[1] * c.dilation[0] - c.before[0];
    const int64_t right = tap % c.kernel[1] * c.dilation[1] - c.before[1];
    const int64_t image_size = c.channels * c.in[0] * c.in[1];
    int64_t image = tile.first / a.pixels, x = tile.first % a.pixels % c.out[1];
    int64_t y = tile.first % a.pixels / c.out[1];
    for (int64_t at = 0; at < tile.count;) {
        const int64_t left = c.out[1] - x, wanted = tile.count - at, count = left < wanted ? left : wanted;
        const int64_t row = y * c.stride[0] + down;
        // Of the output columns [x, x + count), those that read pixels of the image.
        const int64_t begin = clipped(columns_before(-right, c.stride[1]), x, x + count);
        const int64_t end = clipped(columns_before(c.in[1] - right, c.stride[1]), begin, x + count);
        if (row >= 0 && row < c.in[0] && begin < end)
            made.add(at + begin - x, end - begin, image * image_size + row * c.in[1] + begin * c.stride[1] + right,
                     c.stride[1]);
        at += count;
        x = 0;
        if (++y == c.out[0]) y = 0, image++;
    }
    while (made.vectors < tile.width() / 8) made.first[made.vectors++] = {mask8{}, made.lowest, 0};
    return made;
}

// Every STRIDE-th float, eight of them.
template <int STRIDE>
NM_INLINE f8 gathered(const float* from) {
    const f8 first = load_anywhere(from);
    if constexpr (STRIDE == 1) return first;
    const f8 second = load_anywhere(from + 8);
    return NM_SHUFFLE(first, second, 0, 2, 4, 6, 8, 10, 12, 14);
}

template <int STRIDE>
NM_INLINE mask8 pixels_of(const Part& part, const float* channel) {
    return mask8(gathered<STRIDE>(channel + part.offset)) & part.mask;
}

// Prefetches `count` floats, to be read or to be written. A tile has 24 to 112 floats of each channel, pages apart from
// those of the next, so the processor does not see which it will need.
template <bool WRITE>
NM_INLINE void prefetch_run(const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i, WRITE);
}

// Packs the same row of `count` channels, and prefetches that of the next tile. A function of its own: inlined, its
// loops would share registers with what finds the row.
template <int STRIDE>
__attribute__((noinline)) void pack_rows(const Row& row, const float* channel, int64_t plane, int64_t count,
                                         float* to) {
    for (const float* end = channel + count * plane; channel < end; channel += plane, to += 8 * row.vectors) {
        prefetch_run<false>(channel + row.highest, 8 * row.vectors * STRIDE);
        for (int64_t v = 0; v < row.vectors; v++) store<f8>(to + 8 * v, f8(pixels_of<STRIDE>(row.first[v], channel)));
        for (int64_t p = 0; p < row.others; p++) {
            float* at = to + 8 * row.more[p].vector;
            store<f8>(at, f8(mask8(load<f8>(at)) | pixels_of<STRIDE>(row.more[p], channel)));
        }
    }
}

// Packs a row of one channel float by float: for any stride, any width, and at the ends of x.
void pack_row_exactly(const ConvWindow& c, const Activations& a, const Tile& tile, int64_t tap, int64_t channel,
                      float* to) {
    const int64_t down = tap / c.kernel[1] * c.dilation[0] - c.before[0];
    const int64_t right = tap % c.kernel[1] * c.dilation[1] - c.before[1];
    for (int64_t at = 0; at < tile.width(); at++) {
        const int64_t token = tile.first + at, pixel = token % a.pixels;
        const int64_t y = pixel / c.out[1] * c.stride[0] + down, x = pixel % c.out[1] * c.stride[1] + right;
        const bool inside = at < tile.count && y >= 0 && y < c.in[0] && x >= 0 && x < c.in[1];
        to[at] = inside ? a.x[((token / a.pixels * c.channels + channel) * c.in[0] + y) * c.in[1] + x] : 0.0f;
    }
}

void pack(const Weights& w, const Activations& a, const Tile& tile, int64_t block, float* packed) {
    const ConvWindow c = a.window ? *a.window : pointwise(w, a);
    const int64_t plane = c.in[0] * c.in[1], width = tile.width(), floats = a.tokens / a.pixels * c.channels * plane;
    const int64_t first = block * w.block, beyond = first + w.block < w.columns ? first + w.block : w.columns;
    const bool by_vectors = width % 8 == 0 && c.stride[1] <= 2;
    float* to = packed;
    for (int64_t k = first; k < beyond;) {
        const int64_t tap = k / c.channels, start = k % c.channels, left = beyond - k;
        const int64_t stop = c.channels - start < left ? c.channels : start + left;
        int64_t begin = stop, end = stop;  // the channels that are packed in whole vectors
        if (by_vectors) {
            const Row row = row_of(c, a, tile, tap);
            // Vectors may reach beyond x in its first and last channels.
            begin = clipped(columns_before(-row.lowest, plane), start, stop);
            if (row.highest + (stop - 1) * plane > floats)
                end = clipped((floats - row.highest) / plane + (floats >= row.highest), begin, stop);
            (c.stride[1] == 1 ? pack_rows<1> : pack_rows<2>)(row, a.x + begin * plane, plane, end - begin,
                                                             to + (begin - start) * width);
        }
        for (int64_t channel = start; channel < begin; channel++, to += width)
            pack_row_exactly(c, a, tile, tap, channel, to);
        to += (end - begin) * width;
        for (int64_t channel = end; channel < stop; channel++, to += width)
            pack_row_exactly(c, a, tile, tap, channel, to);
        k += stop - start;
    }
    memset(packed + w.block * width, 0, width * sizeof(float));
}

template <bool ADDS>
void store_run(const float* from, const float* residual, float bias, float low, float high, int64_t count, float* to) {
    const f8 lows = low - f8{}, highs = high - f8{};
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        f8 sum = load_anywhere(from + i) + bias;
        if constexpr (ADDS) sum += load_anywhere(residual + i);
        sum = sum < lows ? lows : sum;
        store_anywhere(to + i, sum > highs ? highs : sum);
    }
    for (; i < count; i++) {
        float sum = from[i] + bias;
        if constexpr (ADDS) sum += residual[i];
        sum = sum < low ? low : sum;
        to[i] = sum > high ? high : sum;
    }
}

void store_rows(const Weights& w, const Activations& a, const Tile& tile, int64_t row, int64_t count,
                const float* sums) {
    for (int64_t at = 0; at < tile.count;) {  // the tokens of one image are contiguous
        const int64_t token = tile.first + at, pixel = token % a.pixels;
        const int64_t left = a.pixels - pixel, wanted = tile.count - at, size = left < wanted ? left : wanted;
        for (int64_t n = 0; n < count; n++) {
            const int64_t place = (token / a.pixels * w.rows + row + n) * a.pixels + pixel;
            const float* from = sums + n * tile.width() + at;
            // The floats after these are those of the next tile, which is stored soon (conv_scheduler.cpp).
            prefetch_run<true>(a.y + place + size, size);
            if (a.residual) {
                prefetch_run<false>(a.residual + place + size, size);
                store_run<true>(from, a.residual + place, w.bias[row + n], a.low, a.high, size, a.y + place);
            } else {
                store_run<false>(from, nullptr, w.bias[row + n], a.low, a.high, size, a.y + place);
            }
        }
        at += size;
    }
}

}  // namespace

namespace mpcompile {

extern const ConvKernel NM_CONV;
const ConvKernel NM_CONV = {pack, store_rows};

}  // namespace mpcompile
