// Tests the convolution operators without ONNX Runtime, for the sanitizers: every window, every kernel of this
// processor, one to eight threads, each call failing once, and invalid files. Prints each error and returns 1; returns
// 0 if there is none.
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "conv_scheduler.h"
#include "expect.h"
#include "failing_calls.h"
#include "ort_fakes.h"
#include "streams.h"

using namespace mpcompile;

namespace {

struct Layer {
    ConvWindow window;  // without `out`
    int64_t images, rows, share, block;
    bool adds;
    float low, high;

    int64_t columns() const { return window.taps() * window.channels; }
    int64_t out(int axis) const {
        const ConvWindow& w = window;
        return (w.in[axis] + w.before[axis] + w.after[axis] - w.dilation[axis] * (w.kernel[axis] - 1) - 1) /
                   w.stride[axis] + 1;
    }
};

// The exact result, and a bound of the rounding error.
bool is_right(const Layer& layer, const Streams& streams, const std::vector<float>& x,
              const std::vector<float>& residual, const std::vector<float>& y) {
    const ConvWindow& w = layer.window;
    const int64_t height = layer.out(0), width = layer.out(1);
    if (y.size() != residual.size()) return false;
    for (int64_t i = 0; i < int64_t(y.size()); i++) {
        const int64_t ox = i % width, oy = i / width % height, row = i / (width * height) % layer.rows;
        const int64_t image = i / (width * height * layer.rows);
        double sum = streams.bias[row], size = std::fabs(sum);
        for (int64_t k = 0; k < layer.columns(); k++) {
            const int64_t tap = k / w.channels, channel = k % w.channels;
            const int64_t at_y = oy * w.stride[0] - w.before[0] + tap / w.kernel[1] * w.dilation[0];
            const int64_t at_x = ox * w.stride[1] - w.before[1] + tap % w.kernel[1] * w.dilation[1];
            if (at_y < 0 || at_y >= w.in[0] || at_x < 0 || at_x >= w.in[1]) continue;
            const double term = double(streams.at(row, k)) *
                                x[((image * w.channels + channel) * w.in[0] + at_y) * w.in[1] + at_x];
            sum += term, size += std::fabs(term);
        }
        if (layer.adds) sum += residual[i], size += std::fabs(residual[i]);
        sum = std::fmin(std::fmax(sum, double(layer.low)), double(layer.high));
        // Each of at most `columns` + 2 additions rounds by 2^-24 of at most `size`.
        if (!(std::fabs(y[i] - sum) <= (layer.columns() + 3) * 0x1p-24 * size)) return false;
    }
    return true;
}

// The session of one operator, and its inputs. `x` is exactly as large as the images, so that reading beyond is found.
struct Session {
    const OrtCustomOp* op;
    Streams streams;
    OrtKernelInfo info;
    std::vector<float> x, residual;
    OrtKernelContext context;
    void* kernel = nullptr;

    Session(const OrtCustomOp* op, const Layer& l)
        : op(op), streams({l.rows, l.columns(), l.share, 2, 4, l.block, 16, 1, 0}) {
        const Weights& w = streams.weights;
        const ConvWindow& c = l.window;
        info.attributes = {{"rows", w.rows}, {"columns", w.columns}, {"share", w.rows_per_pattern},
                           {"block", w.block}, {"chunk", w.chunk}};
        info.integers = {{"kernel_shape", {c.kernel[0], c.kernel[1]}},
                         {"strides", {c.stride[0], c.stride[1]}},
                         {"dilations", {c.dilation[0], c.dilation[1]}},
                         {"pads", {c.before[0], c.before[1], c.after[0], c.after[1]}}};
        info.constants = {{1, {{w.blocks, w.row_groups, w.nonzeros, w.group_rows()}, streams.values.data()}},
                          {2, {{w.blocks, w.row_groups, w.nonzeros, w.group_indices()}, streams.indices.data()}},
                          {3, {{w.blocks, w.row_groups}, streams.common.data()}},
                          {4, {{w.blocks, w.row_groups, w.group_rows()}, streams.order.data()}},
                          {5, {{w.rows}, streams.bias.data()}}};
        x.resize(size_t(l.images * c.channels * c.in[0] * c.in[1]));
        residual.resize(size_t(l.images * l.rows * l.out(0) * l.out(1)));
        for (float& value : x) value = normal();
        for (float& value : residual) value = normal();
        context.inputs = {{{l.images, c.channels, c.in[0], c.in[1]}, x.data()}};
        for (const auto& constant : info.constants) context.inputs.push_back(constant.second);
        context.inputs.push_back({{l.images, l.rows, l.out(0), l.out(1)}, residual.data()});
    }
    Session(const Session&) = delete;
    ~Session() {
        if (kernel) op->KernelDestroy(kernel);
    }

    std::string open() { return text_of(op->CreateKernelV2(op, api(), &info, &kernel)); }
    std::string run() { return text_of(op->KernelComputeV2(kernel, &context)); }
    std::vector<float> result() const {
        std::vector<float> floats(context.memory.size() / sizeof(float));
        if (!floats.empty()) std::memcpy(floats.data(), context.memory.data(), context.memory.size());
        return floats;
    }
};

// One layer on one kernel, without the operator: the fastest kernel is the one that operators use.
std::vector<float> on_kernel(const Kernel& kernel, const Layer& layer, const Session& session) {
    ConvWindow window = layer.window;
    for (int axis = 0; axis < 2; axis++) window.out[axis] = layer.out(axis);
    std::vector<float> y(session.residual.size(), -7.0f);
    Activations a{};
    a.x = session.x.data(), a.y = y.data();
    a.pixels = window.out[0] * window.out[1], a.tokens = layer.images * a.pixels;
    a.window = &window, a.residual = layer.adds ? session.residual.data() : nullptr;
    a.low = layer.low, a.high = layer.high;
    const ConvScheduler scheduler(kernel, session.streams.weights, a, 1);
    for (int64_t item = 0; item < scheduler.items(); item++)
        if (!scheduler.run(item)) return {};
    return y;
}

bool computes(const OrtCustomOp* op, const Layer& layer) {
    Session session(op, layer);
    const std::string name = op->GetName(op);
    if (!expect(session.open().empty(), name + ": a good file is refused")) return false;
    std::vector<float> first;
    for (int threads : {1, 2, 3, 8})
        // The division into items changes after four calls in one thread, and after one in several.
        for (int call = 0; call < (threads == 1 ? 6 : 2); call++) {
            pool_threads = threads;
            const std::string text = session.run();
            if (!expect(text.empty(), name + ": " + text)) return false;
            if (first.empty()) first = session.result();
            if (!expect(session.result() == first, name + ": the number of threads changes the result")) return false;
        }
    pool_threads = 3;
    if (!expect(is_right(layer, session.streams, session.x, session.residual, first), name + ": wrong result"))
        return false;
    const Kernel* kernels[4];
    const int count = supported_kernels(kernels);
    for (int i = 0; i < count; i++) {
        const std::vector<float> y = on_kernel(*kernels[i], layer, session);
        if (!expect(is_right(layer, session.streams, session.x, session.residual, y),
                    name + ": wrong result of " + kernels[i]->name))
            return false;
    }
    return true;
}

const Layer SMALL = {{{{3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}, {6, 5}, {}, 4}, 2, 6, 1, 12, true, 0, INFINITY};

bool survives_failures(const OrtCustomOp* op) {
    return survives_failing_calls(op->GetName(op), 30, [=] {
        Session session(op, SMALL);
        const std::string text = session.open();
        return text.empty() ? session.run() : text;
    });
}

bool refuses(const OrtCustomOp* op) {
    using Spoil = std::function<void(Session&)>;
    const std::string integers = "strides, dilations and kernel_shape must be two positive numbers";
    const std::vector<std::pair<std::string, Spoil>> files = {
        {integers, [](Session& s) { s.info.integers["strides"] = {0, 1}; }},
        {integers, [](Session& s) { s.info.integers["dilations"] = {1}; }},
        {integers, [](Session& s) { s.info.integers["pads"] = {0, 0, -1, 0}; }},
        {integers, [](Session& s) { s.info.integers["kernel_shape"] = {3, int64_t(1) << 40}; }},
        {"kernel_shape does not divide the columns", [](Session& s) { s.info.integers["kernel_shape"] = {5, 3}; }},
        {"no such attribute", [](Session& s) { s.info.integers.erase("pads"); }},
        {"share must be 1, 2 or 4", [](Session& s) { s.info.attributes["share"] = 3; }},
        {"input bias is not a constant", [](Session& s) { s.info.constants.erase(5); }},
    };
    for (const auto& [text, spoil] : files) {
        Session session(op, SMALL);
        spoil(session);
        const std::string found = session.open();
        if (!expect(found.find(text) != std::string::npos, "expected '" + text + "', found '" + found + "'"))
            return false;
    }
    const std::vector<std::pair<std::string, Spoil>> inputs = {
        {"input x has another number of input channels", [](Session& s) { s.context.inputs[0].shape[1] = 8; }},
        {"input x has another number of input channels", [](Session& s) { s.context.inputs[0].shape.pop_back(); }},
        {"larger than the padded image", [](Session& s) { s.context.inputs[0].shape = {40, 4, 0, 3}; }},
        {"input residual has another shape than y", [](Session& s) { s.context.inputs[6].shape[3]++; }},
    };
    for (const auto& [text, spoil] : inputs) {
        Session session(op, SMALL);
        if (!expect(session.open().empty(), "a good file is refused")) return false;
        spoil(session);
        const std::string found = session.run();
        if (!expect(found.find(text) != std::string::npos, "expected '" + text + "', found '" + found + "'"))
            return false;
    }
    Session session(op, SMALL);
    session.context.inputs[0].shape[0] = session.context.inputs[6].shape[0] = 0;
    return expect(session.open().empty() && session.run().empty() && session.context.memory.empty(),
                  "no images are refused");
}

std::vector<Layer> layers() {
    std::vector<Layer> made;
    const auto add = [&](Window window, std::pair<int64_t, int64_t> size, int64_t channels, int64_t images,
                         int64_t rows) {
        const ConvWindow sized = {window, {size.first, size.second}, {}, channels};
        for (int64_t share : {1, 2, 4})
            made.push_back({sized, images, rows, share, 24, false, -INFINITY, INFINITY});
    };
    const Window same = {{3, 3}, {1, 1}, {1, 1}, {1, 1}, {1, 1}};
    add(same, {7, 7}, 16, 3, 36);
    add({{3, 3}, {2, 2}, {1, 1}, {1, 1}, {1, 1}}, {14, 13}, 8, 2, 20);
    add({{1, 1}, {2, 2}, {1, 1}, {}, {}}, {9, 9}, 8, 2, 20);
    add({{1, 1}, {1, 1}, {1, 1}, {}, {}}, {9, 9}, 8, 2, 20);
    add({{5, 2}, {1, 3}, {2, 1}, {4, 0}, {2, 3}}, {11, 10}, 4, 1, 20);
    add(same, {1, 1}, 8, 1, 8);
    add({{3, 3}, {1, 1}, {1, 1}, {3, 3}, {3, 3}}, {2, 2}, 8, 2, 8);  // outputs that read padding only
    add({{2, 2}, {1, 1}, {1, 1}, {0, 0}, {0, 1}}, {20, 3}, 4, 5, 40);
    add(same, {20, 60}, 4, 1, 36);
    return made;
}

}  // namespace

int main() {
    const OrtApiBase base = {[](uint32_t) { return api(); }, [] { return "a stand-in"; }};
    OrtSessionOptions options;
    if (!expect(text_of(RegisterCustomOps(&options, &base)).empty() && options.domain, "not registered")) return 1;
    int found = 0;
    for (const OrtCustomOp* op : options.domain->operators) {
        const std::string name = op->GetName(op);
        if (name.rfind("NMConv2d", 0) != 0) continue;
        found++;
        for (Layer layer : layers()) {
            layer.adds = name.find("Add") != std::string::npos;
            if (name.find("Relu") != std::string::npos) layer.low = 0;
            if (name.find("Relu6") != std::string::npos) layer.high = 6;
            if (layer.rows % 4 == 0 && !computes(op, layer)) return 1;
        }
        if (name == "NMConv2dAddRelu" && !(survives_failures(op) && refuses(op))) return 1;
    }
    return expect(found == 6, "not all operators are registered") ? 0 : 1;
}
