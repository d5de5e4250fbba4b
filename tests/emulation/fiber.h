// Fibers: stacks that one OS thread runs in turn, known to the sanitizers.
#pragma once

#include <cstddef>

namespace deltamem::emulation {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The OS thread's own stack, which runs now.
  void adopt_caller();
  // Before anything of it can run. TSan does not know that what the caller has done so far comes first.
  void create();
  // Gives it a stack that enters `entry` when first switched to. `entry` never returns: it ends by finish_to.
  void start(void (*entry)());
  bool started() const { return stack_ != nullptr; }
  // By another fiber, once this one has finished or is given up; of the caller, by itself.
  void destroy();

  void switch_to(Fiber& next);
  [[noreturn]] void finish_to(Fiber& next);
  // First thing in an entry.
  void entered();

 private:
  void change_to(Fiber& next, bool last);

  char* stack_ = nullptr;
  void* stack_pointer_ = nullptr;
  const void* bottom_ = nullptr;  // for ASan
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
  void* tsan_ = nullptr;
};

}  // namespace deltamem::emulation
