#include "dlpack.h"

#include "reaper.h"

namespace dak {
namespace {

namespace py = pybind11;

// The binary interface of DLPack 0.8, which every consumer still takes.
struct DLDevice {
  std::int32_t device_type, device_id;
};
struct DLDataType {
  std::uint8_t code, bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

struct ExportedBytes {
  DLManagedTensor managed{};
  std::int64_t shape[1]{};
  PyObject* owner = nullptr;
};

// Runs on any thread, with or without the interpreter's lock.
void drop(DLManagedTensor* managed) {
  auto* exported = static_cast<ExportedBytes*>(managed->manager_ctx);
  reaper::enqueue({}, [exported] {
    py::gil_scoped_acquire lock;
    Py_DECREF(exported->owner);
    delete exported;
  });
}

void drop_unused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // consumed: the tensor drops it
  drop(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor")));
}

}  // namespace

py::capsule export_bytes(py::object owner, std::uint64_t address, std::int64_t nbytes, int device_type,
                         int device_index) {
  auto* exported = new ExportedBytes;
  exported->owner = owner.release().ptr();
  exported->shape[0] = nbytes;
  DLTensor& tensor = exported->managed.dl_tensor;
  tensor.data = reinterpret_cast<void*>(address);
  tensor.device = {device_type, device_index};
  tensor.ndim = 1;
  tensor.dtype = {1, 8, 1};  // unsigned integer, 8 bits, 1 lane
  tensor.shape = exported->shape;
  exported->managed.manager_ctx = exported;
  exported->managed.deleter = drop;
  return py::reinterpret_steal<py::capsule>(
      PyCapsule_New(&exported->managed, "dltensor", drop_unused));
}

}  // namespace dak
