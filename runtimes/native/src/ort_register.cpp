// Registers the custom operators with ONNX Runtime.
#include "ort_operators.h"

namespace mpcompile {
namespace {

// One domain for the life of the process: sessions keep pointers to it. The library is linked so that it stays loaded.
struct Domain {
    OrtCustomOpDomain* made = nullptr;
    OrtStatus* failed = nullptr;

    explicit Domain(const void* const* api) {
        failed = ort::CreateCustomOpDomain::call(api, "mpcompile", &made);
        for (const auto* operators :
             {&float_operators(), &conv_operators(), &int8_gemm_operators(), &int8_conv_operators(),
              &int8_pool_operators(), &int8_fusion_operators()})
            for (const OrtCustomOp* op : *operators)
                if (!failed) failed = ort::CustomOpDomainAdd::call(api, made, op);
    }
};

}  // namespace
}  // namespace mpcompile

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
    using namespace mpcompile;
    const void* const* api = base->GetApi(ort::API_VERSION);
    if (!api)
        return nullptr;  // older than 1.17: no status can be created; the session then reports an unknown operator
    static const Domain domain(api);
    if (domain.failed) return ort::CreateStatus::call(api, ort::FAIL, "mpcompile: the operator cannot be registered");
    return ort::AddCustomOpDomain::call(api, options, domain.made);
}
