#pragma once

#include <pybind11/pybind11.h>

namespace dak {

// dak::Error becomes the class of dak_inductor.errors that its kind names.
void register_errors();

void bind_memory(pybind11::module_& m);

}  // namespace dak
