// Numpy arrays as they reach the extension, and the checks at the door. Nothing is converted or copied: an argument of
// another dtype, order or device is refused by nanobind, a wrong shape by `require`.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "table.h"

namespace nb = nanobind;

namespace quantbench {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Floats = Array<float, 2>;
using ConstFloats = Array<const float, 2>;
using ConstVector = Array<const float, 1>;
using Scales = nb::ndarray<float, nb::c_contig, nb::device::cpu>;             // of a cache: static or dynamic, told apart by ndim
using ConstScales = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::c_contig, nb::device::cpu>;              // codes and pages: dtype told apart by a kind
using ConstBytes = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

template <class A>
auto* data_or_null(std::optional<A>& array) {
    return array ? array->data() : nullptr;
}

// Other Python threads run while a long call computes; a short one keeps the lock, which costs less than handing it over.
class Release {
public:
    explicit Release(int64_t work) : state_(work > 1 << 20 ? PyEval_SaveThread() : nullptr) {}
    ~Release() {
        if (state_) PyEval_RestoreThread(state_);
    }
    Release(const Release&) = delete;
    Release& operator=(const Release&) = delete;

private:
    PyThreadState* state_;
};

}  // namespace quantbench
