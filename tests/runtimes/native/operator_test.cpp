// Tests the operator without ONNX Runtime, for the sanitizers: with fakes of the functions that it calls, real threads
// as the pool, and each of its calls failing once. Prints each error and returns 1; returns 0 if there is none.
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "expect.h"
#include "failing_calls.h"
#include "ort_fakes.h"
#include "streams.h"

using namespace mpcompile;

namespace {

// An operator with its weights, as a session holds it.
struct Session {
    const OrtCustomOp* op;
    OrtKernelInfo info;
    void* kernel = nullptr;

    Session(const OrtCustomOp* op, Streams& streams) : op(op) {
        const Weights& w = streams.weights;
        info.attributes = {
            {"rows", w.rows}, {"columns", w.columns}, {"share", w.rows_per_pattern},
            {"block", w.block}, {"chunk", w.chunk}};
        info.constants = {{1, {{w.blocks, w.row_groups, w.nonzeros, w.group_rows()}, streams.values.data()}},
                          {2, {{w.blocks, w.row_groups, w.nonzeros, w.group_indices()}, streams.indices.data()}},
                          {3, {{w.blocks, w.row_groups}, streams.common.data()}},
                          {4, {{w.blocks, w.row_groups, w.group_rows()}, streams.order.data()}},
                          {5, {{w.rows}, streams.bias.data()}}};
    }
    Session(const Session&) = delete;
    ~Session() { close(); }

    std::string open() { return text_of(op->CreateKernelV2(op, api(), &info, &kernel)); }

    void close() {
        if (kernel) op->KernelDestroy(kernel);
        kernel = nullptr;
    }

    std::string run(std::vector<float>& x, const std::vector<int64_t>& shape, OrtKernelContext& context) const {
        context.inputs = {{shape, x.data()}};
        for (const auto& constant : info.constants) context.inputs.push_back(constant.second);
        return text_of(op->KernelComputeV2(kernel, &context));
    }
};

std::vector<float> random_floats(int64_t count) {
    std::vector<float> made(size_t(count), 0.0f);
    for (float& value : made) value = normal();
    return made;
}

std::vector<float> floats_of(const OrtKernelContext& context) {
    std::vector<float> floats(context.memory.size() / sizeof(float));
    std::copy_n(context.memory.data(), context.memory.size(), reinterpret_cast<uint8_t*>(floats.data()));
    return floats;
}

// `pixels` 0: channels-last.
bool is_product(const Streams& streams, const std::vector<float>& x, const std::vector<float>& y, int64_t images,
                int64_t pixels) {
    const Weights& w = streams.weights;
    const int64_t each = pixels ? pixels : 1;
    if (y.size() != size_t(images * each * w.rows)) return false;
    for (int64_t image = 0; image < images; image++)
        for (int64_t row = 0; row < w.rows; row++)
            for (int64_t pixel = 0; pixel < each; pixel++) {
                double sum = streams.bias[row], size = std::fabs(sum);
                for (int64_t k = 0; k < w.columns; k++) {
                    const double term = double(streams.at(row, k)) * x[(image * w.columns + k) * each + pixel];
                    sum += term;
                    size += std::fabs(term);
                }
                // Each of at most `columns` additions rounds by 2^-24 of at most `size`.
                if (std::fabs(y[(image * w.rows + row) * each + pixel] - sum) > (w.columns + 1) * 0x1p-24 * size)
                    return false;
            }
    return true;
}

// Calls of every size from several threads on one session; the first calls with few tokens run concurrently.
bool computes(const OrtCustomOp* op, int64_t share, bool channels) {
    Streams streams({36, 72, share, 2, 4, 24, 16, 0, 0});
    Session session(op, streams);
    if (!expect(session.open().empty(), "a good file is refused")) return false;
    std::vector<std::vector<float>> inputs;
    const std::vector<int64_t> sizes = {1, 5, 16, 40};
    for (int64_t size : sizes) inputs.push_back(random_floats(size * 72));
    std::atomic<bool> right{true};
    const auto life = [&] {
        OrtKernelContext context;
        for (int round = 0; round < 3; round++)
            for (size_t i = 0; i < sizes.size(); i++) {
                const int64_t images = channels ? 1 : sizes[i], pixels = channels ? sizes[i] : 0;
                const std::vector<int64_t> shape =
                    channels ? std::vector<int64_t>{1, 72, 1, pixels} : std::vector<int64_t>{1, images, 72};
                if (!session.run(inputs[i], shape, context).empty() ||
                    !is_product(streams, inputs[i], floats_of(context), images, pixels))
                    right = false;
            }
    };
    std::vector<std::thread> lives;
    for (int i = 0; i < 3; i++) lives.emplace_back(life);
    for (auto& one : lives) one.join();
    OrtKernelContext context;
    std::vector<float> none;
    const std::vector<int64_t> shape = channels ? std::vector<int64_t>{1, 72, 0} : std::vector<int64_t>{0, 72};
    return expect(right, "wrong results for share " + std::to_string(share)) &&
           expect(session.run(none, shape, context).empty() && context.memory.empty(), "no tokens are refused");
}

bool survives_failures(const OrtCustomOp* op) {
    Streams streams({36, 72, 1, 2, 4, 24, 16, 0, 0});
    std::vector<float> x = random_floats(2 * 72);
    OrtKernelContext context;
    return survives_failing_calls(op->GetName(op), 30, [&] {
        Session session(op, streams);
        const std::string text = session.open();
        return text.empty() ? session.run(x, {2, 72}, context) : text;
    });
}

// Invalid files and inputs, with their error texts.
bool refuses(const OrtCustomOp* op) {
    using Spoil = std::function<void(Session&, Streams&)>;
    const std::vector<std::pair<std::string, Spoil>> files = {
        {"share must be 1, 2 or 4", [](Session& s, Streams&) { s.info.attributes["share"] = 3; }},
        {"NMGemm: rows", [](Session& s, Streams&) { s.info.attributes["rows"] = 0; }},
        {"NMGemm: columns", [](Session& s, Streams&) { s.info.attributes["columns"] = int64_t(1) << 40; }},
        {"NMGemm: block", [](Session& s, Streams&) { s.info.attributes["block"] = 65535; }},
        {"chunk must be a multiple of 4", [](Session& s, Streams&) { s.info.attributes["chunk"] = 18; }},
        {"input bias is not a constant", [](Session& s, Streams&) { s.info.constants.erase(5); }},
        {"input values has another shape", [](Session& s, Streams&) { s.info.constants[1].shape.pop_back(); }},
        {"input common has another shape", [](Session& s, Streams&) { s.info.constants[3].shape[0]++; }},
        {"more than 8 dimensions", [](Session& s, Streams&) { s.info.constants[2].shape.assign(9, 1); }},
        {"input places is out of bounds", [](Session&, Streams& streams) { streams.indices.back() = 25; }},
        {"input common is out of bounds", [](Session&, Streams& streams) { streams.common.back() = 99; }},
        {"input order is out of bounds", [](Session&, Streams& streams) { streams.order.front() = -1; }},
        {"input order is out of bounds", [](Session&, Streams& streams) { streams.order.front() = 35; }},
        {"input order does not name each row once",
         [](Session&, Streams& streams) { streams.order[0] = streams.order[1]; }},
    };
    for (const auto& [text, spoil] : files) {
        Streams streams({36, 72, 1, 2, 4, 24, 16, 0, 0});
        Session session(op, streams);
        spoil(session, streams);
        const std::string found = session.open();
        if (!expect(found.find(text) != std::string::npos, "expected '" + text + "', found '" + found + "'"))
            return false;
    }
    Streams streams({36, 72, 1, 2, 4, 24, 16, 0, 0});
    Session session(op, streams);
    if (!expect(session.open().empty(), "a good file is refused")) return false;
    std::vector<float> x = random_floats(72);
    OrtKernelContext context;
    for (const std::vector<int64_t>& shape : {std::vector<int64_t>{}, {1, 36}, std::vector<int64_t>(9, 1)})
        if (!expect(!session.run(x, shape, context).empty(), "an input of another shape is taken")) return false;
    return true;
}

}  // namespace

int main() {
    const OrtApiBase base = {[](uint32_t) { return api(); }, [] { return "a stand-in"; }};
    OrtSessionOptions options;
    if (!expect(text_of(RegisterCustomOps(&options, &base)).empty() && options.domain, "not registered")) return 1;
    const std::vector<const OrtCustomOp*>& operators = options.domain->operators;
    for (const OrtCustomOp* op : operators) {
        const std::string name = op->GetName(op);
        const bool channels = name == "NMConv";
        if (!channels && name != "NMGemm") continue;  // int8_operator_test.cpp tests the others
        for (int64_t share : {1, 2, 4})
            if (!computes(op, share, channels)) return 1;
        if (!channels && !(survives_failures(op) && refuses(op))) return 1;
    }
    return 0;
}
