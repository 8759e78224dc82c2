#include "dispatch.h"

#include <algorithm>
#include <stdexcept>

#if defined(QB_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace quantbench {

namespace {

struct Isa {
    const char* name;
    std::vector<std::string> needs;
    const Table* (*table)();
};

#if defined(QB_X86)
#define QB_AVX2_NEEDS "avx2", "fma", "f16c"
#define QB_AVX512_NEEDS QB_AVX2_NEEDS, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"
#endif

const std::vector<Isa>& isas() {  // worst first
    static const std::vector<Isa> all = {
        {"generic", {}, generic_table},
#if defined(QB_X86)
        {"avx2", {QB_AVX2_NEEDS}, avx2_table},
#if defined(QB_HAS_AVXVNNI)
        {"avxvnni", {QB_AVX2_NEEDS, "avx_vnni"}, avxvnni_table},
#endif
        {"avx512vnni", {QB_AVX512_NEEDS}, avx512vnni_table},
#if defined(QB_HAS_AVX512BF16)
        {"avx512bf16", {QB_AVX512_NEEDS, "avx512_bf16", "avx512vbmi", "fast_avx512_bf16"}, avx512bf16_table},
#endif
#if defined(QB_HAS_AMX)
        {"amx", {QB_AVX512_NEEDS, "avx512_bf16", "avx512vbmi", "amx_tile", "amx_int8", "amx_bf16"}, amx_table},
#endif
#endif
    };
    return all;
}

#if defined(QB_X86)

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
}

// The register state that the system saves: 2 and 4 for AVX, 0xe0 for AVX-512, 0x60000 for AMX.
uint64_t saved_state() {
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return low | uint64_t(high) << 32;
}

// Linux gives the tiles' room in the signal frame only to processes that ask for it; the answer holds for all threads.
bool tiles_allowed() {
#if defined(__linux__) && defined(SYS_arch_prctl)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}

bool made_by_amd() { return cpuid(0, 0).b == 0x68747541; }  // "Auth"enticAMD

std::vector<std::string> detect() {
    Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
    std::vector<std::string> found;
    auto add = [&](bool usable, unsigned reg, int bit, const char* name) {
        if (usable && (reg >> bit & 1)) found.push_back(name);
    };
    uint64_t state = one.c >> 27 & 1 ? saved_state() : 0;
    bool avx = (state & 6) == 6, avx512 = avx && (state & 0xe0) == 0xe0, amx = avx512 && (state & 0x60000) == 0x60000;
    add(avx, one.c, 12, "fma");
    add(avx, one.c, 29, "f16c");
    add(avx, seven.b, 5, "avx2");
    add(avx, more.a, 4, "avx_vnni");
    add(avx512, seven.b, 16, "avx512f");
    add(avx512, seven.b, 17, "avx512dq");
    add(avx512, seven.b, 30, "avx512bw");
    add(avx512, seven.b, 31, "avx512vl");
    add(avx512, seven.c, 1, "avx512vbmi");
    add(avx512, seven.c, 11, "avx512_vnni");
    add(avx512, more.a, 5, "avx512_bf16");
    // twice the rate of float32 on AMD's, less than that of float32 on Intel's
    add(avx512 && made_by_amd(), more.a, 5, "fast_avx512_bf16");
    amx = amx && (seven.d >> 24 & 1) && tiles_allowed();
    add(amx, seven.d, 24, "amx_tile");
    add(amx, seven.d, 25, "amx_int8");
    add(amx, seven.d, 22, "amx_bf16");
    return found;
}

#else

std::vector<std::string> detect() { return {}; }

#endif

bool has(const std::vector<std::string>& list, const std::string& name) {
    return std::find(list.begin(), list.end(), name) != list.end();
}

}  // namespace

std::vector<std::string> features() {
    static const std::vector<std::string> found = detect();
    return found;
}

std::vector<Choice> explain(const std::vector<std::string>& features, const std::string& wanted) {
    std::vector<Choice> choices;
    Choice* chosen = nullptr;
    std::string known;
    choices.reserve(isas().size());
    for (const Isa& isa : isas()) {
        Choice& choice = choices.emplace_back(Choice{isa.name, {}, false});
        for (const std::string& need : isa.needs)
            if (!has(features, need)) choice.missing.push_back(need);
        if (!choice.missing.empty()) continue;
        known += (known.empty() ? "" : ", ") + choice.isa;
        if (wanted.empty() || wanted == "auto" || wanted == choice.isa) chosen = &choice;
    }
    if (!chosen) throw std::invalid_argument("instruction set '" + wanted + "' is not one this processor has: " + known);
    chosen->chosen = true;
    return choices;
}

std::vector<std::string> available() {
    std::vector<std::string> names;
    for (const Choice& choice : explain(features(), ""))
        if (choice.missing.empty()) names.push_back(choice.isa);
    return names;
}

const Table& table_of(const std::string& isa) {
    std::vector<Choice> choices = explain(features(), isa);
    size_t i = 0;
    while (!choices[i].chosen) ++i;
    return *isas()[i].table();
}

}  // namespace quantbench
