// The driver's functions, found in libcuda at run time.
//
//   driver().cuMemMap(address, bytes, 0, handle, 0);          // throws dak::Error unless it succeeds
//   cu::Result status = driver().cuStreamQuery.status(stream); // the raw result
//
// The library is libcuda.so.1, or what DAK_LIBCUDA names. It is opened and initialised at the first
// call of driver(); a failure is not remembered, so a later call tries again.
#pragma once

#include <string>

#include "driver_types.h"
#include "errors.h"

namespace dak {

// Builds the Error for a failed call: name, number, and the driver's own name and text for it.
[[noreturn]] void throw_driver_error(const char* call, cu::Result status);
[[noreturn]] void throw_missing_function(const char* call);

// "CUDA_ERROR_OUT_OF_MEMORY (2): out of memory"
std::string describe(cu::Result status);

template <class... Parameters>
struct DriverFunction {
  const char* name;
  cu::Result (*pointer)(Parameters...) = nullptr;

  bool available() const { return pointer != nullptr; }
  // For what destructors call: they have no way to say that it is missing.
  void need() const {
    if (!pointer) throw_missing_function(name);
  }
  cu::Result status(Parameters... arguments) const {
    need();
    return pointer(arguments...);
  }
  void operator()(Parameters... arguments) const {
    if (cu::Result result = status(arguments...)) throw_driver_error(name, result);
  }
};

// clang-format off
// X(name as in cuda.h, parameters). cuGetProcAddress picks the ABI of CUDA 12.0 for each.
#define DAK_DRIVER_FUNCTIONS(X)                                                                     \
  X(cuInit, unsigned int)                                                                           \
  X(cuGetErrorName, cu::Result, const char**)                                                       \
  X(cuGetErrorString, cu::Result, const char**)                                                     \
  X(cuDeviceGet, cu::Device*, int)                                                                  \
  X(cuDeviceGetAttribute, int*, cu::DeviceAttribute, cu::Device)                                    \
  X(cuDeviceTotalMem, std::size_t*, cu::Device)                                                     \
  X(cuDeviceCanAccessPeer, int*, cu::Device, cu::Device)                                            \
  X(cuDevicePrimaryCtxRetain, cu::Context*, cu::Device)                                             \
  X(cuDevicePrimaryCtxRelease, cu::Device)                                                          \
  X(cuCtxPushCurrent, cu::Context)                                                                  \
  X(cuCtxPopCurrent, cu::Context*)                                                                  \
  X(cuCtxGetCurrent, cu::Context*)                                                                  \
  X(cuCtxGetDevice, cu::Device*)                                                                    \
  X(cuCtxSynchronize)                                                                               \
  X(cuCtxEnablePeerAccess, cu::Context, unsigned int)                                               \
  X(cuMemGetInfo, std::size_t*, std::size_t*)                                                       \
  X(cuMemAlloc, cu::DevicePtr*, std::size_t)                                                        \
  X(cuMemFree, cu::DevicePtr)                                                                       \
  X(cuMemHostAlloc, void**, std::size_t, unsigned int)                                              \
  X(cuMemFreeHost, void*)                                                                           \
  X(cuMemHostRegister, void*, std::size_t, unsigned int)                                            \
  X(cuMemHostUnregister, void*)                                                                     \
  X(cuMemHostGetDevicePointer, cu::DevicePtr*, void*, unsigned int)                                 \
  X(cuMemAddressReserve, cu::DevicePtr*, std::size_t, std::size_t, cu::DevicePtr, unsigned long long) \
  X(cuMemAddressFree, cu::DevicePtr, std::size_t)                                                   \
  X(cuMemCreate, cu::AllocationHandle*, std::size_t, const cu::MemAllocationProp*, unsigned long long) \
  X(cuMemRelease, cu::AllocationHandle)                                                             \
  X(cuMemMap, cu::DevicePtr, std::size_t, std::size_t, cu::AllocationHandle, unsigned long long)    \
  X(cuMemUnmap, cu::DevicePtr, std::size_t)                                                         \
  X(cuMemSetAccess, cu::DevicePtr, std::size_t, const cu::MemAccessDesc*, std::size_t)              \
  X(cuMemGetAllocationGranularity, std::size_t*, const cu::MemAllocationProp*, cu::Granularity)     \
  X(cuMemExportToShareableHandle, void*, cu::AllocationHandle, cu::HandleType, unsigned long long)  \
  X(cuMemImportFromShareableHandle, cu::AllocationHandle*, void*, cu::HandleType)                   \
  X(cuMemcpyAsync, cu::DevicePtr, cu::DevicePtr, std::size_t, cu::Stream)                           \
  X(cuMemcpyHtoDAsync, cu::DevicePtr, const void*, std::size_t, cu::Stream)                         \
  X(cuMemcpyDtoHAsync, void*, cu::DevicePtr, std::size_t, cu::Stream)                               \
  X(cuMemsetD8Async, cu::DevicePtr, unsigned char, std::size_t, cu::Stream)                         \
  X(cuStreamCreate, cu::Stream*, unsigned int)                                                      \
  X(cuStreamDestroy, cu::Stream)                                                                    \
  X(cuStreamSynchronize, cu::Stream)                                                                \
  X(cuStreamQuery, cu::Stream)                                                                      \
  X(cuStreamWaitEvent, cu::Stream, cu::Event, unsigned int)                                         \
  X(cuStreamIsCapturing, cu::Stream, cu::CaptureStatus*)                                            \
  X(cuThreadExchangeStreamCaptureMode, cu::CaptureMode*)                                            \
  X(cuEventCreate, cu::Event*, unsigned int)                                                        \
  X(cuEventDestroy, cu::Event)                                                                      \
  X(cuEventRecord, cu::Event, cu::Stream)                                                           \
  X(cuEventSynchronize, cu::Event)                                                                  \
  X(cuEventQuery, cu::Event)                                                                        \
  X(cuEventElapsedTime, float*, cu::Event, cu::Event)                                               \
  X(cuModuleLoadData, cu::Module*, const void*)                                                     \
  X(cuModuleUnload, cu::Module)                                                                     \
  X(cuModuleGetFunction, cu::Function*, cu::Module, const char*)                                    \
  X(cuModuleGetGlobal, cu::DevicePtr*, std::size_t*, cu::Module, const char*)                       \
  X(cuFuncSetAttribute, cu::Function, cu::FunctionAttribute, int)                                   \
  X(cuFuncGetAttribute, int*, cu::FunctionAttribute, cu::Function)                                  \
  X(cuLaunchKernelEx, const cu::LaunchConfig*, cu::Function, void**, void**)                        \
  X(cuOccupancyMaxActiveClusters, int*, cu::Function, const cu::LaunchConfig*)                      \
  X(cuOccupancyMaxActiveBlocksPerMultiprocessor, int*, cu::Function, int, std::size_t)              \
  X(cuTensorMapEncodeTiled, cu::TensorMap*, cu::TensorMapDataType, std::uint32_t, void*,            \
    const std::uint64_t*, const std::uint64_t*, const std::uint32_t*, const std::uint32_t*,         \
    cu::TensorMapInterleave, cu::TensorMapSwizzle, cu::TensorMapL2promotion,                        \
    cu::TensorMapFloatOOBfill)
// clang-format on

struct Driver {
#define DAK_DECLARE(name, ...) DriverFunction<__VA_ARGS__> name{#name};
  DAK_DRIVER_FUNCTIONS(DAK_DECLARE)
#undef DAK_DECLARE
  std::string library;  // the name it was opened under
  bool fake = false;    // a library for tests (it exports dak_fake_driver): its "device" memory is CPU memory
};

// The driver, opened at the first call. Throws UnsupportedDriver where there is none or one older than
// CUDA 12.0, and TieredTensor in a forked child of a process that had opened it.
const Driver& driver();

// Whether driver() has succeeded in this process. Throws nothing.
bool driver_is_open();

// True in a forked child of a process that had opened the driver: no driver call may be made.
bool in_forked_child();

// Forget the driver, so that the next driver() opens the library anew. For tests; the caller has made
// sure that nothing of it is in use.
void close_driver();

// The primary context of a device (the one torch uses), retained once per process.
cu::Context primary_context(int device);

// Makes a device's primary context current for a scope, and lets the scope make calls that are only
// "potentially unsafe" while another thread captures a graph (they do not touch captured streams).
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  cu::CaptureMode previous_mode_ = cu::CAPTURE_RELAXED;
};

int device_attribute(cu::DeviceAttribute attribute, int device);

}  // namespace dak
