// The part of the CUDA driver's binary interface that this package uses, declared here so that the
// extension builds where no CUDA toolkit is installed. tests/cpu/test_vmm_declarations.py compiles
// these declarations against cuda.h and compares every size, offset and value.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dak::cu {

using Result = int;  // CUresult; 0 is success
using Device = int;
using DevicePtr = unsigned long long;
using AllocationHandle = unsigned long long;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;
using Module = struct ModuleTag*;
using Function = struct FunctionTag*;

inline constexpr Result SUCCESS = 0;
inline constexpr Result ERROR_INVALID_VALUE = 1;
inline constexpr Result ERROR_OUT_OF_MEMORY = 2;
inline constexpr Result ERROR_NOT_INITIALIZED = 3;
inline constexpr Result ERROR_DEINITIALIZED = 4;
inline constexpr Result ERROR_NOT_SUPPORTED = 801;
inline constexpr Result ERROR_NOT_READY = 600;
inline constexpr Result ERROR_PEER_ACCESS_ALREADY_ENABLED = 704;
inline constexpr Result ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712;
inline constexpr Result ERROR_STREAM_CAPTURE_UNSUPPORTED = 900;

enum DeviceAttribute : int {
  DEVICE_MULTIPROCESSOR_COUNT = 16,
  DEVICE_L2_CACHE_SIZE = 38,
  DEVICE_COMPUTE_CAPABILITY_MAJOR = 75,
  DEVICE_COMPUTE_CAPABILITY_MINOR = 76,
  DEVICE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM = 91,
  DEVICE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
  DEVICE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102,
  DEVICE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED = 103,
  DEVICE_CLUSTER_LAUNCH = 120,
  DEVICE_HOST_NUMA_ID = 134,
  DEVICE_HOST_NUMA_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 141,
};

enum LocationType : int {
  LOCATION_DEVICE = 1,
  LOCATION_HOST = 2,
  LOCATION_HOST_NUMA = 3,
};
enum AllocationType : int { ALLOCATION_PINNED = 1 };
enum HandleType : int { HANDLE_NONE = 0, HANDLE_POSIX_FILE_DESCRIPTOR = 1 };
enum AccessFlags : int { ACCESS_NONE = 0, ACCESS_READ = 1, ACCESS_READWRITE = 3 };
enum Granularity : int { GRANULARITY_MINIMUM = 0, GRANULARITY_RECOMMENDED = 1 };

struct MemLocation {
  LocationType type;
  int id;
};

struct MemAllocationProp {
  AllocationType type;
  HandleType requestedHandleTypes;
  MemLocation location;
  void* win32HandleMetaData;
  struct {
    unsigned char compressionType;
    unsigned char gpuDirectRDMACapable;
    unsigned short usage;
    unsigned char reserved[4];
  } allocFlags;
};

struct MemAccessDesc {
  MemLocation location;
  AccessFlags flags;
};

inline constexpr unsigned int STREAM_NON_BLOCKING = 1;
inline constexpr unsigned int EVENT_DISABLE_TIMING = 2;
inline constexpr unsigned int MEMHOST_PORTABLE = 1;   // the same bit for Alloc and Register
inline constexpr unsigned int MEMHOST_DEVICEMAP = 2;  // the same bit for Alloc and Register

enum CaptureMode : int { CAPTURE_GLOBAL = 0, CAPTURE_THREAD_LOCAL = 1, CAPTURE_RELAXED = 2 };
enum CaptureStatus : int { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1, CAPTURE_INVALIDATED = 2 };
enum ProcAddressResult : int { PROC_FOUND = 0, PROC_NOT_FOUND = 1, PROC_VERSION_TOO_OLD = 2 };

enum FunctionAttribute : int {
  FUNCTION_MAX_THREADS_PER_BLOCK = 0,
  FUNCTION_SHARED_SIZE_BYTES = 1,
  FUNCTION_CONST_SIZE_BYTES = 2,
  FUNCTION_LOCAL_SIZE_BYTES = 3,
  FUNCTION_NUM_REGS = 4,
  FUNCTION_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8,
  FUNCTION_PREFERRED_SHARED_MEMORY_CARVEOUT = 9,
  FUNCTION_NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14,
};

enum LaunchAttributeId : int {
  LAUNCH_COOPERATIVE = 2,
  LAUNCH_CLUSTER_DIMENSION = 4,
  LAUNCH_PROGRAMMATIC_STREAM_SERIALIZATION = 6,
  LAUNCH_PRIORITY = 8,
};

union LaunchAttributeValue {
  char pad[64];
  int cooperative;
  struct {
    unsigned int x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
  int priority;
  void* alignment_of_the_members_left_out;
};

struct LaunchAttribute {
  LaunchAttributeId id;
  char pad[4];
  LaunchAttributeValue value;
};

struct LaunchConfig {
  unsigned int gridDimX, gridDimY, gridDimZ;
  unsigned int blockDimX, blockDimY, blockDimZ;
  unsigned int sharedMemBytes;
  Stream hStream;
  LaunchAttribute* attrs;
  unsigned int numAttrs;
};

struct alignas(128) TensorMap {
  std::uint64_t opaque[16];
};

enum TensorMapDataType : int {
  TENSOR_MAP_UINT8 = 0,
  TENSOR_MAP_UINT16,
  TENSOR_MAP_UINT32,
  TENSOR_MAP_INT32,
  TENSOR_MAP_UINT64,
  TENSOR_MAP_INT64,
  TENSOR_MAP_FLOAT16,
  TENSOR_MAP_FLOAT32,
  TENSOR_MAP_FLOAT64,
  TENSOR_MAP_BFLOAT16,
};
enum TensorMapInterleave : int { INTERLEAVE_NONE = 0, INTERLEAVE_16B, INTERLEAVE_32B };
enum TensorMapSwizzle : int { SWIZZLE_NONE = 0, SWIZZLE_32B, SWIZZLE_64B, SWIZZLE_128B };
enum TensorMapL2promotion : int { L2_NONE = 0, L2_64B, L2_128B, L2_256B };
enum TensorMapFloatOOBfill : int { FILL_ZERO = 0, FILL_NAN_REQUEST_ZERO_FMA };

}  // namespace dak::cu
