// Tries an operator with each of its calls into ONNX Runtime failing once.
#pragma once
#include <functional>
#include <string>

#include "expect.h"
#include "ort_fakes.h"

namespace mpcompile {

// Calls `attempt` until no call into ONNX Runtime fails in it: in the first attempt the first call fails, then the
// second, and so on. `attempt` opens a session, runs it and returns the text of the first status; it must be that of
// the failed call. More than `least` calls must have failed.
inline bool survives_failing_calls(const std::string& name, int64_t least,
                                   const std::function<std::string()>& attempt) {
    int64_t failures = 0;
    for (bool failed = true; failed; failures += failed) {
        calls_left = failures;
        const std::string text = attempt();
        failed = calls_left < 0;
        calls_left = NEVER;
        if (!expect(text == (failed ? "injected" : ""), name + ", call " + std::to_string(failures) + ": " + text))
            return false;
    }
    return expect(failures > least, name + ": few calls failed: " + std::to_string(failures));
}

}  // namespace mpcompile
