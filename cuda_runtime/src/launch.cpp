#include "launch.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "driver.h"

namespace dak {

namespace py = pybind11;

namespace {

using Extent = std::array<unsigned int, 3>;
constexpr Extent one{1, 1, 1};
using LaunchAttributes = std::array<cu::LaunchAttribute, 2>;

// Each argument starts a line of its own, since a CUtensorMap must be aligned to 64 bytes.
struct alignas(64) ArgumentLine {
  unsigned char bytes[64];
};

std::size_t line_count(std::string_view argument) {
  constexpr std::size_t line = sizeof(ArgumentLine);
  return std::max<std::size_t>(1, (argument.size() + line - 1) / line);
}

// cuFuncGetParamInfo came with CUDA 12.4; without it arguments are launched unchecked.
using ParameterInfo = cu::Result (*)(cu::Function, std::size_t, std::size_t*, std::size_t*);
ParameterInfo parameter_info() {
  static const ParameterInfo found = [] {
    void* library = dlopen(driver().library.c_str(), RTLD_NOW | RTLD_LOCAL);
    void* symbol = library ? dlsym(library, "cuFuncGetParamInfo") : nullptr;
    return reinterpret_cast<ParameterInfo>(symbol);
  }();
  return found;
}

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

// One kernel on one device. Its module is never unloaded: captured graphs may hold the function,
// and a process loads each cubin once.
class Kernel {
 public:
  Kernel(const py::bytes& image, const std::string& symbol, int device)
      : symbol_(symbol), device_(device) {
    const DeviceScope scope(device);
    const std::string bytes = image;
    cu::Module module = nullptr;
    driver().cuModuleLoadData(&module, bytes.data());
    driver().cuModuleGetFunction(&function_, module, symbol.c_str());
    const ParameterInfo info = parameter_info();
    std::size_t offset = 0;
    std::size_t size = 0;
    while (info && info(function_, parameter_sizes_.size(), &offset, &size) == cu::SUCCESS) {
      parameter_sizes_.push_back(size);
    }
  }

  int device() const { return device_; }
  const std::vector<std::size_t>& parameter_sizes() const { return parameter_sizes_; }

  int attribute(cu::FunctionAttribute id) const {
    int value = 0;
    driver().cuFuncGetAttribute(&value, id, function_);
    return value;
  }

  void allow(std::optional<int> dynamic_shared_bytes, bool non_portable_cluster) const {
    const DeviceScope scope(device_);
    if (dynamic_shared_bytes) {
      driver().cuFuncSetAttribute(function_, cu::FUNCTION_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                  *dynamic_shared_bytes);
    }
    if (non_portable_cluster) {
      driver().cuFuncSetAttribute(function_, cu::FUNCTION_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
    }
  }

  void launch(const Extent& grid, const Extent& block, const std::vector<py::bytes>& arguments,
              unsigned int shared_bytes, std::uintptr_t stream, const Extent& cluster,
              bool overlap) const {
    check_cluster(grid, cluster);
    std::vector<std::string_view> views(arguments.begin(), arguments.end());
    check_arguments(views);

    std::size_t lines = 0;
    for (const std::string_view view : views) lines += line_count(view);
    std::vector<ArgumentLine> storage(lines);
    std::vector<void*> pointers;
    std::size_t line = 0;
    for (const std::string_view view : views) {
      std::memcpy(storage.data() + line, view.data(), view.size());
      pointers.push_back(storage.data() + line);
      line += line_count(view);
    }

    LaunchAttributes attributes{};
    const cu::LaunchConfig config =
        configuration(grid, block, shared_bytes, stream, cluster, overlap, attributes);
    const DeviceScope scope(device_);
    driver().cuLaunchKernelEx(&config, function_, pointers.data(), nullptr);
  }

  int maximum_active_clusters(const Extent& block, unsigned int shared_bytes,
                              const Extent& cluster) const {
    LaunchAttributes attributes{};
    const cu::LaunchConfig config =
        configuration(cluster, block, shared_bytes, 0, cluster, false, attributes);
    const DeviceScope scope(device_);
    int clusters = 0;
    driver().cuOccupancyMaxActiveClusters(&clusters, function_, &config);
    return clusters;
  }

 private:
  static cu::LaunchConfig configuration(const Extent& grid, const Extent& block,
                                        unsigned int shared_bytes, std::uintptr_t stream,
                                        const Extent& cluster, bool overlap,
                                        LaunchAttributes& attributes) {
    unsigned int count = 0;
    if (cluster != one) {
      cu::LaunchAttribute& attribute = attributes[count++];
      attribute.id = cu::LAUNCH_CLUSTER_DIMENSION;
      attribute.value.clusterDim = {cluster[0], cluster[1], cluster[2]};
    }
    if (overlap) {
      cu::LaunchAttribute& attribute = attributes[count++];
      attribute.id = cu::LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION;
      attribute.value.programmaticStreamSerializationAllowed = 1;
    }
    cu::LaunchConfig config{};
    config.gridDimX = grid[0];
    config.gridDimY = grid[1];
    config.gridDimZ = grid[2];
    config.blockDimX = block[0];
    config.blockDimY = block[1];
    config.blockDimZ = block[2];
    config.sharedMemBytes = shared_bytes;
    config.hStream = reinterpret_cast<cu::Stream>(stream);
    config.attrs = attributes.data();
    config.numAttrs = count;
    return config;
  }

  void check_cluster(const Extent& grid, const Extent& cluster) const {
    for (std::size_t axis = 0; axis < grid.size(); ++axis) {
      if (grid[axis] == 0 || cluster[axis] == 0 || grid[axis] % cluster[axis] != 0) {
        throw py::value_error(symbol_ + ": axis " + std::to_string(axis) + " of the grid has " +
                              std::to_string(grid[axis]) + " CTAs, which clusters of " +
                              std::to_string(cluster[axis]) + " do not fill");
      }
    }
  }

  void check_arguments(const std::vector<std::string_view>& arguments) const {
    if (!parameter_info()) return;
    std::string got;
    std::string expected;
    std::vector<std::size_t> sizes;
    for (const std::string_view argument : arguments) {
      sizes.push_back(argument.size());
      got += " " + std::to_string(argument.size());
    }
    if (sizes == parameter_sizes_) return;
    for (const std::size_t size : parameter_sizes_) expected += " " + std::to_string(size);
    throw py::value_error(symbol_ + " takes arguments of (" + expected + " ) bytes, got (" + got +
                          " )");
  }

  std::string symbol_;
  int device_;
  cu::Function function_ = nullptr;
  std::vector<std::size_t> parameter_sizes_;
};

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
      .def("launch", &Kernel::launch, py::kw_only(), py::arg("grid"), py::arg("block"),
           py::arg("arguments"), py::arg("shared_bytes") = 0, py::arg("stream") = 0,
           py::arg("cluster") = one, py::arg("overlap") = false,
           "Launch on `stream` (a CUstream as an integer). Each argument is given as its bytes. With "
           "`overlap` it may start before the kernel ahead of it in the stream has ended.")
      .def("maximum_active_clusters", &Kernel::maximum_active_clusters, py::kw_only(),
           py::arg("block"), py::arg("shared_bytes") = 0, py::arg("cluster") = one,
           "How many such clusters the device holds at once.");
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
