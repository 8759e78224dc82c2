// Compiled once per instruction set, with QB_ISA (see dispatch.cpp) and the compiler flags that belong to it.
#include "attention.h"
#include "linear.h"
#include "observe.h"
#include "rows.h"

#define QB_TEXT(x) #x
#define QB_STRING(x) QB_TEXT(x)
#define QB_JOIN(a, b) a##b
#define QB_TABLE(isa) QB_JOIN(isa, _table)

namespace quantbench {

const Table* QB_TABLE(QB_ISA)() {
    static const Table table = {
        QB_STRING(QB_ISA), QB_ISA::kDotRows, QB_ISA::split, QB_ISA::prepared_bytes, QB_ISA::prepare, QB_ISA::linear,
        QB_ISA::quantize, QB_ISA::add_norm, QB_ISA::silu_mul, QB_ISA::rope_write, QB_ISA::attention, QB_ISA::decode,
        QB_ISA::embed, QB_ISA::observe, QB_ISA::absmax, QB_ISA::peak_float, QB_ISA::peak_int8, QB_ISA::read_all,
    };
    return &table;
}

}  // namespace quantbench
