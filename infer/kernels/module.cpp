// quantbench._kernels: what Python sees.
#include <cstdlib>

#include "dispatch.h"
#include "kernels.h"
#include "pool.h"
#include "step.h"

namespace quantbench {

namespace {

PackedWeight* pack(int kind, std::vector<ConstBytes> codes, std::optional<ConstFloats> scale,
                   std::optional<Array<const int32_t, 2>> zero, int64_t group_size, std::optional<ConstVector> bias) {
    require(kind >= 0 && kind <= int(Kind::int8_dot), "kind of weight");
    require(!codes.empty() && codes[0].ndim() == 2, "a weight must be [N, K]");
    int64_t columns = int64_t(codes[0].shape(1));
    size_t bytes = Kind(kind) == Kind::f32 ? 4 : kind <= int(Kind::f16) ? 2 : 1;
    std::vector<const void*> codes_of;  // of every row
    for (const ConstBytes& part : codes) {
        require(part.ndim() == 2 && int64_t(part.shape(1)) == columns, "weights below each other must be [n, K]");
        require(part.itemsize() == bytes, "weight codes have the wrong size for their kind");
        for (size_t n = 0; n < part.shape(0); ++n)
            codes_of.push_back(static_cast<const uint8_t*>(part.data()) + n * size_t(columns) * bytes);
    }
    int64_t rows = int64_t(codes_of.size());
    int64_t groups = scale ? int64_t(scale->shape(1)) : 1;
    require(!scale || int64_t(scale->shape(0)) == rows, "scale must be [N, groups]");
    require(group_size > 0 && (columns + group_size - 1) / group_size == groups, "groups must cover the columns");
    require(!zero || (scale && zero->shape(0) == scale->shape(0) && zero->shape(1) == scale->shape(1)), "zero must be like scale");
    require(!bias || int64_t(bias->shape(0)) == rows, "bias must be [N]");
    require(Kind(kind) != Kind::int8_dot || (scale && groups == 1 && !zero && columns <= 65536),
            "int8 activations need one scale per channel, no zero points and at most 65536 columns");
    Source source{Kind(kind), rows, columns, std::move(codes_of), scale ? scale->data() : nullptr, zero ? zero->data() : nullptr,
                  groups, group_size, bias ? bias->data() : nullptr};
    Release release(rows * columns);
    return new PackedWeight(source);
}

// What QUANTBENCH_ISA asks for, else the best.
std::string isa_in_use() {
    const char* wanted = std::getenv("QUANTBENCH_ISA");
    return table_of(wanted ? wanted : "").name;
}

// This machine's limits with `threads` threads (0: those of the pool): the denominators of every share.
nb::dict ceilings(int threads) {
    require(threads >= 0 && threads <= 1024, "threads must be between 0 and 1024");
    int before = Pool::shared()->threads();
    if (threads && threads != before) set_threads(threads);
    Kernels kernels(isa_in_use());
    nb::dict found;
    found["read_gb_per_s"] = kernels.read_gb_per_s(int64_t(256) << 20, 5);
    found["float32_gop_per_s"] = kernels.gop_per_s("float32", 0.25);
    found["int8_gop_per_s"] = kernels.gop_per_s("int8", 0.25);
    found["bf16_gop_per_s"] = kernels.gop_per_s("bf16", 0.25);
    if (threads && threads != before) set_threads(before);
    return found;
}

}  // namespace

NB_MODULE(_kernels, m) {
    using namespace nb::literals;
    m.doc() = "CPU kernels of quantbench. Arrays are taken as they are: C-contiguous, of the exact dtype.";
    m.def("available", &available, "Instruction sets of this processor that kernels exist for, best last.");
    m.def("features", &features, "Features of this processor that kernels may need and its system lets us use.");
    m.def("explain", [](std::optional<std::vector<std::string>> of, const std::string& wanted) {
        nb::list choices;
        for (const Choice& c : explain(of ? *of : features(), wanted)) choices.append(nb::make_tuple(c.isa, c.missing, c.chosen));
        return choices;
    }, "features"_a.none() = nb::none(), "wanted"_a = "",
          "Of every instruction set, worst first: its name, the features it misses, and whether it is the one that runs.");
    m.def("isa", &isa_in_use, "The instruction set in use: QUANTBENCH_ISA, else the best.");
    m.def("ceilings", &ceilings, "threads"_a = 0, "read_gb_per_s and float32_, int8_ and bf16_gop_per_s, measured.");
    m.def("set_threads", [](int n) {
        require(n >= 1 && n <= 1024, "threads must be between 1 and 1024");
        nb::gil_scoped_release release;
        set_threads(n);
    }, "threads"_a);
    m.def("threads", [] { return Pool::shared()->threads(); });
    m.def("processors", &affinity_count, "Processors this process may run on.");
    m.def("pack", &pack, "kind"_a, "codes"_a.noconvert(), "scale"_a.noconvert().none(), "zero"_a.noconvert().none(),
          "group_size"_a, "bias"_a.noconvert().none(), nb::rv_policy::take_ownership);

    nb::class_<PackedWeight>(m, "PackedWeight")
        .def_prop_ro("nbytes", &PackedWeight::bytes)
        .def_prop_ro("shape", [](const PackedWeight& w) { return nb::make_tuple(w.view().rows, w.view().columns); });

    nb::class_<Kernels>(m, "Kernels")
        .def(nb::init<const std::string&>(), "isa"_a)
        .def_prop_ro("isa", &Kernels::isa)
        .def("linear", &Kernels::linear, "weight"_a, "values"_a.noconvert().none(), "codes"_a.noconvert().none(), "format"_a,
             "a_scale"_a.noconvert().none(), "y"_a.noconvert(), "column"_a)
        .def("quantize", &Kernels::quantize, "x"_a.noconvert(), "format"_a, "scale"_a.none(), "codes"_a.noconvert(), "scales"_a.noconvert())
        .def("add_norm", &Kernels::add_norm, "x"_a.noconvert(), "delta"_a.noconvert().none(), "weight"_a.noconvert(), "eps"_a,
             "values"_a.noconvert().none(), "format"_a, "scale"_a.none(), "codes"_a.noconvert().none(), "scales"_a.noconvert().none())
        .def("silu_mul", &Kernels::silu_mul, "gate_up"_a.noconvert(), "values"_a.noconvert().none(), "format"_a, "scale"_a.none(),
             "codes"_a.noconvert().none(), "scales"_a.noconvert().none())
        .def("rope_write", &Kernels::rope_write, "qkv"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(),
             "cos"_a.noconvert(), "sin"_a.noconvert(), "q_norm"_a.noconvert().none(), "k_norm"_a.noconvert().none(), "eps"_a, "kind"_a,
             "k"_a.noconvert(), "v"_a.noconvert(), "k_scale"_a.noconvert(), "v_scale"_a.noconvert(), "q"_a.noconvert())
        .def("attention", &Kernels::attention, "q"_a.noconvert(), "starts"_a.noconvert(), "context"_a.noconvert(),
             "tables"_a.noconvert(), "kind"_a, "k"_a.noconvert(), "v"_a.noconvert(), "k_scale"_a.noconvert(),
             "v_scale"_a.noconvert(), "window"_a, "out"_a.noconvert())
        .def("embed", &Kernels::embed, "table"_a, "ids"_a.noconvert(), "out"_a.noconvert())
        .def("observe", &Kernels::observe, "x"_a.noconvert(), "rows"_a, "limit"_a.noconvert(), "channel_absmax"_a.noconvert(),
             "channel_sum"_a.noconvert(), "minimum"_a.noconvert(), "maximum"_a.noconvert(), "histogram"_a.noconvert())
        .def("absmax", &Kernels::absmax, "x"_a.noconvert(), "rows"_a, "out"_a.noconvert())
        .def("read_gb_per_s", &Kernels::read_gb_per_s, "bytes"_a, "rounds"_a)
        .def("gop_per_s", &Kernels::gop_per_s, "kind"_a, "seconds"_a);

    nb::class_<Linears>(m, "Linears")
        .def(nb::init<int, std::optional<float>>(), "format"_a, "scale"_a.none())
        .def("add", &Linears::add, "weight"_a, "own"_a, "format"_a, "scale"_a.none(), nb::keep_alive<1, 2>());

    nb::class_<Step>(m, "Step")
        .def(nb::init<const Kernels&, const PackedWeight&, ConstVector, const Linears&, double>(), "kernels"_a, "embedding"_a,
             "norm"_a.noconvert(), "head"_a, "eps"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 5>())
        .def("add_block", &Step::add_block, "attn_norm"_a.noconvert(), "qkv"_a, "q_norm"_a.noconvert().none(),
             "k_norm"_a.noconvert().none(), "window"_a, "o"_a, "mlp_norm"_a.noconvert(), "gate_up"_a, "down"_a, "kind"_a,
             "k"_a.noconvert(), "v"_a.noconvert(), "k_scale"_a.noconvert(), "v_scale"_a.noconvert(),
             nb::keep_alive<1, 3>(), nb::keep_alive<1, 7>(), nb::keep_alive<1, 9>(), nb::keep_alive<1, 10>())
        .def("run", &Step::run, "ids"_a.noconvert(), "positions"_a.noconvert(), "slots"_a.noconvert(), "starts"_a.noconvert(),
             "context"_a.noconvert(), "tables"_a.noconvert(), "cos"_a.noconvert(), "sin"_a.noconvert(), "rows"_a.noconvert(),
             "logits"_a.noconvert())
        .def("set_profiling", &Step::set_profiling, "on"_a)
        .def("profile", &Step::profile, "Per operation: seconds, bytes read, operations, since profiling was set.");
}

}  // namespace quantbench
