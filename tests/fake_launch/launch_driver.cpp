// A libcuda that loads and launches nothing: it writes down what it is asked, for test_launch.py.
// Every kernel takes two parameters, of 64 and 12 bytes.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "driver_types.h"

namespace cu = dak::cu;

namespace {

std::string record;
int depth = 0;  // of the stack of current contexts
constexpr std::size_t parameter_sizes[] = {64, 12};

void note(const std::string& line) { record += line + " depth=" + std::to_string(depth) + "\n"; }

template <class Integer>
std::string triple(Integer x, Integer y, Integer z) {
  return std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z);
}

std::string describe(const cu::LaunchConfig* config) {
  std::string text = " grid=" + triple(config->gridDimX, config->gridDimY, config->gridDimZ) +
                     " block=" + triple(config->blockDimX, config->blockDimY, config->blockDimZ) +
                     " shared=" + std::to_string(config->sharedMemBytes) +
                     " stream=" + std::to_string(reinterpret_cast<std::uintptr_t>(config->hStream));
  for (unsigned int i = 0; i < config->numAttrs; ++i) {
    const cu::LaunchAttribute& attribute = config->attrs[i];
    text += " attribute" + std::to_string(static_cast<int>(attribute.id));
    const auto& cluster = attribute.value.clusterDim;
    text += "=" + triple(cluster.x, cluster.y, cluster.z);
  }
  return text;
}

cu::Result init(unsigned int) { return cu::SUCCESS; }
cu::Result error_name(cu::Result, const char** text) { return *text = "FAKE", cu::SUCCESS; }
cu::Result device_get(cu::Device* device, int ordinal) { return *device = ordinal, cu::SUCCESS; }
cu::Result retain(cu::Context* context, cu::Device device) {
  *context = reinterpret_cast<cu::Context>(std::uintptr_t(1000) + device);
  return cu::SUCCESS;
}
cu::Result push(cu::Context) { return ++depth, cu::SUCCESS; }
cu::Result pop(cu::Context*) { return --depth, cu::SUCCESS; }
cu::Result exchange(cu::CaptureMode*) { return cu::SUCCESS; }

cu::Result load(cu::Module* module, const void* image) {
  note("load " + std::string(static_cast<const char*>(image)));
  *module = reinterpret_cast<cu::Module>(1);
  return cu::SUCCESS;
}

cu::Result get_function(cu::Function* function, cu::Module, const char* name) {
  if (std::strcmp(name, "missing") == 0) return 500;
  note("function " + std::string(name));
  *function = reinterpret_cast<cu::Function>(2);
  return cu::SUCCESS;
}

cu::Result set_attribute(cu::Function, cu::FunctionAttribute id, int value) {
  if (value > 232448) return cu::ERROR_INVALID_VALUE;
  note("set " + std::to_string(static_cast<int>(id)) + "=" + std::to_string(value));
  return cu::SUCCESS;
}

cu::Result get_attribute(int* value, cu::FunctionAttribute id, cu::Function) {
  *value = 100 + static_cast<int>(id);
  return cu::SUCCESS;
}

cu::Result launch(const cu::LaunchConfig* config, cu::Function, void** arguments, void**) {
  std::string text = "launch" + describe(config);
  int i = 0;
  for (const std::size_t size : parameter_sizes) {
    const auto* bytes = static_cast<const unsigned char*>(arguments[i++]);
    text += reinterpret_cast<std::uintptr_t>(bytes) % 64 == 0 ? " " : " MISALIGNED ";
    for (std::size_t b = 0; b < size; ++b) {
      char digits[3];
      std::snprintf(digits, sizeof(digits), "%02x", bytes[b]);
      text += digits;
    }
  }
  note(text);
  return cu::SUCCESS;
}

cu::Result clusters(int* count, cu::Function, const cu::LaunchConfig* config) {
  note("clusters" + describe(config));
  return *count = 8, cu::SUCCESS;
}

cu::Result encode(cu::TensorMap* map, cu::TensorMapDataType type, std::uint32_t rank, void* address,
                  const std::uint64_t* shape, const std::uint64_t* strides,
                  const std::uint32_t* box, const std::uint32_t*, cu::TensorMapInterleave,
                  cu::TensorMapSwizzle swizzle, cu::TensorMapL2promotion l2,
                  cu::TensorMapFloatOOBfill) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0) return cu::ERROR_INVALID_VALUE;
  note("encode type=" + std::to_string(type) + " rank=" + std::to_string(rank) +
       " shape=" + std::to_string(shape[0]) + "," + std::to_string(shape[1]) +
       " strides=" + std::to_string(strides[0]) + " box=" + std::to_string(box[0]) + "," +
       std::to_string(box[1]) + " swizzle=" + std::to_string(swizzle) +
       " l2=" + std::to_string(l2));
  std::memset(map, 7, sizeof(*map));
  return cu::SUCCESS;
}

cu::Result copy(cu::DevicePtr target, cu::DevicePtr source, std::size_t bytes, cu::Stream) {
  note("copy " + triple<unsigned long long>(target, source, bytes));
  return cu::SUCCESS;
}

struct Entry {
  const char* name;
  void* pointer;
};
const Entry entries[] = {
    {"cuInit", reinterpret_cast<void*>(init)},
    {"cuGetErrorName", reinterpret_cast<void*>(error_name)},
    {"cuDeviceGet", reinterpret_cast<void*>(device_get)},
    {"cuDevicePrimaryCtxRetain", reinterpret_cast<void*>(retain)},
    {"cuCtxPushCurrent", reinterpret_cast<void*>(push)},
    {"cuCtxPopCurrent", reinterpret_cast<void*>(pop)},
    {"cuThreadExchangeStreamCaptureMode", reinterpret_cast<void*>(exchange)},
    {"cuModuleLoadData", reinterpret_cast<void*>(load)},
    {"cuModuleGetFunction", reinterpret_cast<void*>(get_function)},
    {"cuFuncSetAttribute", reinterpret_cast<void*>(set_attribute)},
    {"cuFuncGetAttribute", reinterpret_cast<void*>(get_attribute)},
    {"cuLaunchKernelEx", reinterpret_cast<void*>(launch)},
    {"cuOccupancyMaxActiveClusters", reinterpret_cast<void*>(clusters)},
    {"cuTensorMapEncodeTiled", reinterpret_cast<void*>(encode)},
    {"cuMemcpyAsync", reinterpret_cast<void*>(copy)},
};

}  // namespace

extern "C" {

const char* launch_record() { return record.c_str(); }

cu::Result cuGetProcAddress_v2(const char* name, void** pointer, int, std::uint64_t,
                               cu::ProcAddressResult* found) {
  *pointer = nullptr;
  *found = cu::PROC_NOT_FOUND;
  for (const Entry& entry : entries) {
    if (std::strcmp(entry.name, name) != 0) continue;
    *pointer = entry.pointer;
    *found = cu::PROC_FOUND;
  }
  return cu::SUCCESS;
}

cu::Result cuFuncGetParamInfo(cu::Function, std::size_t index, std::size_t* offset,
                              std::size_t* size) {
  if (index >= 2) return cu::ERROR_INVALID_VALUE;
  *offset = index == 0 ? 0 : 64;
  *size = parameter_sizes[index];
  return cu::SUCCESS;
}

}  // extern "C"
