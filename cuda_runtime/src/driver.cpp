#include "driver.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

namespace dak {
namespace {

constexpr int ABI_VERSION = 12000;
using GetProcAddress = cu::Result (*)(const char*, void**, int, std::uint64_t,
                                      cu::ProcAddressResult*);

// Never destroyed: threads and deleters may outlive static destruction.
struct State {
  std::mutex mutex;
  std::atomic<const Driver*> open{nullptr};
  std::map<int, cu::Context> contexts;
  std::vector<const Driver*> closed;
};
State& state() {
  static State* instance = new State;
  return *instance;
}
std::atomic<bool> forked{false};

void in_child() {
  if (state().open.load()) forked.store(true);
}

template <class... Parameters>
void resolve(DriverFunction<Parameters...>& function, GetProcAddress find) {
  void* pointer = nullptr;
  cu::ProcAddressResult found = cu::PROC_NOT_FOUND;
  if (find(function.name, &pointer, ABI_VERSION, 0, &found) == cu::SUCCESS && found == cu::PROC_FOUND)
    function.pointer = reinterpret_cast<cu::Result (*)(Parameters...)>(pointer);
}

std::unique_ptr<Driver> open_library() {
  const char* requested = std::getenv("DAK_LIBCUDA");
  auto opened = std::make_unique<Driver>();
  opened->library = requested && *requested ? requested : "libcuda.so.1";
  void* library = dlopen(opened->library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = dlerror();
    throw Error(ErrorKind::UnsupportedDriver,
                "the CUDA driver could not be opened: " +
                    std::string(reason ? reason : opened->library) +
                    ". Tiers in GPU memory need an NVIDIA driver of CUDA 12.2 or later; "
                    "remote=\"simulated\" needs none.",
                "dlopen");
  }
  auto find = reinterpret_cast<GetProcAddress>(dlsym(library, "cuGetProcAddress_v2"));
  if (!find)
    throw Error(ErrorKind::UnsupportedDriver,
                opened->library + " is older than CUDA 12.0 (it has no cuGetProcAddress_v2); "
                                  "tiered memory needs a driver of CUDA 12.2 or later",
                "cuGetProcAddress_v2");
  opened->fake = dlsym(library, "dak_fake_driver") != nullptr;
#define DAK_RESOLVE(name, ...) resolve(opened->name, find);
  DAK_DRIVER_FUNCTIONS(DAK_RESOLVE)
#undef DAK_RESOLVE
  cu::Result result = opened->cuInit.status(0);
  if (result != cu::SUCCESS) {
    const char* text = nullptr;
    if (opened->cuGetErrorString.available()) opened->cuGetErrorString.status(result, &text);
    throw Error(ErrorKind::UnsupportedDriver,
                "cuInit failed with status " + std::to_string(result) + ": " +
                    (text ? text : "unknown error") + ". Is a GPU visible to this process?",
                "cuInit", result);
  }
  return opened;
}

}  // namespace

const Driver& driver() {
  if (forked.load(std::memory_order_relaxed))
    throw Error(ErrorKind::TieredTensor,
                "CUDA memory was used in a forked child of the process that owns it; it does not "
                "survive a fork. Start the process with the 'spawn' method and offload there, or keep "
                "offloaded models out of forked workers.");
  if (const Driver* opened = state().open.load(std::memory_order_acquire)) return *opened;
  std::lock_guard lock(state().mutex);
  if (const Driver* opened = state().open.load()) return *opened;
  static bool handler_installed = pthread_atfork(nullptr, nullptr, in_child) == 0;
  (void)handler_installed;
  const Driver* opened = open_library().release();
  state().open.store(opened, std::memory_order_release);
  return *opened;
}

bool driver_is_open() { return state().open.load() != nullptr; }

bool in_forked_child() { return forked.load(); }

void close_driver() {
  std::lock_guard lock(state().mutex);
  const Driver* opened = state().open.exchange(nullptr);
  if (!opened) return;
  for (auto& [device, context] : state().contexts) opened->cuDevicePrimaryCtxRelease.status(device);
  state().contexts.clear();
  state().closed.push_back(opened);  // not deleted: a thread may still be reading it
}

std::string describe(cu::Result status) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (const Driver* opened = state().open.load()) {
    if (opened->cuGetErrorName.available()) opened->cuGetErrorName.status(status, &name);
    if (opened->cuGetErrorString.available()) opened->cuGetErrorString.status(status, &text);
  }
  return std::string(name ? name : "CUresult") + " (" + std::to_string(status) + ")" +
         (text ? std::string(": ") + text : std::string());
}

void throw_driver_error(const char* call, cu::Result status) {
  throw Error(ErrorKind::Driver, std::string(call) + " failed with " + describe(status), call, status);
}

void throw_missing_function(const char* call) {
  throw Error(ErrorKind::UnsupportedDriver,
              std::string("this CUDA driver has no ") + call +
                  "; a driver of CUDA 12.2 or later is needed",
              call);
}

cu::Context primary_context(int device) {
  const Driver& cuda = driver();
  std::lock_guard lock(state().mutex);
  auto& contexts = state().contexts;
  if (auto found = contexts.find(device); found != contexts.end()) return found->second;
  cu::Device ordinal = 0;
  cuda.cuDeviceGet(&ordinal, device);
  cu::Context context = nullptr;
  cuda.cuDevicePrimaryCtxRetain(&context, ordinal);
  contexts[device] = context;
  return context;
}

DeviceScope::DeviceScope(int device) {
  driver().cuCtxPopCurrent.need();
  driver().cuThreadExchangeStreamCaptureMode.need();
  driver().cuCtxPushCurrent(primary_context(device));
  driver().cuThreadExchangeStreamCaptureMode.status(&previous_mode_);
}

// NOLINTNEXTLINE(bugprone-exception-escape): the constructor has seen that these calls are there
DeviceScope::~DeviceScope() {
  if (in_forked_child()) return;
  cu::Context popped = nullptr;
  driver().cuThreadExchangeStreamCaptureMode.status(&previous_mode_);
  driver().cuCtxPopCurrent.status(&popped);
}

int device_attribute(cu::DeviceAttribute attribute, int device) {
  int value = 0;
  driver().cuDeviceGetAttribute(&value, attribute, device);
  return value;
}

}  // namespace dak
