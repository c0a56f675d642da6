// What is the same for all instruction sets. Compiled without any of them.

#if defined(__x86_64__)
static bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
static bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#else
static bool has_avx2() { return false; }
static bool has_avx512() { return false; }
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of the sources that this was compiled from.
EXPORT const char* venturi_source_hash() { return VENTURI_SOURCE_HASH; }

// Whether this machine can run what is behind `kExpands`.
EXPORT int venturi_expands() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vbmi2") != 0;
#else
    return 0;
#endif
}

// Bit 0: portable, 1: avx2, 2: avx512; what this machine and its system can run.
EXPORT int venturi_instruction_sets() {
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
    return 1 | (has_avx2() ? 2 : 0) | (has_avx512() ? 4 : 0);
}
