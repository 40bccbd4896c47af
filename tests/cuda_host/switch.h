/* Stacks that run in turns; simt.cpp alone includes it. */
#ifndef LP_TESTS_SWITCH_H
#define LP_TESTS_SWITCH_H

#include <stddef.h>
#include <stdint.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

/* One stack's place of execution.  swapcontext would ask the kernel for the signal mask at every switch, of which there are
 * millions, so x86-64 has a switch of its own. */
#if defined(__x86_64__)
struct place {
    void *stack_pointer;
};

extern "C" void simt_switch(place *from, const place *to);
asm(".text\n"
    ".type simt_switch, @function\n"
    "simt_switch:\n"
    "    pushq %rbp\n    pushq %rbx\n    pushq %r12\n    pushq %r13\n    pushq %r14\n    pushq %r15\n"
    "    movq %rsp, (%rdi)\n"
    "    movq (%rsi), %rsp\n"
    "    popq %r15\n    popq %r14\n    popq %r13\n    popq %r12\n    popq %rbx\n    popq %rbp\n"
    "    ret\n"
    ".size simt_switch, . - simt_switch\n");

static inline void prepare(place *p, unsigned char *stack, size_t bytes, void (*entry)())
{
    void **top = (void **)(((uintptr_t)stack + bytes) & ~(uintptr_t)15);

    *--top = NULL; /* the return address of entry, which never returns; keeps the stack aligned as calls do */
    *--top = (void *)entry;
    for (int i = 0; i < 6; i++)
        *--top = NULL;
    p->stack_pointer = top;
}
#else
typedef ucontext_t place;

static inline void simt_switch(place *from, const place *to)
{
    swapcontext(from, to);
}

static inline void prepare(place *p, unsigned char *stack, size_t bytes, void (*entry)())
{
    getcontext(p);
    p->uc_stack.ss_sp = stack;
    p->uc_stack.ss_size = bytes;
    p->uc_link = NULL;
    makecontext(p, entry, 0);
}
#endif

#endif
