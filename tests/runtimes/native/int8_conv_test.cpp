// Tests the int8 convolutions and the pooling without ONNX Runtime, for the sanitizers: each kernel on exact numbers,
// and the operators on fakes of the functions that they call. Prints each error and returns 1; returns 0 if there is
// none.
#include <cstring>
#include <functional>
#include <thread>
#include <utility>

#include "failing_calls.h"
#include "failing_memory.h"
#include "int8_conv.h"
#include "int8_kernels.h"
#include "int8_packing.h"
#include "int8_reference.h"

using namespace mpcompile;

namespace {

// Powers of two: float32 arithmetic on these numbers is exact.
constexpr float X_SCALE = 0x1p-6f, W_SCALE = 0x1p-5f, BRANCH_SCALE = 0x1p-1f, ADDED_SCALE = 0x1p-2f, Y_SCALE = 1;
constexpr int X_ZERO = 77, BRANCH_ZERO = 120, ADDED_ZERO = 9, Y_ZERO = 101, LOW = 20, HIGH = 200;
using Sizes = std::vector<int64_t>;

// A convolution and its input; the weight as ONNX has it.
struct Problem {
    int64_t images, height, width, channels, rows;
    Window window;
    std::vector<int8_t> weight;
    std::vector<uint8_t> x, added;
    std::vector<float> scale, bias;

    Problem(Sizes shape, int64_t rows, Window window, Pattern pattern, Values values)
        : images(shape[0]), height(shape[1]), width(shape[2]), channels(shape[3]), rows(rows), window(window) {
        weight.resize(size_t(rows * channels * window.taps()));
        for (int64_t tap = 0; tap < window.taps(); tap++) {
            const auto of_tap = random_weight(rows, channels, pattern, values);
            for (size_t i = 0; i < of_tap.size(); i++) weight[i * size_t(window.taps()) + size_t(tap)] = of_tap[i];
        }
        x = random_activations(images * height * width, channels);
        added = random_activations(tokens(), rows);
        scale.assign(size_t(rows), W_SCALE);
        for (int64_t row = 0; row < rows; row++) bias.push_back(float(row % 7) * 0.5f);
    }

    int64_t out(int axis) const { return window.outputs(axis, axis ? width : height); }
    int64_t tokens() const { return images * out(0) * out(1); }

    std::vector<uint8_t> expected(bool adds) const {
        std::vector<uint8_t> y;
        for (int64_t token = 0; token < tokens(); token++)
            for (int64_t row = 0; row < rows; row++) {
                const int64_t image = token / (out(0) * out(1)), at = token % (out(0) * out(1));
                int64_t sum = 0;
                for (int64_t tap = 0; tap < window.taps(); tap++) {
                    const int64_t ky = tap / window.kernel[1], kx = tap % window.kernel[1];
                    const int64_t v = at / out(1) * window.stride[0] - window.before[0] + ky * window.dilation[0];
                    const int64_t h = at % out(1) * window.stride[1] - window.before[1] + kx * window.dilation[1];
                    if (v < 0 || v >= height || h < 0 || h >= width) continue;
                    for (int64_t c = 0; c < channels; c++)
                        sum += (x[size_t(((image * height + v) * width + h) * channels + c)] - X_ZERO) *
                               weight[size_t((row * channels + c) * window.taps() + tap)];
                }
                double value = double(sum) * double(X_SCALE) * double(W_SCALE) + double(bias[size_t(row)]);
                if (adds) {
                    const double step = std::nearbyint(value / double(BRANCH_SCALE)) + BRANCH_ZERO;
                    value = (std::min(std::max(step, 0.0), 255.0) - BRANCH_ZERO) * double(BRANCH_SCALE) +
                            (added[size_t(token * rows + row)] - ADDED_ZERO) * double(ADDED_SCALE);
                }
                const double step = std::nearbyint(value / double(Y_SCALE)) + Y_ZERO;
                y.push_back(uint8_t(std::min(std::max(step, double(LOW)), double(HIGH))));
            }
        return y;
    }
};

Window window(int64_t height, int64_t width, int64_t stride = 1, int64_t pad = 0, int64_t dilation = 1) {
    return {{height, width}, {stride, stride}, {dilation, dilation}, {pad, pad}, {pad, pad}};
}

std::vector<Problem> problems() {
    std::vector<Problem> all;
    const Pattern dense{0, 0}, own{2, 4}, shared{8, 16, 4, true}, pairs{1, 4, 2}, wide{8, 16}, few{4, 16, 1};
    for (const Values values : {Values::SMALL, Values::EXTREME})
        for (const Pattern& pattern : {dense, own, shared, pairs, wide, few}) {
            all.emplace_back(Sizes{2, 7, 5, 32}, 72, window(3, 3, 1, 1), pattern, values);
            all.emplace_back(Sizes{1, 9, 8, 24}, 20, window(3, 3, 2, 1), pattern, values);
            all.emplace_back(Sizes{1, 6, 7, 40}, 64, window(1, 1), pattern, values);
            all.emplace_back(Sizes{2, 5, 9, 16}, 16, window(2, 3, 1, 2, 2), pattern, values);
        }
    all.emplace_back(Sizes{1, 12, 11, 3}, 33, window(5, 4, 3, 2), dense, Values::SMALL);
    return all;
}

bool kernels_are_exact() {
    const Int8Kernels* kernels[4];
    const int count = supported_int8_kernels(kernels);
    for (const Problem& p : problems())
        for (const bool adds : {false, true}) {
            const std::vector<uint8_t> expected = p.expected(adds);
            for (int i = 0; i < count; i++) {
                ConvWeight arranged = by_taps(p.weight.data(), p.rows, p.channels, p.window.taps());
                const auto packed =
                    pack_int8(kernels[i]->gemm, int8_baseline.gemm, std::move(arranged.values), p.rows,
                              p.window.taps() * arranged.tap_columns, p.scale.data(), p.bias.data(), X_SCALE, X_ZERO);
                const Int8Weights& w = packed->weights;
                const size_t stride = size_t(w.steps * w.step_columns);
                std::vector<uint8_t> tile(size_t(p.tokens()) * stride), y(size_t(p.tokens() * p.rows));
                copy_windows(p.window, {p.x.data(), p.height, p.width, p.channels, X_ZERO, p.out(0), p.out(1)},
                             arranged.tap_columns, 0, p.tokens(), tile.data(), stride);
                Int8Call call{};
                call.bytes = y.data();
                call.tokens = p.tokens();
                call.inverse_scale = 1 / Y_SCALE;
                call.zero = Y_ZERO;
                call.low = LOW;
                call.high = HIGH;
                if (adds) call.added = p.added.data();
                call.branch = {BRANCH_SCALE, BRANCH_ZERO};
                call.added_scale = {ADDED_SCALE, ADDED_ZERO};
                const int64_t most = packed->kernel->layout(w.kept, w.shared).most_tokens;
                for (int64_t first = 0; first < p.tokens(); first += most) {
                    const int64_t last = std::min(first + most, p.tokens());
                    packed->kernel->compute(w, call, tile.data() + size_t(first) * stride, stride, first, last, 0,
                                            w.chunks());
                }
                const std::string name = std::string(kernels[i]->name) + ", " + std::to_string(p.channels) +
                                         " channels, kept " + std::to_string(w.kept);
                if (!expect(y == expected, name + ": wrong results")) return false;
            }
        }
    return true;
}

// An operator as a session holds it, on a problem of its own.
struct Session {
    const OrtCustomOp* op;
    std::string name;
    Problem p{{2, 13, 12, 24}, 100, window(3, 3, 2, 1), {2, 4, 1}, Values::SMALL};
    OrtKernelInfo info;
    void* kernel = nullptr;
    std::vector<OrtValue> inputs;

    explicit Session(const OrtCustomOp* op) : op(op), name(op->GetName(op)) {
        info.integers = {{"strides", {2, 2}}, {"dilations", {1, 1}}, {"pads", {1, 1, 1, 1}}, {"kernel_shape", {3, 3}}};
        info.floats = {{"x_scale", X_SCALE}, {"y_scale", Y_SCALE}, {"branch_scale", BRANCH_SCALE},
                       {"residual_scale", ADDED_SCALE}};
        info.attributes = {{"x_zero", X_ZERO}, {"y_zero", Y_ZERO}, {"branch_zero", BRANCH_ZERO},
                           {"residual_zero", ADDED_ZERO}, {"low", LOW}, {"high", HIGH}};
        inputs = {{{2, 13, 12, 24}, p.x.data()}};
        if (pools()) return;
        info.constants = {{1, {{100, 24, 3, 3}, p.weight.data()}},
                          {2, {{100}, p.scale.data()}},
                          {3, {{100}, p.bias.data()}}};
        for (const auto& constant : info.constants) inputs.push_back(constant.second);
        if (adds()) inputs.push_back({{2, 7, 6, 100}, p.added.data()});
    }
    Session(const Session&) = delete;
    ~Session() {
        if (kernel) op->KernelDestroy(kernel);
    }

    bool pools() const { return name == "MaxPoolInt8"; }
    bool adds() const { return name == "NMConvInt8Add"; }
    std::string open() { return text_of(op->CreateKernelV2(op, api(), &info, &kernel)); }
    std::string run(OrtKernelContext& context) const {
        context.inputs = inputs;
        context.element_bytes = 1;
        return text_of(op->KernelComputeV2(kernel, &context));
    }

    std::vector<uint8_t> expected() const {
        if (!pools()) return p.expected(adds());
        std::vector<uint8_t> y(size_t(p.tokens() * p.channels));
        for (size_t i = 0; i < y.size(); i++) {
            const int64_t c = int64_t(i) % 24, h = int64_t(i) / 24 % 6, v = int64_t(i) / 144 % 7, n = int64_t(i) / 1008;
            for (int64_t a = std::max<int64_t>(2 * v - 1, 0); a < std::min<int64_t>(2 * v + 2, 13); a++)
                for (int64_t b = std::max<int64_t>(2 * h - 1, 0); b < std::min<int64_t>(2 * h + 2, 12); b++)
                    y[i] = std::max(y[i], p.x[size_t(((n * 13 + a) * 12 + b) * 24 + c)]);
        }
        return y;
    }
};

bool computes(const OrtCustomOp* op) {
    Session s(op);
    if (!expect(s.open().empty(), s.name + ": a good file is refused")) return false;
    const std::vector<uint8_t> wanted = s.expected();
    for (pool_threads = 1; pool_threads <= 8; pool_threads++) {
        OrtKernelContext context;
        if (!expect(s.run(context).empty() && context.memory == wanted, s.name + ": wrong results")) return false;
    }
    pool_threads = 2;
    std::atomic<bool> same{true};
    std::vector<std::thread> lives;
    for (int i = 0; i < 3; i++)
        lives.emplace_back([&] {
            OrtKernelContext mine;
            if (!s.run(mine).empty() || mine.memory != wanted) same = false;
        });
    for (auto& life : lives) life.join();
    if (!expect(same, s.name + ": concurrent calls change the result")) return false;
    s.inputs[0].shape[0] = 0;
    if (s.adds()) s.inputs[4].shape[0] = 0;
    OrtKernelContext none;
    return expect(s.run(none).empty() && none.memory.empty(), s.name + ": no images are refused");
}

// Each call into ONNX Runtime fails once, and each allocation; each time that is reported, and nothing leaks.
bool survives_failures(const OrtCustomOp* op) {
    const auto attempt = [=] {
        Session s(op);
        OrtKernelContext context;
        const std::string text = s.open();
        return text.empty() ? s.run(context) : text;
    };
    return survives_failing_calls(op->GetName(op), 9, attempt) && survives_failing_news<Session>(op);
}

bool says(const std::string& found, const std::string& wanted, const std::string& name) {
    return expect(found.find(wanted) != std::string::npos, name + ": expected '" + wanted + "', found '" + found + "'");
}

bool refuses(const OrtCustomOp* op) {
    using Spoil = std::function<void(Session&)>;
    std::vector<std::pair<std::string, Spoil>> files, runs;
    const std::string windows = "strides, dilations and kernel_shape must be two positive numbers";
    for (const char* name : {"strides", "dilations"}) {
        files.push_back({windows, [=](Session& s) { s.info.integers[name] = {1, 0}; }});
        files.push_back({windows, [=](Session& s) { s.info.integers[name] = {1}; }});
    }
    files.push_back({windows, [](Session& s) { s.info.integers["pads"] = {0, 0, -1, 0}; }});
    files.push_back({"no such attribute", [](Session& s) { s.info.integers.erase("pads"); }});
    runs.push_back({"x must be (images, height, width, channels)", [](Session& s) { s.inputs[0].shape.pop_back(); }});
    runs.push_back({"the image is too small", [](Session& s) {
                        s.inputs[0].shape = {1, 0, 4, 24};
                    }});
    if (Session(op).pools()) {
        files.push_back({windows, [](Session& s) { s.info.integers["kernel_shape"] = {3, -3}; }});
    } else {
        const std::string scale = "a scale must be between 1e-38 and 1e38, and a zero point between 0 and 255";
        for (const char* name : {"x", "y", "branch", "residual"}) {
            if (!Session(op).adds() && strlen(name) > 1) continue;
            const std::string prefix(name);
            files.push_back({scale, [=](Session& s) { s.info.floats[prefix + "_scale"] = 0; }});
            files.push_back({scale, [=](Session& s) { s.info.attributes[prefix + "_zero"] = 256; }});
        }
        for (const char* name : {"low", "high"})
            files.push_back({"a limit is not between 0 and 255", [=](Session& s) { s.info.attributes[name] = -1; }});
        for (const size_t input : {1, 2, 3})
            files.push_back({"must be constants", [=](Session& s) { s.info.constants.erase(input); }});
        const std::string shapes = "the weight must be (rows, channels, height, width), its scale and the bias (rows)";
        for (const Sizes& shape : {Sizes{}, {100, 24, 9}, {0, 24, 3, 3}, {101, 24, 3, 3}})
            files.push_back({shapes, [=](Session& s) { s.info.constants[1].shape = shape; }});
        files.push_back({shapes, [](Session& s) { s.info.constants[2].shape = {1}; }});
        files.push_back({shapes, [](Session& s) { s.info.constants[3].shape = {100, 1}; }});
        const std::string large = "more than 65,536 weights for an output channel";
        for (const Sizes& shape : {Sizes{100, 7282, 3, 3}, {100, 1, 60000, 60000}})
            files.push_back({large, [=](Session& s) { s.info.constants[1].shape = shape; }});
        runs.push_back({"with the channels of the weight", [](Session& s) { s.inputs[0].shape[3] = 25; }});
        if (Session(op).adds())
            runs.push_back({"the residual has another shape", [](Session& s) { s.inputs[4].shape[1] = 8; }});
    }
    for (const auto& [text, spoil] : files) {
        Session s(op);
        spoil(s);
        if (!says(s.open(), text, s.name)) return false;
    }
    for (const auto& [text, spoil] : runs) {
        Session s(op);
        OrtKernelContext context;
        if (!expect(s.open().empty(), s.name + ": a good file is refused")) return false;
        spoil(s);
        if (!says(s.run(context), text, s.name)) return false;
    }
    return true;
}

}  // namespace

int main() {
    const OrtApiBase base = {[](uint32_t) { return api(); }, [] { return "a stand-in"; }};
    OrtSessionOptions options;
    if (!expect(text_of(RegisterCustomOps(&options, &base)).empty() && options.domain, "not registered")) return 1;
    if (!kernels_are_exact()) return 1;
    int tested = 0;
    for (const OrtCustomOp* op : options.domain->operators) {
        const std::string name = op->GetName(op);
        if (name.find("NMConvInt8") != 0 && name != "MaxPoolInt8") continue;
        for (const auto test : {computes, survives_failures, refuses})
            if (!test(op)) return 1;
        tested++;
    }
    return expect(tested == 3, std::to_string(tested) + " operators were found") ? 0 : 1;
}
