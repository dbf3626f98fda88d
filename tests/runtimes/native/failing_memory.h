// Allocations that can be made to fail. Included by one source file of a program, as it replaces operator new.
#pragma once
#include <errno.h>
#include <stdlib.h>

#include <atomic>
#include <cstddef>
#include <new>

#include "expect.h"
#include "ort_fakes.h"

namespace mpcompile {

inline std::atomic<int64_t> news_left{NEVER}, scratches_left{NEVER};  // allocations until one fails

inline bool fails(std::atomic<int64_t>& left) { return left != NEVER && left-- == 0; }

// Opens sessions of an operator, with each of its allocations failing once: each time that must be reported.
template <typename Session>
bool survives_failing_news(const OrtCustomOp* op) {
    int64_t failures = 0;
    for (bool failed = true; failed; failures += failed) {
        Session session(op);
        news_left = failures;
        const std::string text = session.open();
        failed = news_left < 0;
        news_left = NEVER;
        if (!expect(failed ? text.find(": out of memory") != std::string::npos : text.empty(),
                    session.name + ", no memory for allocation " + std::to_string(failures) + ": " + text))
            return false;
    }
    return expect(failures > 0, "no allocation was made to fail");
}

inline void* allocated(size_t size, size_t align) {
    void* made = fails(news_left) ? nullptr : aligned_alloc(align, (size + align) / align * align);
    if (!made) throw std::bad_alloc();
    return made;
}

}  // namespace mpcompile

void* operator new(size_t size) { return mpcompile::allocated(size, alignof(std::max_align_t)); }
void* operator new(size_t size, std::align_val_t align) { return mpcompile::allocated(size, size_t(align)); }
void* operator new(size_t size, const std::nothrow_t&) noexcept {
    return mpcompile::fails(mpcompile::news_left) ? nullptr : malloc(size);
}
void operator delete(void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { free(memory); }
extern "C" int posix_memalign(void** memory, size_t align, size_t size) noexcept {
    const bool failed = mpcompile::fails(mpcompile::scratches_left);
    *memory = failed ? nullptr : aligned_alloc(align, (size + align) / align * align);
    return *memory ? 0 : ENOMEM;
}

