// Contexts of execution on this thread of the system: one saves its registers, another goes on.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#define CUDA_EMULATION_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define CUDA_EMULATION_ASAN
#endif
#endif
#ifdef CUDA_EMULATION_ASAN
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__) && !defined(CUDA_EMULATION_UCONTEXT)
#define CUDA_EMULATION_UCONTEXT
#endif
#ifdef CUDA_EMULATION_UCONTEXT
#include <ucontext.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define CUDA_EMULATION_OPAQUE __attribute__((noinline, noipa))
#else
#define CUDA_EMULATION_OPAQUE __attribute__((noinline))
#endif

namespace cuda_emulation {

struct Context {
#ifdef CUDA_EMULATION_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer;
#endif
#ifdef CUDA_EMULATION_ASAN
  const void* bottom;
  size_t size;
  void* fake_stack;
#endif
};

#ifdef CUDA_EMULATION_UCONTEXT

inline void prepare(Context& context, char* bottom, char* top, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = bottom;
  context.registers.uc_stack.ss_size = static_cast<size_t>(top - bottom);
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

inline void swap_registers(Context& from, Context& to) {
  swapcontext(&from.registers, &to.registers);
}

#else

inline void prepare(Context& context, char*, char* top, void (*entry)()) {
  void** stack = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(15)) - 2;
  stack[0] = reinterpret_cast<void*>(entry);
  stack[1] = nullptr;  // where a return address would be
  context.stack_pointer = stack;
}

// The compiler saves what the asm names, and the caller what a call may change; rbp can't be named.
CUDA_EMULATION_OPAQUE inline void swap_registers(Context& from, Context& to) {
  void** save = &from.stack_pointer;
  void* load = to.stack_pointer;
  asm volatile("leaq -128(%%rsp), %%rsp\n\t"  // the red zone may be in use
               "pushq %%rbp\n\t"
               "leaq 1f(%%rip), %%rax\n\t"
               "pushq %%rax\n\t"
               "movq %%rsp, (%%rdi)\n\t"
               "movq %%rsi, %%rsp\n\t"
               "popq %%rax\n\t"
               "jmpq *%%rax\n"
               "1:\n\t"
               "popq %%rbp\n\t"
               "leaq 128(%%rsp), %%rsp\n\t"
               : "+D"(save), "+S"(load)
               :
               : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
                 "memory", "cc");
}

#endif

inline void switch_context(Context& from, Context& to) {
#ifdef CUDA_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
#endif
  swap_registers(from, to);
#ifdef CUDA_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace cuda_emulation
