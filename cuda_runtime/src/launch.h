// Kernels as the driver sees them: load a cubin, set attributes, launch, describe tensors for TMA.
#pragma once

#include <pybind11/pybind11.h>

namespace dak {

// Called by bind_nvrtc.
void bind_launch(pybind11::module_& m);

}  // namespace dak
