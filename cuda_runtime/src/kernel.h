// One kernel on one device, and launches of it.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "driver_types.h"

namespace dak {

using Extent = std::array<unsigned int, 3>;

// How a launch is configured; the arguments are apart.
struct LaunchShape {
  Extent grid;
  Extent block;
  Extent cluster;
  unsigned int shared_bytes;
  bool overlap;
};

// Each argument starts a line of its own, since a CUtensorMap must be aligned to 64 bytes.
struct alignas(64) ArgumentLine {
  unsigned char bytes[64];
};

// Its module is never unloaded: captured graphs may hold the function, and a process loads each
// cubin once.
class Kernel {
 public:
  Kernel(const pybind11::bytes& image, const std::string& symbol, int device);

  int device() const { return device_; }
  const std::vector<std::size_t>& parameter_sizes() const { return parameter_sizes_; }
  int attribute(cu::FunctionAttribute id) const;
  void allow(std::optional<int> dynamic_shared_bytes, bool non_portable_cluster) const;
  int maximum_active_clusters(const Extent& block, unsigned int shared_bytes,
                              const Extent& cluster) const;

  // Throws value_error where these are not the kernel's arguments, or clusters do not fill the grid.
  void check(const LaunchShape& shape, const std::vector<std::string_view>& arguments) const;
  // `storage` holds the arguments, which start at `lines`.
  void launch(const LaunchShape& shape, std::uintptr_t stream, ArgumentLine* storage,
              const std::vector<std::size_t>& lines) const;

 private:
  std::string symbol_;
  int device_;
  cu::Function function_ = nullptr;
  std::vector<std::size_t> parameter_sizes_;
};

// Arguments side by side.
struct ArgumentBlock {
  explicit ArgumentBlock(const std::vector<std::string_view>& arguments);

  std::vector<ArgumentLine> storage;
  std::vector<std::size_t> lines;  // where each argument starts
};

// Bytes of an argument that each launch brings.
struct Patch {
  std::size_t argument;
  std::size_t offset;
  std::size_t size;
};

// A launch of which all but some bytes of its arguments stays.
class PreparedLaunch {
 public:
  PreparedLaunch(const Kernel& kernel, const LaunchShape& shape,
                 const std::vector<std::string_view>& arguments, std::vector<Patch> patches);

  // `values`: those of all patches, one after the other.
  void launch(std::uintptr_t stream, std::string_view values) const;

 private:
  const Kernel& kernel_;
  LaunchShape shape_;
  ArgumentBlock arguments_;
  std::vector<Patch> patches_;
  std::size_t patched_ = 0;
};

}  // namespace dak
