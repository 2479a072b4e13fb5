// What the bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>

#include "api.h"

namespace py = pybind11;

namespace fastpost {

// An address or a stream, which Python has as an integer, as whatever pointer is asked for.
struct Pointer {
  uintptr_t address = 0;

  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

// Lists of them are passed on as lists of pointers.
static_assert(sizeof(Pointer) == sizeof(void*) && std::is_trivially_copyable_v<Pointer>);

using Released = py::call_guard<py::gil_scoped_release>;

void bind_cpu_rows(py::module_& m);
void bind_cuda_rows(py::module_& m);

}  // namespace fastpost

template <>
struct pybind11::detail::type_caster<fastpost::Pointer> {
  PYBIND11_TYPE_CASTER(fastpost::Pointer, const_name("int"));

  bool load(handle source, bool convert) {
    make_caster<uintptr_t> number;
    if (!number.load(source, convert)) return false;
    value.address = cast_op<uintptr_t>(number);
    return true;
  }
};
