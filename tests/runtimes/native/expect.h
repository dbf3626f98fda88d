// Prints what a test found.
#pragma once
#include <cstdio>
#include <string>

namespace mpcompile {

inline bool expect(bool right, const std::string& what) {
    if (!right) std::printf("%s\n", what.c_str());
    return right;
}

}  // namespace mpcompile
