// Which instruction set runs: the best one this processor has, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace quantbench {

struct Choice {
    std::string isa;
    std::vector<std::string> missing;  // features that it needs and that are not there
    bool chosen;
};

std::vector<std::string> features();  // of this processor that its system lets us use, as /proc/cpuinfo names them;
                                      // fast_avx512_bf16 besides

// Every instruction set that kernels exist for, worst first, and which of them runs on a processor with such features:
// `wanted`, or the best for "" and "auto". Depends on nothing else. Throws std::invalid_argument where it cannot be had.
std::vector<Choice> explain(const std::vector<std::string>& features, const std::string& wanted);

std::vector<std::string> available();           // best last
const Table& table_of(const std::string& isa);  // "" or "auto": the best; throws std::invalid_argument

}  // namespace quantbench
