// Peak rates of instructions that one instruction set has and the others do not.
#pragma once

#include <cstdint>
#include <string>

namespace quantbench {

using Peak = double (*)(int64_t rounds);  // operations done, as in observe.h

// Of products of such a `kind` (int8, bf16) on an instruction set; null where its table knows better.
Peak peak_of(const std::string& isa, const std::string& kind);

}  // namespace quantbench
