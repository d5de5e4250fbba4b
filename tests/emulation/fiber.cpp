#include "fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(DELTAMEM_EMULATION_RACES)
#include <sanitizer/tsan_interface.h>
#endif

namespace deltamem::emulation {

namespace {

constexpr size_t kStackBytes = 256 * 1024;

// Stacks with a guard page below, kept for the next fiber: the last one used is the one still in the cache.
class StackPool {
 public:
  char* take() {
    if (free_.empty()) return map();
    char* stack = free_.back();
    free_.pop_back();
    return stack;
  }
  void give_back(char* stack) { free_.push_back(stack); }
  // Tops spread over the lines of a page, so that fibers do not fight for the same sets of the cache.
  static char* top(char* stack) {
    const size_t number = reinterpret_cast<uintptr_t>(stack) / kStackBytes;
    return stack + kStackBytes - number * 320 % 4096;
  }

 private:
  char* map() {
    const size_t page = sysconf(_SC_PAGESIZE);
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    return static_cast<char*>(memory) + page;
  }

  std::vector<char*> free_;
};

StackPool pool;

#if defined(DELTAMEM_EMULATION_RACES)
std::vector<void*> tsan_fibers;  // kept: making one costs a millisecond
#endif

}  // namespace

#if defined(__x86_64__)

// Keeps what the calling convention has a callee keep.
extern "C" void deltamem_switch_stacks(void** from, void* to);
asm(R"(
.text
.type deltamem_switch_stacks, @function
deltamem_switch_stacks:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size deltamem_switch_stacks, .-deltamem_switch_stacks
)");

namespace {

// At a function's entry the stack pointer is 8 off a multiple of 16, as after a call.
void* first_frame(char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(StackPool::top(stack)) - 3;
  void** pointer = top - 7;  // six registers and the address that `ret` goes to
  for (void** p = pointer; p < top + 3; ++p) *p = nullptr;
  top[-1] = reinterpret_cast<void*>(entry);
  return pointer;
}
void swap_stacks(void** from, void* to) { deltamem_switch_stacks(from, to); }
void free_frame(void*) {}

}  // namespace

#else

namespace {

void* first_frame(char* stack, void (*entry)()) {
  auto* context = new ucontext_t;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = StackPool::top(stack) - stack;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
void swap_stacks(void** from, void* to) {
  if (*from == nullptr) *from = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(*from), static_cast<ucontext_t*>(to));
}
void free_frame(void* context) { delete static_cast<ucontext_t*>(context); }

}  // namespace

#endif

void Fiber::adopt_caller() {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &size_);
  pthread_attr_destroy(&attributes);
  bottom_ = bottom;
#endif
#if defined(DELTAMEM_EMULATION_RACES)
  tsan_ = __tsan_get_current_fiber();
#endif
}

void Fiber::create() {
#if defined(DELTAMEM_EMULATION_RACES)
  if (tsan_fibers.empty()) {
    tsan_ = __tsan_create_fiber(0);
  } else {
    tsan_ = tsan_fibers.back();
    tsan_fibers.pop_back();
  }
#endif
}

void Fiber::start(void (*entry)()) {
  stack_ = pool.take();
  bottom_ = stack_;
  size_ = kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack_, kStackBytes);  // what an abandoned fiber left
#endif
  stack_pointer_ = first_frame(stack_, entry);
}

void Fiber::destroy() {
#if defined(DELTAMEM_EMULATION_RACES)
  if (tsan_ != nullptr && tsan_ != __tsan_get_current_fiber()) tsan_fibers.push_back(tsan_);
  tsan_ = nullptr;
#endif
  free_frame(stack_pointer_);
  stack_pointer_ = nullptr;
  if (stack_ != nullptr) pool.give_back(stack_);
  stack_ = nullptr;
}

void Fiber::change_to(Fiber& next, [[maybe_unused]] bool last) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack_, next.bottom_, next.size_);
#endif
#if defined(DELTAMEM_EMULATION_RACES)
  __tsan_switch_to_fiber(next.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
  swap_stacks(&stack_pointer_, next.stack_pointer_);
}

void Fiber::switch_to(Fiber& next) {
  change_to(next, false);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

void Fiber::finish_to(Fiber& next) {
  change_to(next, true);
  __builtin_trap();
}

}  // namespace deltamem::emulation
