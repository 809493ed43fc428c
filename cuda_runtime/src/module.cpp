#include <pybind11/pybind11.h>

PYBIND11_MODULE(_driver, m) {
  m.doc() = "CUDA driver access for tiered memory";
}
