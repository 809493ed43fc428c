#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_memory.h"
#include "driver.h"
#if __has_include("nvrtc.h")
#include "nvrtc.h"
#endif

PYBIND11_MODULE(_driver, m) {
  m.doc() = "The CUDA driver, opened at run time: tiered memory, runtime compilation, launches.";
  dak::register_errors();
  m.def("library", [] { return dak::driver().library; }, "Name of the driver library; opens it.");
  m.def("is_fake", [] { return dak::driver().fake; }, "Whether the driver is a stand-in for tests.");
  m.def("is_open", &dak::driver_is_open);
  m.def("in_forked_child", &dak::in_forked_child);
  m.def("close", &dak::close_driver, "Forget the driver. For tests, with nothing allocated.");
  m.def(
      "memory_info",
      [](int device) {
        dak::DeviceScope scope(device);
        std::size_t free = 0, total = 0;
        dak::driver().cuMemGetInfo(&free, &total);
        return std::pair(free, total);
      },
      pybind11::call_guard<pybind11::gil_scoped_release>(), pybind11::arg("device") = 0,
      "(free, total) bytes of a device, as the driver counts them.");
  dak::bind_memory(m);
#if __has_include("nvrtc.h")
  dak::bind_nvrtc(m);
#endif
}
