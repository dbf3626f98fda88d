// Fakes of the functions of ONNX Runtime that the custom operators call, with real threads as the pool. Each call can
// be made to fail.
#pragma once
#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "ort_c_api.h"

struct OrtStatus {
    mpcompile::ort::ErrorCode code;
    std::string text;
};

struct OrtValue {
    std::vector<int64_t> shape;
    void* data;
};

struct OrtTensorTypeAndShapeInfo {
    std::vector<int64_t> shape;
};

struct OrtKernelInfo {
    std::map<std::string, int64_t> attributes;
    std::map<std::string, float> floats;
    std::map<std::string, std::vector<int64_t>> integers;
    std::map<size_t, OrtValue> constants;
};

struct OrtKernelContext {
    std::vector<OrtValue> inputs;
    OrtValue output;
    std::vector<uint8_t> memory;  // of the output
    size_t element_bytes = sizeof(float);
};

struct OrtCustomOpDomain {
    std::vector<const OrtCustomOp*> operators;
};

struct OrtSessionOptions {
    OrtCustomOpDomain* domain = nullptr;
};

extern "C" OrtStatus* RegisterCustomOps(OrtSessionOptions*, const OrtApiBase*);

namespace mpcompile {

constexpr int64_t NEVER = -1;
inline std::atomic<int64_t> calls_left{NEVER};  // calls until one fails
inline std::atomic<int> pool_threads{3};        // that share the items of a ParallelFor

inline OrtStatus* status(const char* text) { return new OrtStatus{ort::FAIL, text}; }

// The status of a call: "injected" if it is this call that must fail.
inline OrtStatus* injected() {
    if (calls_left == NEVER) return nullptr;
    return calls_left-- == 0 ? status("injected") : nullptr;
}

using Table = std::array<const void*, 300>;

inline Table made_table() {
    Table table{};
    const auto set = [&](size_t place, auto* function) { table[place] = reinterpret_cast<const void*>(function); };
    set(0, +[](ort::ErrorCode code, const char* text) { return new OrtStatus{code, text}; });
    set(26, +[](const char*, OrtCustomOpDomain** made) -> OrtStatus* {
        static OrtCustomOpDomain domain;
        *made = &domain;
        return nullptr;
    });
    set(27, +[](OrtCustomOpDomain* domain, const OrtCustomOp* op) -> OrtStatus* {
        domain->operators.push_back(op);
        return nullptr;
    });
    set(28, +[](OrtSessionOptions* options, OrtCustomOpDomain* domain) -> OrtStatus* {
        options->domain = domain;
        return nullptr;
    });
    set(51, +[](OrtValue* value, void** data) {
        OrtStatus* failed = injected();
        if (!failed) *data = value->data;
        return failed;
    });
    set(61, +[](const OrtTensorTypeAndShapeInfo* info, size_t* count) {
        OrtStatus* failed = injected();
        if (!failed) *count = info->shape.size();
        return failed;
    });
    set(62, +[](const OrtTensorTypeAndShapeInfo* info, int64_t* sizes, size_t count) {
        OrtStatus* failed = injected();
        if (!failed) std::copy_n(info->shape.begin(), count, sizes);
        return failed;
    });
    set(65, +[](const OrtValue* value, OrtTensorTypeAndShapeInfo** info) {
        OrtStatus* failed = injected();
        if (!failed) *info = new OrtTensorTypeAndShapeInfo{value->shape};
        return failed;
    });
    set(85, +[](const OrtKernelInfo* info, const char* name, float* value) {
        if (OrtStatus* failed = injected()) return failed;
        if (!info->floats.count(name)) return status("no such attribute");
        *value = info->floats.at(name);
        return static_cast<OrtStatus*>(nullptr);
    });
    set(86, +[](const OrtKernelInfo* info, const char* name, int64_t* value) {
        if (OrtStatus* failed = injected()) return failed;
        if (!info->attributes.count(name)) return status("no such attribute");
        *value = info->attributes.at(name);
        return static_cast<OrtStatus*>(nullptr);
    });
    set(90, +[](const OrtKernelContext* context, size_t index, const OrtValue** value) {
        OrtStatus* failed = injected();
        if (!failed) *value = &context->inputs.at(index);
        return failed;
    });
    set(91, +[](OrtKernelContext* context, size_t, const int64_t* sizes, size_t count, OrtValue** value) {
        OrtStatus* failed = injected();
        if (failed) return failed;
        size_t elements = 1;
        for (size_t i = 0; i < count; i++) elements *= size_t(sizes[i]);
        context->memory.assign(elements * context->element_bytes, 0xc0);
        context->output = {{sizes, sizes + count}, context->memory.data()};
        *value = &context->output;
        return failed;
    });
    set(93, +[](OrtStatus* failed) { delete failed; });
    set(99, +[](OrtTensorTypeAndShapeInfo* info) { delete info; });
    set(163, +[](const OrtKernelInfo* info, const char* name, int64_t* values, size_t* count) {
        if (OrtStatus* failed = injected()) return failed;
        if (!info->integers.count(name)) return status("no such attribute");
        const std::vector<int64_t>& found = info->integers.at(name);
        if (found.size() > *count) return status("more numbers than expected");
        std::copy(found.begin(), found.end(), values);
        *count = found.size();
        return static_cast<OrtStatus*>(nullptr);
    });
    set(249, +[](const OrtKernelInfo* info, size_t index, int* constant, const OrtValue** value) {
        OrtStatus* failed = injected();
        if (failed) return failed;
        const auto found = info->constants.find(index);
        *constant = found != info->constants.end();
        *value = *constant ? &found->second : nullptr;
        return failed;
    });
    set(274, +[](const OrtKernelContext*, void (*run)(void*, size_t), size_t total, size_t, void* data) {
        OrtStatus* failed = injected();
        if (failed) return failed;
        std::atomic<size_t> next{0};
        const auto take = [&] {
            for (size_t item; (item = next++) < total;) run(data, item);
        };
        std::vector<std::thread> others;
        for (int i = 1; i < pool_threads; i++) others.emplace_back(take);
        take();
        for (auto& other : others) other.join();
        return failed;
    });
    return table;
}

inline const void* const* api() {
    static const Table table = made_table();
    return table.data();
}

// Releases a status and returns its text; "" if there is none.
inline std::string text_of(OrtStatus* failed) {
    const std::unique_ptr<OrtStatus> mine(failed);
    return mine ? mine->text : "";
}

}  // namespace mpcompile
