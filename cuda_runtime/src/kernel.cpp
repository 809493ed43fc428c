#include "kernel.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "driver.h"

namespace dak {

namespace py = pybind11;

namespace {

constexpr Extent one{1, 1, 1};
using LaunchAttributes = std::array<cu::LaunchAttribute, 2>;

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

cu::LaunchConfig configuration(const LaunchShape& shape, std::uintptr_t stream,
                               LaunchAttributes& attributes) {
  unsigned int count = 0;
  if (shape.cluster != one) {
    cu::LaunchAttribute& attribute = attributes[count++];
    attribute.id = cu::LAUNCH_CLUSTER_DIMENSION;
    attribute.value.clusterDim = {shape.cluster[0], shape.cluster[1], shape.cluster[2]};
  }
  if (shape.overlap) {
    cu::LaunchAttribute& attribute = attributes[count++];
    attribute.id = cu::LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
  }
  cu::LaunchConfig config{};
  config.gridDimX = shape.grid[0];
  config.gridDimY = shape.grid[1];
  config.gridDimZ = shape.grid[2];
  config.blockDimX = shape.block[0];
  config.blockDimY = shape.block[1];
  config.blockDimZ = shape.block[2];
  config.sharedMemBytes = shape.shared_bytes;
  config.hStream = reinterpret_cast<cu::Stream>(stream);
  config.attrs = attributes.data();
  config.numAttrs = count;
  return config;
}

}  // namespace

Kernel::Kernel(const py::bytes& image, const std::string& symbol, int device)
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

int Kernel::attribute(cu::FunctionAttribute id) const {
  int value = 0;
  driver().cuFuncGetAttribute(&value, id, function_);
  return value;
}

void Kernel::allow(std::optional<int> dynamic_shared_bytes, bool non_portable_cluster) const {
  const DeviceScope scope(device_);
  if (dynamic_shared_bytes) {
    driver().cuFuncSetAttribute(function_, cu::FUNCTION_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                *dynamic_shared_bytes);
  }
  if (non_portable_cluster) {
    driver().cuFuncSetAttribute(function_, cu::FUNCTION_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1);
  }
}

int Kernel::maximum_active_clusters(const Extent& block, unsigned int shared_bytes,
                                    const Extent& cluster) const {
  LaunchAttributes attributes{};
  const LaunchShape shape{cluster, block, cluster, shared_bytes, false};
  const cu::LaunchConfig config = configuration(shape, 0, attributes);
  const DeviceScope scope(device_);
  int clusters = 0;
  driver().cuOccupancyMaxActiveClusters(&clusters, function_, &config);
  return clusters;
}

void Kernel::check(const LaunchShape& shape,
                   const std::vector<std::string_view>& arguments) const {
  const Extent& grid = shape.grid;
  const Extent& cluster = shape.cluster;
  for (std::size_t axis = 0; axis < grid.size(); ++axis) {
    if (grid[axis] == 0 || cluster[axis] == 0 || grid[axis] % cluster[axis] != 0) {
      throw py::value_error(symbol_ + ": axis " + std::to_string(axis) + " of the grid has " +
                            std::to_string(grid[axis]) + " CTAs, which clusters of " +
                            std::to_string(cluster[axis]) + " do not fill");
    }
  }
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

void Kernel::launch(const LaunchShape& shape, std::uintptr_t stream, ArgumentLine* storage,
                    const std::vector<std::size_t>& lines) const {
  std::vector<void*> pointers;
  pointers.reserve(lines.size());
  for (const std::size_t line : lines) pointers.push_back(storage + line);
  LaunchAttributes attributes{};
  const cu::LaunchConfig config = configuration(shape, stream, attributes);
  const DeviceScope scope(device_);
  driver().cuLaunchKernelEx(&config, function_, pointers.data(), nullptr);
}

ArgumentBlock::ArgumentBlock(const std::vector<std::string_view>& arguments) {
  std::size_t count = 0;
  for (const std::string_view argument : arguments) {
    lines.push_back(count);
    count += line_count(argument);
  }
  storage.resize(count);
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    std::memcpy(storage.data() + lines[i], arguments[i].data(), arguments[i].size());
  }
}

PreparedLaunch::PreparedLaunch(const Kernel& kernel, const LaunchShape& shape,
                               const std::vector<std::string_view>& arguments,
                               std::vector<Patch> patches)
    : kernel_(kernel), shape_(shape), arguments_(arguments), patches_(std::move(patches)) {
  kernel_.check(shape, arguments);
  for (const Patch& patch : patches_) {
    const bool inside = patch.argument < arguments.size() &&
                        patch.offset <= arguments[patch.argument].size() &&
                        patch.size <= arguments[patch.argument].size() - patch.offset;
    if (!inside) {
      throw py::value_error("bytes [" + std::to_string(patch.offset) + ", +" +
                            std::to_string(patch.size) + ") are not all of argument " +
                            std::to_string(patch.argument));
    }
    patched_ += patch.size;
  }
}

void PreparedLaunch::launch(std::uintptr_t stream, std::string_view values) const {
  if (values.size() != patched_) {
    throw py::value_error("a launch brings " + std::to_string(patched_) + " bytes, got " +
                          std::to_string(values.size()));
  }
  std::vector<ArgumentLine> storage = arguments_.storage;
  for (const Patch& patch : patches_) {
    unsigned char* argument = storage[arguments_.lines[patch.argument]].bytes;
    std::memcpy(argument + patch.offset, values.data(), patch.size);
    values.remove_prefix(patch.size);
  }
  kernel_.launch(shape_, stream, storage.data(), arguments_.lines);
}

}  // namespace dak
