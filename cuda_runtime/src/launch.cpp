#include "launch.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "driver.h"
#include "kernel.h"

namespace dak {

namespace py = pybind11;

namespace {

constexpr Extent one{1, 1, 1};
using PatchTuple = std::tuple<std::size_t, std::size_t, std::size_t>;

// Numbers the captures of this process; 0 where none is open on the stream.
std::uint64_t capture_id(std::uintptr_t stream) {
  using CaptureInfo = cu::Result (*)(cu::Stream, cu::CaptureStatus*, std::uint64_t*, void**,
                                     const void**, std::size_t*);
  static const CaptureInfo info = [] {
    void* library = dlopen(driver().library.c_str(), RTLD_NOW | RTLD_LOCAL);
    void* symbol = library ? dlsym(library, "cuStreamGetCaptureInfo_v2") : nullptr;
    return reinterpret_cast<CaptureInfo>(symbol);
  }();
  if (!info) throw Error(ErrorKind::UnsupportedDriver, "this driver has no cuStreamGetCaptureInfo");
  cu::CaptureStatus status = cu::CAPTURE_NONE;
  std::uint64_t id = 0;
  const cu::Result result =
      info(reinterpret_cast<cu::Stream>(stream), &status, &id, nullptr, nullptr, nullptr);
  if (result != cu::SUCCESS) throw_driver_error("cuStreamGetCaptureInfo", result);
  return status == cu::CAPTURE_NONE ? 0 : id;
}

void launch(const Kernel& kernel, const Extent& grid, const Extent& block,
            const std::vector<py::bytes>& arguments, unsigned int shared_bytes,
            std::uintptr_t stream, const Extent& cluster, bool overlap) {
  const LaunchShape shape{grid, block, cluster, shared_bytes, overlap};
  const std::vector<std::string_view> views(arguments.begin(), arguments.end());
  kernel.check(shape, views);
  ArgumentBlock block_of(views);
  kernel.launch(shape, stream, block_of.storage.data(), block_of.lines);
}

std::unique_ptr<PreparedLaunch> prepare(const Kernel& kernel, const Extent& grid,
                                        const Extent& block,
                                        const std::vector<py::bytes>& arguments,
                                        const std::vector<PatchTuple>& patches,
                                        unsigned int shared_bytes, const Extent& cluster,
                                        bool overlap) {
  std::vector<Patch> found;
  for (const auto& [argument, offset, size] : patches) found.push_back({argument, offset, size});
  const std::vector<std::string_view> views(arguments.begin(), arguments.end());
  return std::make_unique<PreparedLaunch>(
      kernel, LaunchShape{grid, block, cluster, shared_bytes, overlap}, views, std::move(found));
}

py::bytes encode_tensor_map(std::uintptr_t address, int data_type,
                            const std::vector<std::uint64_t>& shape,
                            const std::vector<std::uint64_t>& strides,
                            const std::vector<std::uint32_t>& box, int swizzle, int l2_promotion) {
  const std::size_t rank = shape.size();
  if (rank == 0 || rank > 5 || strides.size() + 1 != rank || box.size() != rank) {
    throw py::value_error("a tensor map takes 1 to 5 extents, one byte stride less, and as many "
                          "box extents; got " +
                          std::to_string(rank) + ", " + std::to_string(strides.size()) + " and " +
                          std::to_string(box.size()));
  }
  const std::vector<std::uint32_t> element_strides(rank, 1);
  cu::TensorMap map{};
  driver().cuTensorMapEncodeTiled(
      &map, static_cast<cu::TensorMapDataType>(data_type), static_cast<std::uint32_t>(rank),
      reinterpret_cast<void*>(address), shape.data(), strides.data(), box.data(),
      element_strides.data(), cu::INTERLEAVE_NONE, static_cast<cu::TensorMapSwizzle>(swizzle),
      static_cast<cu::TensorMapL2promotion>(l2_promotion), cu::FILL_ZERO);
  return py::bytes(reinterpret_cast<const char*>(&map), sizeof(map));
}

void copy_async(std::uintptr_t destination, std::uintptr_t source, std::size_t bytes,
                std::uintptr_t stream, int device) {
  const DeviceScope scope(device);
  driver().cuMemcpyAsync(destination, source, bytes, reinterpret_cast<cu::Stream>(stream));
}

}  // namespace

void bind_launch(py::module_& m) {
  const auto attribute = [](cu::FunctionAttribute id) {
    return [id](const Kernel& self) { return self.attribute(id); };
  };
  py::class_<Kernel>(m, "Kernel", "A kernel loaded on one device; it stays loaded.")
      .def(py::init<const py::bytes&, const std::string&, int>(), py::kw_only(), py::arg("image"),
           py::arg("symbol"), py::arg("device"))
      .def_property_readonly("device", &Kernel::device)
      .def_property_readonly("parameter_sizes", &Kernel::parameter_sizes)
      .def_property_readonly("shared_bytes", attribute(cu::FUNCTION_SHARED_SIZE_BYTES))
      .def_property_readonly("local_bytes", attribute(cu::FUNCTION_LOCAL_SIZE_BYTES))
      .def_property_readonly("registers", attribute(cu::FUNCTION_NUM_REGS))
      .def("allow", &Kernel::allow, py::kw_only(), py::arg("dynamic_shared_bytes") = py::none(),
           py::arg("non_portable_cluster") = false,
           "Permit more dynamic shared memory, or clusters of more than 8 CTAs.")
      .def("launch", &launch, py::kw_only(), py::arg("grid"), py::arg("block"),
           py::arg("arguments"), py::arg("shared_bytes") = 0, py::arg("stream") = 0,
           py::arg("cluster") = one, py::arg("overlap") = false,
           "Launch on `stream` (a CUstream as an integer). Each argument is given as its bytes. With "
           "`overlap` it may start before the kernel ahead of it in the stream has ended.")
      .def("prepare", &prepare, py::kw_only(), py::arg("grid"), py::arg("block"),
           py::arg("arguments"), py::arg("patches"), py::arg("shared_bytes") = 0,
           py::arg("cluster") = one, py::arg("overlap") = false, py::keep_alive<0, 1>(),
           "The same launch again and again. Of each patch (argument, offset, size) the bytes come "
           "with each launch.")
      .def("maximum_active_clusters", &Kernel::maximum_active_clusters, py::kw_only(),
           py::arg("block"), py::arg("shared_bytes") = 0, py::arg("cluster") = one,
           "How many such clusters the device holds at once.");
  py::class_<PreparedLaunch>(m, "PreparedLaunch", "A launch of which some bytes change.")
      .def("launch", &PreparedLaunch::launch, py::arg("stream"), py::arg("values"),
           "On `stream` (a CUstream as an integer), with the bytes of all patches in order.");
  m.def("capture_id", &capture_id, py::arg("stream"),
        "Which capture is open on a stream (a CUstream as an integer); 0 where none is.");
  m.def("copy_async", &copy_async, py::kw_only(), py::arg("destination"), py::arg("source"),
        py::arg("nbytes"), py::arg("stream"), py::arg("device"),
        "Copy between addresses of any memory by a copy engine, in the order of `stream`.");
  m.def("encode_tensor_map", &encode_tensor_map, py::kw_only(), py::arg("address"),
        py::arg("data_type"), py::arg("shape"), py::arg("strides"), py::arg("box"),
        py::arg("swizzle") = 0, py::arg("l2_promotion") = 0,
        "The 128 bytes of a tiled CUtensorMap: innermost axis first, strides in bytes; data_type, "
        "swizzle and l2_promotion by the numbers of cuda.h.");
}

}  // namespace dak
