# Builds and runs the C tests in six variants under build/c/VARIANT, and the fuzzer (clang's) under build/fuzz.  Included by the Makefile of the repository.

C_LIBRARY := $(wildcard csrc/core/*.c csrc/kernels/cpu/*.c csrc/kernels/cuda/*.c) csrc/binding/view.c
C_TESTS   := $(wildcard tests/core/test_*.c tests/kernels/test_*.c)
C_SHARED  := $(filter-out $(C_TESTS),$(wildcard tests/core/*.c tests/kernels/*.c))
FUZZ_TARGETS := $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))

C_FLAGS  := -std=c11 -D_GNU_SOURCE -pthread -g -Wall -Wextra -Wshadow -Wconversion -Werror -Icsrc -Itests/core \
            -Itests/kernels -Itests/fuzz -MMD -MP
C_plain    := -O2
C_asan     := -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
C_tsan     := -O1 -fsanitize=thread
C_valgrind := -O1
C_arm      := -O2 -static
C_windows  := -O2 -static -D__USE_MINGW_ANSI_STDIO=1

# Compilers: the machine's own, but for two whose programs run in an emulator.  A Cortex-A53 has the baseline of aarch64
# and nothing else: no half-precision arithmetic, no dot products, no SVE.
C_CC_arm         := aarch64-linux-gnu-gcc
C_CC_windows     := x86_64-w64-mingw32-gcc-posix
EMULATOR_arm     := qemu-aarch64
EMULATOR_windows := wine

C_RUN_plain    :=
C_RUN_asan     := ASAN_OPTIONS=detect_leaks=1:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1
C_RUN_tsan     := TSAN_OPTIONS=halt_on_error=1
C_RUN_arm      := $(EMULATOR_arm) -cpu cortex-a53
C_RUN_windows  := WINEDEBUG=-all WINEPREFIX=$(abspath build/wine) $(EMULATOR_windows)
C_RUN_valgrind := valgrind --quiet --error-exitcode=1 --leak-check=full --errors-for-leak-kinds=all

# $(call c_variant,NAME): objects, programs, and the phony target run-c-NAME.
define c_variant
build/c/$(1)/%.o: %.c
	@mkdir -p $$(@D)
	@echo "$(1) cc $$<"
	@$$(or $$(C_CC_$(1)),$$(CC)) $$(C_FLAGS) $$(C_$(1)) -c $$< -o $$@

build/c/$(1)/%.run: build/c/$(1)/%.o $$(patsubst %.c,build/c/$(1)/%.o,$$(C_LIBRARY) $$(C_SHARED))
	@$$(or $$(C_CC_$(1)),$$(CC)) -pthread $$(C_$(1)) $$^ -lm -o $$@

build/c/$(1)/fuzz_%: build/c/$(1)/tests/fuzz/fuzz_%.o build/c/$(1)/tests/fuzz/replay.o \
                     $$(patsubst %.c,build/c/$(1)/%.o,$$(C_LIBRARY) $$(C_SHARED))
	@$$(or $$(C_CC_$(1)),$$(CC)) -pthread $$(C_$(1)) $$^ -lm -o $$@

.PRECIOUS: build/c/$(1)/%.o build/c/$(1)/%.run
.PHONY: run-c-$(1)
run-c-$(1): $$(patsubst %.c,build/c/$(1)/%.run,$$(C_TESTS)) $$(FUZZ_TARGETS:%=build/c/$(1)/fuzz_%)
	@set -e; for program in $$(filter %.run,$$^); do echo "$(1) run $$$$program"; $$(C_RUN_$(1)) $$$$program; done
	@set -e; for target in $$(FUZZ_TARGETS); do $$(C_RUN_$(1)) build/c/$(1)/fuzz_$$$$target tests/fuzz/seeds/$$$$target/*; done

-include $$(patsubst %.c,build/c/$(1)/%.d,$$(C_LIBRARY) $$(C_SHARED) $$(C_TESTS) tests/fuzz/replay.c \
          $$(FUZZ_TARGETS:%=tests/fuzz/fuzz_%.c))
endef

$(foreach variant,plain asan tsan valgrind arm windows,$(eval $(call c_variant,$(variant))))

# The CUDA backend's own sources as C++ for the CPU, where tests/cuda_host/simt.cpp runs their kernels thread by thread; its
# tests take what they need of the C objects.  gemm.cu, which calls cuBLAS, has a stand-in.
SIMT_KERNELS := $(filter-out csrc/kernels/cuda/gemm.cu,$(wildcard csrc/kernels/cuda/*.cu))
SIMT_TESTS   := $(wildcard tests/cuda_host/test_*.cpp)
SIMT_SHARED  := $(filter-out $(SIMT_TESTS),$(wildcard tests/cuda_host/*.cpp))
SIMT_FLAGS   := -std=c++17 -D_GNU_SOURCE -pthread -g -fPIC -Wall -Wextra -Wshadow -Wno-unknown-pragmas -Werror -Icsrc -Itests/cuda_host \
                -Itests/kernels -MMD -MP
SIMT_C       := csrc/core/status.c csrc/kernels/cuda/plan.c csrc/kernels/cuda/waves.c

# $(call simt_variant,NAME): the same programs, and libcuda_host.so, with which Python tests register this backend.
define simt_variant
build/c/$(1)/%.cu.o: %.cu
	@mkdir -p $$(@D)
	@echo "$(1) c++ $$<"
	@$$(CXX) $$(SIMT_FLAGS) $$(C_$(1)) -x c++ -c $$< -o $$@

build/c/$(1)/%.cpp.o: %.cpp
	@mkdir -p $$(@D)
	@echo "$(1) c++ $$<"
	@$$(CXX) $$(SIMT_FLAGS) $$(C_$(1)) -c $$< -o $$@

SIMT_OBJECTS_$(1) := $$(patsubst %,build/c/$(1)/%.o,$$(SIMT_KERNELS) $$(SIMT_SHARED))
build/c/$(1)/%.cpp.run: build/c/$(1)/%.cpp.o $$(SIMT_OBJECTS_$(1)) \
                        $$(patsubst %.c,build/c/$(1)/%.o,$$(C_LIBRARY) tests/kernels/check.c)
	@$$(CXX) -pthread $$(C_$(1)) $$^ -lm -o $$@

build/c/$(1)/libcuda_host.so: $$(SIMT_OBJECTS_$(1)) $$(SIMT_C)
	@$$(CC) $$(C_FLAGS) $$(C_$(1)) -fPIC -shared -Wl,-Bsymbolic $$(filter %.o %.c,$$^) -lstdc++ -lm -o $$@

.PRECIOUS: build/c/$(1)/%.cu.o build/c/$(1)/%.cpp.o build/c/$(1)/%.cpp.run
.PHONY: run-simt-$(1)
run-simt-$(1): $$(patsubst %,build/c/$(1)/%.run,$$(SIMT_TESTS))
	@set -e; for program in $$^; do echo "$(1) run $$$$program"; $$(C_RUN_$(1)) $$$$program; done

-include $$(SIMT_OBJECTS_$(1):.o=.d) $$(patsubst %,build/c/$(1)/%.d,$$(SIMT_TESTS))
endef

$(foreach variant,plain asan,$(eval $(call simt_variant,$(variant))))

ctest:
	$(MAKE) --no-print-directory -j $(JOBS) run-c-plain run-simt-plain

asan:
	$(MAKE) --no-print-directory -j $(JOBS) run-c-$@ run-simt-$@

tsan valgrind:
	$(MAKE) --no-print-directory -j $(JOBS) run-c-$@

# Each target of tests/fuzz for FUZZ_SECONDS, from the committed seeds on; what it finds is left in build/fuzz/NAME.
FUZZ_CC      ?= clang
FUZZ_SECONDS ?= 600
FUZZ_FLAGS   := -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer

build/fuzz/fuzz_%: tests/fuzz/fuzz_%.c $(wildcard tests/fuzz/*.h tests/core/*.h tests/kernels/*.h csrc/*/*.h csrc/kernels/*/*.h) \
                   $(C_LIBRARY) $(C_SHARED)
	@mkdir -p $(@D)
	@echo "fuzz cc $<"
	@$(FUZZ_CC) $(filter-out -MMD -MP,$(C_FLAGS)) $(FUZZ_FLAGS) $(filter %.c,$^) -lm -o $@

.PRECIOUS: build/fuzz/fuzz_%
.PHONY: fuzz $(FUZZ_TARGETS:%=fuzz-%)
fuzz: $(FUZZ_TARGETS:%=fuzz-%)
$(FUZZ_TARGETS:%=fuzz-%): fuzz-%: fuzz-here build/fuzz/fuzz_%
	@mkdir -p build/fuzz/$*/corpus
	cd build/fuzz/$* && ../fuzz_$* -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=2048 -max_len=1024 \
	    -verbosity=0 -print_final_stats=1 corpus $(abspath tests/fuzz/seeds/$*)

.PHONY: fuzz-here
fuzz-here:
	@echo 'int LLVMFuzzerTestOneInput(void); int LLVMFuzzerTestOneInput(void) { return 0; }' | \
	    $(FUZZ_CC) -fsanitize=fuzzer -x c - -o /dev/null 2>/dev/null || { \
	    echo "make fuzz: $(FUZZ_CC) is not here, or without libFuzzer; on Debian: apt-get install clang" >&2; exit 1; }

# The core asks for nothing beyond ISO C11: no POSIX, no extension.
portable:
	@echo "portable: csrc/core as ISO C11"
	@set -e; for file in $(wildcard csrc/core/*.c); do \
	    $(CC) -std=c11 -pedantic-errors -Wall -Wextra -Werror -Icsrc -fsyntax-only $$file; done

# What has no machine here: NEON on an emulated aarch64, and Windows' threads and C runtime under wine.
NEEDS_arm     := gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user
NEEDS_windows := gcc-mingw-w64-x86-64-posix wine wine64
arm windows: %: %-here
	$(MAKE) --no-print-directory -j $(JOBS) run-c-$@

arm-here windows-here: %-here:
	@for tool in $(C_CC_$*) $(EMULATOR_$*); do command -v $$tool >/dev/null || { \
	    echo "make $*: there is no $$tool here; on Debian: apt-get install $(NEEDS_$*)" >&2; exit 1; }; done
