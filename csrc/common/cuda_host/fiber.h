// SPDX-License-Identifier: Apache-2.0
// A fiber: a function on a stack of its own that runs until it suspends itself or returns. One
// thread holds them all, so nothing runs at the same time and every order is chosen.
#pragma once
#include <cstddef>
#include <memory>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace pentad::cuda_host {

#if defined(__x86_64__)
using Context = void*;  // a stack pointer, above which the registers lie
#else
using Context = ucontext_t;
#endif

class Fiber {
 public:
  // Prepares entry(argument), which must end in finish(), on this fiber's stack. What ran on it
  // before and never finished is forgotten without unwinding.
  void start(void (*entry)(void*), void* argument);
  // Runs it until it suspends or finishes.
  void resume();
  // To the caller of resume(); only from within, as finish().
  void suspend();
  [[noreturn]] void finish();
  void begin();  // the first frame on the stack

 private:
  std::unique_ptr<char[]> stack_;
  Context here_{}, caller_{};  // where the fiber and its resumer stand while they do not run
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  // What the address sanitizer is told at each change of stacks.
  void *fake_stack_ = nullptr, *caller_fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_size_ = 0;
};

}  // namespace pentad::cuda_host
