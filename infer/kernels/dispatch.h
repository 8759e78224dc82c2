// Which instruction set runs: the best one this processor has, or the one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "table.h"

namespace quantbench {

std::vector<std::string> available();          // best last
const Table& table_of(const std::string& isa);  // "" or "auto": the best; throws std::invalid_argument

}  // namespace quantbench
