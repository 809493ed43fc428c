// A stand-in for libcuda: "device" and host allocations are memory files, mapped where the caller asks, so
// that aliasing, unmapping and contents are real. Streams and events are synchronous. It checks what the
// driver checks (whole mappings, access, granularity), counts calls, and fails on demand.
//
//   DAK_FAKE_DEVICES      number of devices (2)
//   DAK_FAKE_HOST_NUMA    "refuse": host allocations are not supported; "crash": making one aborts;
//                         "host": CPU access must be asked for by location type HOST
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>

#include "../../cuda_runtime/src/driver_types.h"

namespace {

using namespace dak;
using cu::Result;

constexpr std::size_t PAGE = std::size_t{2} << 20;
constexpr Result ILLEGAL_ADDRESS = 700;
constexpr Result CAPTURE_UNSUPPORTED = cu::ERROR_STREAM_CAPTURE_UNSUPPORTED;

struct Allocation {
  int file = -1;
  std::size_t bytes = 0;
  cu::MemLocation location{};
  bool released = false;
  int mappings = 0;
};
struct Mapping {
  std::size_t bytes = 0;
  cu::AllocationHandle handle = 0;
  bool accessible = false;
  bool open_to_cpu = false;
};
struct Failure {
  std::string name;
  long after = 0;
  Result status = 0;
  bool lasting = false;
};

struct State {
  std::recursive_mutex mutex;
  std::map<cu::AllocationHandle, Allocation> allocations;
  std::map<cu::DevicePtr, std::size_t> reservations;
  std::map<cu::DevicePtr, Mapping> mappings;
  std::map<std::string, long> calls;
  std::map<int, int> attributes;
  std::map<void*, std::size_t> blocks;      // cuMemAlloc, cuMemHostAlloc
  std::map<void*, std::size_t> registered;  // cuMemHostRegister
  Failure failure;
  std::map<int, std::size_t> used;  // bytes by device; host is -1
  std::map<int, std::size_t> capacity;
  cu::AllocationHandle next_handle = 1000;
  std::uintptr_t next_object = 16;
  std::set<cu::Event> events;
  bool capturing = false;
  long forbidden = 0;  // calls that would have broken a capture of another thread
  thread_local static int context;
  thread_local static cu::CaptureMode mode;
};
thread_local int State::context = 0;
thread_local cu::CaptureMode State::mode = cu::CAPTURE_GLOBAL;
State& state() {
  static State* instance = new State;
  return *instance;
}

// Counts a call; a non-zero result is the failure to return.
Result enter(const char* name) {
  State& s = state();
  ++s.calls[name];
  ++s.calls["*"];
  const bool memory = std::string(name).starts_with("cuMem") || std::string(name) == "cuStreamSynchronize";
  if (s.capturing && memory && State::mode == cu::CAPTURE_GLOBAL) ++s.forbidden;
  Failure& failure = s.failure;
  if (!failure.status || (failure.name != "*" && failure.name != name)) return cu::SUCCESS;
  if (failure.after-- > 0) return cu::SUCCESS;
  const Result status = failure.status;
  if (!failure.lasting) failure = {};
  return status;
}

#define ENTER(name)                              \
  std::lock_guard lock(state().mutex);           \
  State& s = state();                            \
  if (Result failed = enter(#name)) return failed; \
  (void)s

int counted_at(const cu::MemLocation& location) {
  return location.type == cu::LOCATION_DEVICE ? location.id : -1;
}

std::size_t capacity(int device) {
  auto found = state().capacity.find(device);
  return found == state().capacity.end() ? std::size_t{64} << 30 : found->second;
}

bool take(int device, std::size_t bytes) {
  if (state().used[device] + bytes > capacity(device)) return false;
  state().used[device] += bytes;
  return true;
}

void free_if_unused(cu::AllocationHandle handle) {
  State& s = state();
  Allocation& allocation = s.allocations.at(handle);
  if (!allocation.released || allocation.mappings) return;
  s.used[counted_at(allocation.location)] -= allocation.bytes;
  close(allocation.file);
  s.allocations.erase(handle);
}

// Whole mappings that cover [address, address + bytes) without a gap; false if there are none such.
template <class Visit>
bool whole_mappings(cu::DevicePtr address, std::size_t bytes, Visit visit) {
  State& s = state();
  const cu::DevicePtr end = address + bytes;
  for (cu::DevicePtr at = address; at < end;) {
    auto found = s.mappings.find(at);
    if (found == s.mappings.end() || at + found->second.bytes > end) return false;
    at += found->second.bytes;
  }
  for (cu::DevicePtr at = address; at < end;) {
    auto found = s.mappings.find(at);
    at += found->second.bytes;
    if (!visit(found)) return false;
  }
  return true;
}

// False if part of [address, address + bytes) is reserved and cannot be read and written.
bool accessible(cu::DevicePtr address, std::size_t bytes) {
  State& s = state();
  auto reservation = s.reservations.upper_bound(address);
  if (reservation == s.reservations.begin()) return true;
  --reservation;
  if (address >= reservation->first + reservation->second) return true;
  for (cu::DevicePtr at = address; at < address + bytes;) {
    auto mapping = s.mappings.upper_bound(at);
    if (mapping == s.mappings.begin()) return false;
    --mapping;
    if (at >= mapping->first + mapping->second.bytes || !mapping->second.accessible) return false;
    at = mapping->first + mapping->second.bytes;
  }
  return true;
}

Result copy(cu::DevicePtr target, cu::DevicePtr source, std::size_t bytes) {
  if (!accessible(target, bytes) || !accessible(source, bytes)) return ILLEGAL_ADDRESS;
  std::memmove(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes);
  return cu::SUCCESS;
}

int device_count() {
  const char* count = std::getenv("DAK_FAKE_DEVICES");
  return count ? std::atoi(count) : 2;
}

std::string host_numa() {
  const char* mode = std::getenv("DAK_FAKE_HOST_NUMA");
  return mode ? mode : "";
}

}  // namespace

extern "C" {

// -- controls ------------------------------------------------------------------------------------
extern const int dak_fake_driver = 1;

// The call of `name` ("*": any) after `after` more fails with `status`, and if `lasting` all that follow.
void dak_fake_fail(const char* name, long after, int status, int lasting) {
  state().failure = {name, after, status, lasting != 0};
}
int dak_fake_pending() { return state().failure.status != 0; }
long dak_fake_forbidden() { return state().forbidden; }
long dak_fake_calls(const char* name) { return state().calls[name]; }
void dak_fake_reset_calls() { state().calls.clear(); }
void dak_fake_attribute(int attribute, int value) { state().attributes[attribute] = value; }
void dak_fake_capacity(int device, std::size_t bytes) {
  if (bytes) state().capacity[device] = bytes;
  else state().capacity.erase(device);
}
void dak_fake_capturing(int capturing) { state().capturing = capturing; }
std::size_t dak_fake_used(int device) { return state().used[device]; }
std::size_t dak_fake_allocations() { return state().allocations.size(); }
std::size_t dak_fake_reservations() { return state().reservations.size(); }
std::size_t dak_fake_mappings() { return state().mappings.size(); }
std::size_t dak_fake_events() { return state().events.size(); }
std::size_t dak_fake_open_to_cpu() {
  std::size_t count = 0;
  for (auto& [address, mapping] : state().mappings) count += mapping.open_to_cpu;
  return count;
}

// -- devices and contexts ------------------------------------------------------------------------
Result cuInit(unsigned int) {
  ENTER(cuInit);
  return device_count() > 0 ? cu::SUCCESS : 100;
}
Result cuGetErrorName(Result, const char** name) {
  *name = "CUDA_ERROR_FAKE";
  return cu::SUCCESS;
}
Result cuGetErrorString(Result, const char** text) {
  *text = "a failure made by the stand-in driver";
  return cu::SUCCESS;
}
Result cuDeviceGet(cu::Device* device, int ordinal) {
  ENTER(cuDeviceGet);
  *device = ordinal;
  return ordinal < device_count() ? cu::SUCCESS : 101;
}
Result cuDeviceGetAttribute(int* value, cu::DeviceAttribute attribute, cu::Device) {
  ENTER(cuDeviceGetAttribute);
  if (auto found = s.attributes.find(attribute); found != s.attributes.end()) *value = found->second;
  else if (attribute == cu::DEVICE_HOST_NUMA_ID) *value = -1;
  else *value = 1;
  return cu::SUCCESS;
}
Result cuDeviceCanAccessPeer(int* possible, cu::Device, cu::Device) {
  ENTER(cuDeviceCanAccessPeer);
  *possible = 1;
  return cu::SUCCESS;
}
Result cuDevicePrimaryCtxRetain(cu::Context* context, cu::Device device) {
  ENTER(cuDevicePrimaryCtxRetain);
  *context = reinterpret_cast<cu::Context>(static_cast<std::uintptr_t>(device + 1));
  return cu::SUCCESS;
}
Result cuDevicePrimaryCtxRelease(cu::Device) { return cu::SUCCESS; }
Result cuCtxPushCurrent(cu::Context context) {
  ENTER(cuCtxPushCurrent);
  State::context = static_cast<int>(reinterpret_cast<std::uintptr_t>(context)) - 1;
  return cu::SUCCESS;
}
Result cuCtxPopCurrent(cu::Context*) { return cu::SUCCESS; }
Result cuCtxSynchronize() {
  ENTER(cuCtxSynchronize);
  return s.capturing ? CAPTURE_UNSUPPORTED : cu::SUCCESS;
}
Result cuThreadExchangeStreamCaptureMode(cu::CaptureMode* mode) {
  std::swap(*mode, State::mode);
  return cu::SUCCESS;
}

// -- virtual memory ------------------------------------------------------------------------------
Result cuMemGetInfo(std::size_t* free, std::size_t* total) {
  ENTER(cuMemGetInfo);
  *total = capacity(State::context);
  *free = *total - s.used[State::context];
  return cu::SUCCESS;
}
Result cuMemGetAllocationGranularity(std::size_t* bytes, const cu::MemAllocationProp*, cu::Granularity) {
  ENTER(cuMemGetAllocationGranularity);
  *bytes = PAGE;
  return cu::SUCCESS;
}
Result cuMemAddressReserve(cu::DevicePtr* address, std::size_t bytes, std::size_t alignment,
                           cu::DevicePtr, unsigned long long) {
  ENTER(cuMemAddressReserve);
  if (!bytes || bytes % PAGE || alignment % PAGE) return cu::ERROR_INVALID_VALUE;
  const std::size_t padded = bytes + PAGE;
  void* memory = mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return cu::ERROR_OUT_OF_MEMORY;
  const auto start = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t aligned = (start + PAGE - 1) / PAGE * PAGE;
  if (aligned > start) munmap(memory, aligned - start);
  if (std::size_t rest = start + padded - aligned - bytes) munmap(reinterpret_cast<void*>(aligned + bytes), rest);
  s.reservations[aligned] = bytes;
  *address = aligned;
  return cu::SUCCESS;
}
Result cuMemAddressFree(cu::DevicePtr address, std::size_t bytes) {
  ENTER(cuMemAddressFree);
  auto found = s.reservations.find(address);
  if (found == s.reservations.end() || found->second != bytes) return cu::ERROR_INVALID_VALUE;
  auto mapping = s.mappings.lower_bound(address);
  if (mapping != s.mappings.end() && mapping->first < address + bytes) return cu::ERROR_INVALID_VALUE;
  munmap(reinterpret_cast<void*>(address), bytes);
  s.reservations.erase(found);
  return cu::SUCCESS;
}
Result cuMemCreate(cu::AllocationHandle* handle, std::size_t bytes, const cu::MemAllocationProp* wanted,
                   unsigned long long) {
  ENTER(cuMemCreate);
  const bool host = wanted->location.type != cu::LOCATION_DEVICE;
  if (host && host_numa() == "crash") std::abort();
  if (host && host_numa() == "refuse") return cu::ERROR_NOT_SUPPORTED;
  if (!bytes || bytes % PAGE || wanted->type != cu::ALLOCATION_PINNED) return cu::ERROR_INVALID_VALUE;
  if (wanted->location.id < 0) return cu::ERROR_INVALID_VALUE;
  if (!take(counted_at(wanted->location), bytes)) return cu::ERROR_OUT_OF_MEMORY;
  const int file = memfd_create("fake_cuda", MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes))) return cu::ERROR_OUT_OF_MEMORY;
  *handle = s.next_handle++;
  s.allocations[*handle] = {file, bytes, wanted->location, false, 0};
  return cu::SUCCESS;
}
Result cuMemRelease(cu::AllocationHandle handle) {
  ENTER(cuMemRelease);
  auto found = s.allocations.find(handle);
  if (found == s.allocations.end() || found->second.released) return cu::ERROR_INVALID_VALUE;
  found->second.released = true;
  free_if_unused(handle);
  return cu::SUCCESS;
}
Result cuMemMap(cu::DevicePtr address, std::size_t bytes, std::size_t offset, cu::AllocationHandle handle,
                unsigned long long) {
  ENTER(cuMemMap);
  auto allocation = s.allocations.find(handle);
  if (allocation == s.allocations.end() || allocation->second.released) return cu::ERROR_INVALID_VALUE;
  if (offset || bytes != allocation->second.bytes || address % PAGE) return cu::ERROR_INVALID_VALUE;
  auto reservation = s.reservations.upper_bound(address);
  if (reservation == s.reservations.begin()) return cu::ERROR_INVALID_VALUE;
  --reservation;
  if (address + bytes > reservation->first + reservation->second) return cu::ERROR_INVALID_VALUE;
  auto next = s.mappings.lower_bound(address);
  if (next != s.mappings.end() && next->first < address + bytes) return cu::ERROR_INVALID_VALUE;
  if (next != s.mappings.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second.bytes > address) return cu::ERROR_INVALID_VALUE;
  }
  void* at = reinterpret_cast<void*>(address);
  if (mmap(at, bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, allocation->second.file, 0) == MAP_FAILED)
    return cu::ERROR_OUT_OF_MEMORY;
  ++allocation->second.mappings;
  s.mappings[address] = {bytes, handle, false, false};
  return cu::SUCCESS;
}
Result cuMemUnmap(cu::DevicePtr address, std::size_t bytes) {
  ENTER(cuMemUnmap);
  std::set<cu::DevicePtr> found;
  const bool whole = whole_mappings(address, bytes, [&](auto mapping) {
    found.insert(mapping->first);
    return true;
  });
  if (!whole || !bytes) return cu::ERROR_INVALID_VALUE;
  mmap(reinterpret_cast<void*>(address), bytes, PROT_NONE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  for (cu::DevicePtr at : found) {
    const cu::AllocationHandle handle = s.mappings[at].handle;
    s.mappings.erase(at);
    --s.allocations.at(handle).mappings;
    free_if_unused(handle);
  }
  return cu::SUCCESS;
}
Result cuMemSetAccess(cu::DevicePtr address, std::size_t bytes, const cu::MemAccessDesc* access,
                      std::size_t count) {
  ENTER(cuMemSetAccess);
  const bool valid = whole_mappings(address, bytes, [&](auto mapping) {
    const bool host = s.allocations.at(mapping->second.handle).location.type != cu::LOCATION_DEVICE;
    bool device = false;
    mapping->second.open_to_cpu = false;
    for (std::size_t i = 0; i < count; ++i) {
      const auto type = access[i].location.type;
      if (access[i].flags != cu::ACCESS_READWRITE && access[i].flags != cu::ACCESS_READ) return false;
      if (type == cu::LOCATION_DEVICE) device = true;
      else if (!host) return false;
      else if (type == cu::LOCATION_HOST_NUMA && host_numa() == "host") return false;
      else mapping->second.open_to_cpu = true;
    }
    return device;
  });
  if (!valid) return cu::ERROR_INVALID_VALUE;
  whole_mappings(address, bytes, [&](auto mapping) { return mapping->second.accessible = true; });
  // a write to what is only to be read ends the process, as a fault on a GPU does
  const int writing = access[0].flags == cu::ACCESS_READWRITE ? PROT_WRITE : 0;
  mprotect(reinterpret_cast<void*>(address), bytes, PROT_READ | writing);
  return cu::SUCCESS;
}
Result cuMemExportToShareableHandle(void* file, cu::AllocationHandle handle, cu::HandleType type,
                                    unsigned long long) {
  ENTER(cuMemExportToShareableHandle);
  auto allocation = s.allocations.find(handle);
  if (allocation == s.allocations.end() || type != cu::HANDLE_POSIX_FILE_DESCRIPTOR)
    return cu::ERROR_INVALID_VALUE;
  *static_cast<int*>(file) = dup(allocation->second.file);
  return cu::SUCCESS;
}
Result cuMemImportFromShareableHandle(cu::AllocationHandle* handle, void* file, cu::HandleType) {
  ENTER(cuMemImportFromShareableHandle);
  const int own = dup(static_cast<int>(reinterpret_cast<std::intptr_t>(file)));
  const off_t bytes = own < 0 ? -1 : lseek(own, 0, SEEK_END);
  if (bytes <= 0) return cu::ERROR_INVALID_VALUE;
  *handle = s.next_handle++;
  take(-1, static_cast<std::size_t>(bytes));
  s.allocations[*handle] = {own, static_cast<std::size_t>(bytes), {cu::LOCATION_HOST_NUMA, 0}, false, 0};
  return cu::SUCCESS;
}

// -- plain memory --------------------------------------------------------------------------------
Result cuMemAlloc(cu::DevicePtr* address, std::size_t bytes) {
  ENTER(cuMemAlloc);
  if (!take(State::context, bytes)) return cu::ERROR_OUT_OF_MEMORY;
  void* block = std::malloc(bytes);
  s.blocks[block] = bytes;
  *address = reinterpret_cast<cu::DevicePtr>(block);
  return cu::SUCCESS;
}
Result cuMemFree(cu::DevicePtr address) {
  ENTER(cuMemFree);
  auto found = s.blocks.find(reinterpret_cast<void*>(address));
  if (found == s.blocks.end()) return cu::ERROR_INVALID_VALUE;
  s.used[State::context] -= found->second;
  std::free(found->first);
  s.blocks.erase(found);
  return cu::SUCCESS;
}
Result cuMemHostAlloc(void** block, std::size_t bytes, unsigned int) {
  ENTER(cuMemHostAlloc);
  *block = std::malloc(bytes);
  s.blocks[*block] = bytes;
  return cu::SUCCESS;
}
Result cuMemFreeHost(void* block) {
  ENTER(cuMemFreeHost);
  s.blocks.erase(block);
  std::free(block);
  return cu::SUCCESS;
}
Result cuMemHostRegister(void* block, std::size_t bytes, unsigned int) {
  ENTER(cuMemHostRegister);
  s.registered[block] = bytes;
  return cu::SUCCESS;
}
Result cuMemHostUnregister(void* block) {
  ENTER(cuMemHostUnregister);
  return s.registered.erase(block) ? cu::SUCCESS : cu::ERROR_INVALID_VALUE;
}
Result cuMemHostGetDevicePointer(cu::DevicePtr* address, void* block, unsigned int) {
  ENTER(cuMemHostGetDevicePointer);
  *address = reinterpret_cast<cu::DevicePtr>(block);
  return cu::SUCCESS;
}

// -- copies, streams, events ---------------------------------------------------------------------
Result cuMemcpyAsync(cu::DevicePtr target, cu::DevicePtr source, std::size_t bytes, cu::Stream) {
  ENTER(cuMemcpyAsync);
  return copy(target, source, bytes);
}
Result cuMemsetD8Async(cu::DevicePtr target, unsigned char value, std::size_t bytes, cu::Stream) {
  ENTER(cuMemsetD8Async);
  if (!accessible(target, bytes)) return ILLEGAL_ADDRESS;
  std::memset(reinterpret_cast<void*>(target), value, bytes);
  return cu::SUCCESS;
}
Result cuMemcpyHtoDAsync(cu::DevicePtr target, const void* source, std::size_t bytes, cu::Stream) {
  ENTER(cuMemcpyHtoDAsync);
  return copy(target, reinterpret_cast<cu::DevicePtr>(source), bytes);
}
Result cuMemcpyDtoHAsync(void* target, cu::DevicePtr source, std::size_t bytes, cu::Stream) {
  ENTER(cuMemcpyDtoHAsync);
  return copy(reinterpret_cast<cu::DevicePtr>(target), source, bytes);
}
Result cuStreamCreate(cu::Stream* stream, unsigned int) {
  ENTER(cuStreamCreate);
  *stream = reinterpret_cast<cu::Stream>(s.next_object++);
  return cu::SUCCESS;
}
Result cuStreamDestroy(cu::Stream) { return cu::SUCCESS; }
Result cuStreamSynchronize(cu::Stream) {
  ENTER(cuStreamSynchronize);
  return cu::SUCCESS;
}
Result cuStreamIsCapturing(cu::Stream, cu::CaptureStatus* status) {
  *status = state().capturing ? cu::CAPTURE_ACTIVE : cu::CAPTURE_NONE;
  return cu::SUCCESS;
}
Result cuEventCreate(cu::Event* event, unsigned int) {
  ENTER(cuEventCreate);
  *event = reinterpret_cast<cu::Event>(s.next_object++);
  s.events.insert(*event);
  return cu::SUCCESS;
}
Result cuEventDestroy(cu::Event event) {
  std::lock_guard lock(state().mutex);
  return state().events.erase(event) ? cu::SUCCESS : cu::ERROR_INVALID_VALUE;
}
Result cuEventRecord(cu::Event, cu::Stream) {
  ENTER(cuEventRecord);
  return cu::SUCCESS;
}
Result cuEventSynchronize(cu::Event) {
  ENTER(cuEventSynchronize);
  return cu::SUCCESS;
}

// -- entry ---------------------------------------------------------------------------------------
Result cuGetProcAddress_v2(const char* name, void** pointer, int, std::uint64_t,
                           cu::ProcAddressResult* found) {
#define KNOWN(function) {#function, reinterpret_cast<void*>(&function)}
  static const std::map<std::string, void*> functions = {
      KNOWN(cuInit), KNOWN(cuGetErrorName), KNOWN(cuGetErrorString),
      KNOWN(cuDeviceGet), KNOWN(cuDeviceGetAttribute),
      KNOWN(cuDeviceCanAccessPeer), KNOWN(cuDevicePrimaryCtxRetain), KNOWN(cuDevicePrimaryCtxRelease),
      KNOWN(cuCtxPushCurrent), KNOWN(cuCtxPopCurrent), KNOWN(cuCtxSynchronize),
      KNOWN(cuThreadExchangeStreamCaptureMode), KNOWN(cuMemGetInfo),
      KNOWN(cuMemGetAllocationGranularity), KNOWN(cuMemAddressReserve), KNOWN(cuMemAddressFree),
      KNOWN(cuMemCreate), KNOWN(cuMemRelease), KNOWN(cuMemMap), KNOWN(cuMemUnmap), KNOWN(cuMemSetAccess),
      KNOWN(cuMemExportToShareableHandle), KNOWN(cuMemImportFromShareableHandle), KNOWN(cuMemAlloc),
      KNOWN(cuMemFree), KNOWN(cuMemHostAlloc), KNOWN(cuMemFreeHost), KNOWN(cuMemHostRegister),
      KNOWN(cuMemHostUnregister), KNOWN(cuMemHostGetDevicePointer), KNOWN(cuMemcpyAsync),
      KNOWN(cuMemsetD8Async),
      KNOWN(cuMemcpyHtoDAsync), KNOWN(cuMemcpyDtoHAsync), KNOWN(cuStreamCreate), KNOWN(cuStreamDestroy),
      KNOWN(cuStreamSynchronize), KNOWN(cuStreamIsCapturing), KNOWN(cuEventCreate), KNOWN(cuEventDestroy),
      KNOWN(cuEventRecord), KNOWN(cuEventSynchronize)};
  auto entry = functions.find(name);
  const char* missing = std::getenv("DAK_FAKE_MISSING");  // a function that this driver lacks
  const bool known = entry != functions.end() && !(missing && entry->first == missing);
  *pointer = known ? entry->second : nullptr;
  *found = *pointer ? cu::PROC_FOUND : cu::PROC_NOT_FOUND;
  return cu::SUCCESS;
}

}  // extern "C"
