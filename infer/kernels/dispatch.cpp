#include "dispatch.h"

#include <stdexcept>

namespace quantbench {

std::vector<std::string> available() {
    std::vector<std::string> names{"generic"};
#if defined(QB_X86)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vnni");
    if (avx2) names.push_back("avx2");
    if (avx2 && avx512) names.push_back("avx512vnni");
#endif
    return names;
}

const Table& table_of(const std::string& isa) {
    std::vector<std::string> names = available();
    std::string chosen = isa.empty() || isa == "auto" ? names.back() : isa;
    std::string known;
    for (const std::string& name : names) {
        known += (known.empty() ? "" : ", ") + name;
        if (name != chosen) continue;
#if defined(QB_X86)
        if (name == "avx2") return *avx2_table();
        if (name == "avx512vnni") return *avx512vnni_table();
#endif
        return *generic_table();
    }
    throw std::invalid_argument("instruction set '" + chosen + "' is not one this processor has: " + known);
}

}  // namespace quantbench
