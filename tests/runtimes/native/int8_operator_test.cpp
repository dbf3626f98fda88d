// Tests the int8 operators without ONNX Runtime, for the sanitizers: on fakes of the functions that they call, with
// real threads as the pool, each call and each allocation failing once, and invalid files and inputs. Prints each error
// and returns 1; returns 0 if there is none.
#include <functional>
#include <tuple>

#include "failing_calls.h"
#include "failing_memory.h"
#include "int8_session.h"

using namespace mpcompile;

namespace {

// Right results, the same for 1 to 8 threads of the pool, and in calls from several threads on one session.
bool computes(const OrtCustomOp* op) {
    Session s(op);
    if (!expect(s.open().empty(), s.name + ": a good file is refused")) return false;
    for (const int64_t tokens : {1, 4, 63, 150}) {
        const Inputs in(s, 2, tokens);
        OrtKernelContext first;
        pool_threads = 1;
        bool right = s.run(in.values, first).empty() && is_right(s, in, 2, tokens, 19, first.memory);
        if (!expect(right, s.name + ": wrong results for " + std::to_string(tokens) + " tokens")) return false;
        for (pool_threads = 2; pool_threads <= 8; pool_threads++) {
            OrtKernelContext again;
            right = s.run(in.values, again).empty() && again.memory == first.memory;
            if (!expect(right, s.name + ": the number of threads changes the result")) return false;
        }
        pool_threads = 2;
        std::atomic<bool> same{true};
        std::vector<std::thread> lives;
        for (int i = 0; i < 3; i++)
            lives.emplace_back([&] {
                OrtKernelContext mine;
                if (!s.run(in.values, mine).empty() || mine.memory != first.memory) same = false;
            });
        for (auto& life : lives) life.join();
        if (!expect(same, s.name + ": concurrent calls change the result")) return false;
    }
    for (const auto& [images, tokens] : {std::pair<int64_t, int64_t>{0, 3}, {3, 0}}) {
        const Inputs none(s, images, tokens);
        OrtKernelContext context;
        if (!expect(s.run(none.values, context).empty() && context.memory.empty(), s.name + ": no tokens are refused"))
            return false;
    }
    return true;
}

bool survives_failures(const OrtCustomOp* op) {
    return survives_failing_calls(op->GetName(op), 15, [=] {
        Session s(op);
        const Inputs in(s, 1, 2);
        OrtKernelContext context;
        const std::string text = s.open();
        return text.empty() ? s.run(in.values, context) : text;
    });
}

// Each allocation while a session is made fails once, and the scratch memory of a thread without any.
bool survives_no_memory(const OrtCustomOp* op) {
    if (!survives_failing_news<Session>(op)) return false;
    Session s(op);
    s.open();
    const Inputs in(s, 1, 2);
    std::string text;
    bool failed = false;
    std::thread([&] {
        OrtKernelContext context;
        pool_threads = 1;  // this one
        scratches_left = 0;
        text = s.run(in.values, context);
        failed = scratches_left < 0;
        scratches_left = NEVER;
        if (failed && text.find(": out of memory") != std::string::npos) text = s.run(in.values, context);
    }).join();
    const bool needs_scratch = !s.is("LayerNorm") && !(s.is_gemm() && fastest().gemm.lanes == 0);
    return expect(text.empty() && failed == needs_scratch, s.name + ", no scratch memory: " + text);
}

bool says(const std::string& found, const std::string& wanted, const std::string& name) {
    return expect(found.find(wanted) != std::string::npos, name + ": expected '" + wanted + "', found '" + found + "'");
}

// Invalid files, with their error texts.
bool refuses_files(const OrtCustomOp* op) {
    using Spoil = std::function<void(Session&)>;
    const float infinite = std::numeric_limits<float>::infinity();
    const float not_a_number = std::numeric_limits<float>::quiet_NaN();
    std::vector<std::pair<std::string, Spoil>> files;
    const auto numbers = [&](const char* name, const std::string& text, std::initializer_list<float> wrong) {
        for (const float value : wrong) files.push_back({text, [=](Session& s) { s.info.floats[name] = value; }});
        files.push_back({"no such attribute", [=](Session& s) { s.info.floats.erase(name); }});
    };
    const auto integers = [&](const char* name, const std::string& text, std::initializer_list<int64_t> wrong) {
        for (const int64_t value : wrong) files.push_back({text, [=](Session& s) { s.info.attributes[name] = value; }});
        files.push_back({"no such attribute", [=](Session& s) { s.info.attributes.erase(name); }});
    };
    const std::string scale = "a scale must be between 1e-38 and 1e38, and a zero point between 0 and 255";
    const Session probe(op);
    if (probe.is("Quantize")) {
        numbers("y_scale", scale, {0, -1, 1e-40f, 2e38f, infinite, not_a_number});
        integers("y_zero", scale, {-1, 256, int64_t(1) << 32});
    }
    if (probe.is_gemm()) {
        numbers("x_scale", scale, {0, -1, 1e-40f, infinite, not_a_number});
        integers("x_zero", scale, {-1, 256, int64_t(1) << 32});
        for (const size_t input : {1, 2, 3})
            files.push_back({"must be constants", [=](Session& s) { s.info.constants.erase(input); }});
        const std::string shapes = "the weight must be (columns, rows), its scale and the bias (rows)";
        for (const Sizes& shape : {Sizes{}, {ROWS}, {COLUMNS, ROWS, 1}, {0, ROWS}, {COLUMNS, 0}, {COLUMNS, ROWS + 1}})
            files.push_back({shapes, [=](Session& s) { s.info.constants[1].shape = shape; }});
        for (const Sizes& shape : {Sizes{}, {1}, {ROWS + 1}, {1, ROWS}})
            for (const size_t input : {2, 3})
                files.push_back({shapes, [=](Session& s) { s.info.constants[input].shape = shape; }});
        files.push_back({"65,536 input channels", [](Session& s) { s.info.constants[1].shape = {65537, ROWS}; }});
        files.push_back({"more than 8 dimensions", [](Session& s) { s.info.constants[1].shape = Sizes(9, 1); }});
    } else if (probe.is("LayerNorm")) {
        numbers("epsilon", "epsilon must be 0 or more, and finite", {-1e-5f, infinite, not_a_number});
    } else {
        numbers("scale", "the scale must be finite", {infinite, not_a_number});
        for (const char* name : {"heads", "dim", "q_offset", "k_offset", "v_offset", "first_query", "queries"})
            integers(name, "an attribute is out of range", {-1, int64_t(1) << 40});
        integers("heads", "heads must be positive", {0});
        integers("dim", "dim between 1 and 512", {0, 513});
    }
    for (const auto& [text, spoil] : files) {
        Session s(op);
        spoil(s);
        if (!says(s.open(), text, s.name)) return false;
    }
    return true;
}

// Inputs of other shapes, with their error texts.
bool refuses_inputs(const OrtCustomOp* op) {
    Session s(op);
    if (!expect(s.open().empty(), s.name + ": a good file is refused")) return false;
    std::vector<std::tuple<std::string, size_t, Sizes>> wrong;  // the text, the input, its shape
    if (s.is_gemm()) {
        for (const Sizes& shape : {Sizes{}, {1, 2, COLUMNS - 1}, {COLUMNS, 2, 1}})
            wrong.push_back({"another number of input channels", 0, shape});
        for (const Sizes& shape : {Sizes{}, {ROWS}, {1, 1, ROWS}, {2, ROWS}, {1, 2, 1}})
            if (s.is("Add")) wrong.push_back({"the residual has another shape", 4, shape});
    } else if (s.is("LayerNorm")) {
        wrong.push_back({"x has no dimensions", 0, {}});
        for (const size_t input : {1, 2})
            for (const Sizes& shape : {Sizes{}, {1}, {COLUMNS + 1}, {1, COLUMNS}})
                wrong.push_back({"one value for each channel", input, shape});
    } else {
        const std::string text = "q, k and v must be (images, tokens, channels), and hold all heads";
        for (const size_t input : {0, 1, 2})
            for (const Sizes& shape : {Sizes{}, {1, WIDTH}, {1, 2, WIDTH - 1}, {1, 1, 2, WIDTH}, {2, 19, WIDTH}})
                if (input || shape != Sizes{2, 19, WIDTH}) wrong.push_back({text, input, shape});
        wrong.push_back({text, 1, {1, 19, WIDTH + 1}});  // shorter than k_offset and all heads
        wrong.push_back({text, 2, {1, 18, WIDTH + 1}});
        const Sizes biases[] = {{}, {1}, {18}, {3, 19}, {2, 2, 19}, {2, 3, 2, 19}, {1, 1, 3, 2, 19}};
        if (s.is("Biased"))
            for (const Sizes& shape : biases) wrong.push_back({"does not fit", 3, shape});
    }
    wrong.push_back({"more than 8 dimensions", 0, Sizes(9, 1)});
    for (const auto& [text, input, shape] : wrong) {
        Inputs in(s, 1, 2);
        in.values[input].shape = shape;
        OrtKernelContext context;
        if (!says(s.run(in.values, context), text, s.name)) return false;
    }
    OrtKernelContext context;
    return !s.is("Attention") || says(s.run(Inputs(s, 1, 2, 0).values, context), "there are no keys", s.name);
}

}  // namespace

int main() {
    const OrtApiBase base = {[](uint32_t) { return api(); }, [] { return "a stand-in"; }};
    OrtSessionOptions options;
    if (!expect(text_of(RegisterCustomOps(&options, &base)).empty() && options.domain, "not registered")) return 1;
    int tested = 0;
    for (const OrtCustomOp* op : options.domain->operators) {
        const std::string name = op->GetName(op);
        if (name == "NMGemm" || name == "NMConv") continue;  // operator_test.cpp tests these
        if (name.find("NMConv2d") == 0) continue;            // conv_test.cpp these
        if (name.find("NMConvInt8") == 0 || name == "MaxPoolInt8") continue;  // and int8_conv_test.cpp these
        for (const auto test : {computes, survives_failures, survives_no_memory, refuses_files, refuses_inputs})
            if (!test(op)) return 1;
        tested++;
    }
    return expect(tested == 11, std::to_string(tested) + " operators were found") ? 0 : 1;
}
