// Packs and stores the tiles of convolutions. It is compiled once for each instruction set, with NM_CONV as the name of
// the ConvKernel that it defines.
//
// A convolution is a GEMM whose columns are the channels of each tap. The matrix of shifted images is never in memory:
// each tile is packed from the images themselves, one row of the tile for each channel of each tap. Neighbouring output
// pixels read neighbouring input pixels (or every second one), so a row of a tile is a few copies of whole vectors. The
// copies are the same for all channels of a tap.
#include "nm_gemm.h"
#include "simd.h"

namespace {

using mpcompile::Activations;
using mpcompile::ConvWindow;
using mpcompile::Tile;
using mpcompile::Weights;

// Consecutive floats of a row of a packed tile: zeros if `from` is null, else pixels of channel 0 from there on.
struct Piece {
    int64_t at, count;
    const float* from;
};

constexpr int64_t MOST_TOKENS = 112;  // of a tile (WIDEST in nm_gemm.cpp): a piece has at least one

// The pieces of a row for one tap.
struct Pieces {
    Piece pieces[MOST_TOKENS + 1];
    int64_t count = 0;

    NM_MEMBER void add(int64_t at, int64_t size, const float* from) {
        if (size > 0) pieces[count++] = {at, size, from};
    }
};

// A 1x1 convolution with stride 1 and without padding: its images have one long row of pixels.
ConvWindow pointwise(const Weights& w, const Activations& a) {
    return {{1, 1}, {1, 1}, {1, 1}, {0, 0}, {1, a.pixels}, {1, a.pixels}, w.columns};
}

// The number of output columns before the first that reads input column `offset` or a later one.
int64_t columns_before(int64_t offset, int64_t stride) { return offset <= 0 ? 0 : (offset + stride - 1) / stride; }

int64_t clipped(int64_t value, int64_t low, int64_t high) { return value < low ? low : value > high ? high : value; }

Pieces pieces_of(const ConvWindow& c, const Activations& a, const Tile& tile, int64_t tap) {
    Pieces made;
    const int64_t down = tap / c.kernel[1] * c.dilation[0] - c.before[0];
    const int64_t right = tap % c.kernel[1] * c.dilation[1] - c.before[1];
    const int64_t image_size = c.channels * c.in[0] * c.in[1];
    for (int64_t at = 0; at < tile.count;) {
        const int64_t token = tile.first + at, pixel = token % a.pixels, x = pixel % c.out[1];
        const int64_t left = c.out[1] - x, wanted = tile.count - at, count = left < wanted ? left : wanted;
        const int64_t y = pixel / c.out[1] * c.stride[0] + down;
        // Of the output columns [x, x + count), those that read pixels of the image.
        int64_t begin = clipped(columns_before(-right, c.stride[1]), x, x + count);
        int64_t end = clipped(columns_before(c.in[1] - right, c.stride[1]), begin, x + count);
        if (y < 0 || y >= c.in[0]) begin = end = x + count;
        made.add(at, begin - x, nullptr);
        made.add(at + begin - x, end - begin,
                 a.x + token / a.pixels * image_size + y * c.in[1] + begin * c.stride[1] + right);
        made.add(at + end - x, x + count - end, nullptr);
        at += count;
    }
    made.add(tile.count, tile.width() - tile.count, nullptr);
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

// Writes a row in whole vectors. Each piece writes up to 7 floats too many, which the next piece or row overwrites.
template <int STRIDE>
void pack_row(const Pieces& pieces, int64_t offset, float* to) {
    for (int64_t p = 0; p < pieces.count; p++) {
        const Piece& piece = pieces.pieces[p];
        float* out = to + piece.at;
        if (!piece.from) {
            for (int64_t i = 0; i < piece.count; i += 8) store_anywhere(out + i, f8{});
            continue;
        }
        const float* from = piece.from + offset;
        for (int64_t i = 0; i < piece.count; i += 8) store_anywhere(out + i, gathered<STRIDE>(from + i * STRIDE));
    }
}

// Writes a row without reading or writing beyond it, for any stride.
void pack_row_exactly(const Pieces& pieces, int64_t offset, int64_t stride, float* to) {
    for (int64_t p = 0; p < pieces.count; p++) {
        const Piece& piece = pieces.pieces[p];
        for (int64_t i = 0; i < piece.count; i++)
            to[piece.at + i] = piece.from ? piece.from[offset + i * stride] : 0.0f;
    }
}

// The number of channels of which whole vectors can be read: the last ones end too near the end of x.
int64_t readable_channels(const Pieces& pieces, const ConvWindow& c, const float* end) {
    const int64_t plane = c.in[0] * c.in[1];
    int64_t least = c.channels;
    for (int64_t p = 0; p < pieces.count; p++) {
        const Piece& piece = pieces.pieces[p];
        if (!piece.from) continue;
        const int64_t room = end - piece.from - (piece.count + 7) / 8 * 8 * c.stride[1];
        const int64_t channels = room < 0 ? 0 : room / plane + 1;
        if (channels < least) least = channels;
    }
    return least;
}

void pack(const Weights& w, const Activations& a, const Tile& tile, int64_t block, float* packed) {
    const ConvWindow c = a.window ? *a.window : pointwise(w, a);
    const int64_t plane = c.in[0] * c.in[1], width = tile.width();
    const float* end = a.x + a.tokens / a.pixels * c.channels * plane;
    const int64_t first = block * w.block, beyond = first + w.block < w.columns ? first + w.block : w.columns;
    float* to = packed;
    for (int64_t k = first; k < beyond;) {
        const Pieces pieces = pieces_of(c, a, tile, k / c.channels);
        const int64_t readable = c.stride[1] <= 2 ? readable_channels(pieces, c, end) : 0;
        const int64_t start = k % c.channels, left = beyond - k;
        const int64_t stop = c.channels - start < left ? c.channels : start + left;
        for (int64_t channel = start; channel < stop; channel++, to += width) {
            const int64_t offset = channel * plane;
            if (channel >= readable)
                pack_row_exactly(pieces, offset, c.stride[1], to);
            else if (c.stride[1] == 1)
                pack_row<1>(pieces, offset, to);
            else
                pack_row<2>(pieces, offset, to);
        }
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
            if (a.residual)
                store_run<true>(from, a.residual + place, w.bias[row + n], a.low, a.high, size, a.y + place);
            else
                store_run<false>(from, nullptr, w.bias[row + n], a.low, a.high, size, a.y + place);
        }
        at += size;
    }
}

}  // namespace

namespace mpcompile {

extern const ConvKernel NM_CONV;
const ConvKernel NM_CONV = {pack, store_rows};

}  // namespace mpcompile
