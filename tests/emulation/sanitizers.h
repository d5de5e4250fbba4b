// What the engine tells the sanitizers; nothing in a build without them. DELTAMEM_EMULATION_RACES is defined
// in the TSan build, whose engine is not instrumented itself.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
#if defined(DELTAMEM_EMULATION_RACES)
#include <sanitizer/tsan_interface.h>
#endif

namespace deltamem::emulation {

#if defined(__SANITIZE_ADDRESS__)
inline void poison_memory(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison_memory(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
inline void on_report(void (*print)(const char*)) { __asan_set_error_report_callback(print); }
#else
inline void poison_memory(const void*, size_t) {}
inline void unpoison_memory(const void*, size_t) {}
inline void on_report(void (*)(const char*)) {}
#endif

// What happened before a release of a tag happened before what follows an acquire of it.
#if defined(DELTAMEM_EMULATION_RACES)
inline constexpr bool kRaces = true;
inline void release(char* tag) { __tsan_release(tag); }
inline void acquire(char* tag) { __tsan_acquire(tag); }
#else
inline constexpr bool kRaces = false;
inline void release(char*) {}
inline void acquire(char*) {}
#endif

}  // namespace deltamem::emulation
