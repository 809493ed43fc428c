#include "bind_memory.h"

#include <pybind11/stl.h>

#include "cpu_window.h"
#include "dlpack.h"
#include "range.h"
#include "reaper.h"
#include "record_chunk.h"
#include "registered.h"
#include "shared_pages.h"
#include "transfer.h"

namespace dak {
namespace {

namespace py = pybind11;
using Unlocked = py::call_guard<py::gil_scoped_release>;

const char* python_name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::Driver: return "DriverError";
    case ErrorKind::UnsupportedDriver: return "UnsupportedDriverError";
    case ErrorKind::Tier: return "TierError";
    case ErrorKind::TieredTensor: return "TieredTensorError";
    case ErrorKind::HostMemory: return "HostMemoryError";
    case ErrorKind::DeviceMemory: return "DeviceMemoryError";
    case ErrorKind::Move: return "MoveError";
    case ErrorKind::Compilation: return "CompilationError";
    case ErrorKind::Checkpoint: return "CheckpointError";
  }
  return "DakError";
}

void set_python_error(const Error& error) {
  const py::object type = py::module_::import("dak_inductor.errors").attr(python_name(error.kind));
  py::object value;
  if (error.kind == ErrorKind::Driver || error.kind == ErrorKind::UnsupportedDriver)
    value = type(error.what(), py::arg("call") = error.call, py::arg("status") = error.status);
  else
    value = type(error.what());
  PyErr_SetObject(type.ptr(), value.ptr());
}

Residency to_residency(const std::string& pages) { return {pages.begin(), pages.end()}; }

py::bytes from_residency(const Residency& residency) {
  return {reinterpret_cast<const char*>(residency.data()), residency.size()};
}

template <class Memory>
void write_address(Memory& memory, std::uint64_t source, std::size_t count, std::size_t offset) {
  memory.write(reinterpret_cast<const void*>(source), count, offset);
}

template <class Memory>
py::bytes read_bytes(Memory& memory, std::size_t count, std::size_t offset) {
  std::string bytes(count, '\0');
  {
    py::gil_scoped_release unlocked;
    memory.read(bytes.data(), count, offset);
  }
  return bytes;
}

void bind_ranges(py::module_& m) {
  py::class_<MoveTimes>(m, "MoveTimes", "What a move took, in seconds; `bytes_copied` is whole pages.")
      .def_readonly("prepare_seconds", &MoveTimes::prepare_seconds)
      .def_readonly("copy_seconds", &MoveTimes::copy_seconds)
      .def_readonly("remap_seconds", &MoveTimes::remap_seconds)
      .def_readonly("release_seconds", &MoveTimes::release_seconds)
      .def_readonly("bytes_copied", &MoveTimes::bytes_copied)
      .def_readonly("prepared_ahead", &MoveTimes::prepared_ahead);

  py::class_<MakeTimes>(m, "MakeTimes", "What making a range took, in seconds.")
      .def_readonly("create_seconds", &MakeTimes::create_seconds)
      .def_readonly("map_seconds", &MakeTimes::map_seconds)
      .def_readonly("access_seconds", &MakeTimes::access_seconds);

  // Residencies cross as bytes, one per page, 1 where the page is remote.
  py::class_<TieredRange, std::shared_ptr<TieredRange>>(m, "TieredRange")
      .def_property_readonly("address", &TieredRange::address)
      .def_property_readonly("nbytes", &TieredRange::nbytes)
      .def_property_readonly("page_count", &TieredRange::page_count)
      .def_property_readonly("start_offset", &TieredRange::offset)
      .def("generation", &TieredRange::generation, Unlocked())
      .def("physical_bytes", &TieredRange::physical_bytes, Unlocked())
      .def("grow", &TieredRange::grow, Unlocked(), "grow(pages): give the first pages memory of their own")
      .def("growth", &TieredRange::growth, Unlocked(), "growth(pages) -> (local, remote) bytes it would make")
      .def("make_ahead", &TieredRange::make_ahead, Unlocked(), "make_ahead(pages) -> bytes of one allocation")
      .def("next_ahead", &TieredRange::next_ahead, Unlocked(), "What make_ahead(pages) would return.")
      .def("drop_ahead", &TieredRange::drop_ahead, Unlocked())
      .def("ahead_pages", &TieredRange::ahead_pages, Unlocked())
      .def("ahead_bytes", &TieredRange::ahead_bytes, Unlocked())
      .def("committed_pages", &TieredRange::committed_pages, Unlocked())
      .def("remote_bytes_in", &TieredRange::remote_bytes_in, Unlocked())
      .def("residency",
           [](TieredRange& range) {
             Residency pages;
             {
               py::gil_scoped_release unlocked;
               pages = range.residency();
             }
             return from_residency(pages);
           })
      .def(
          "move",
          [](TieredRange& range, const std::string& target) { return range.move(to_residency(target)); },
          Unlocked())
      .def(
          "prepare",
          [](TieredRange& range, const std::string& target) {
            range.prepare_in_background(to_residency(target));
          },
          Unlocked())
      .def("finish_preparation", &TieredRange::finish_preparation, Unlocked())
      .def("cancel_preparation", &TieredRange::cancel_preparation, Unlocked())
      .def("map", &TieredRange::map, Unlocked(), "The second step of `Tier.make`.")
      .def_property_readonly("make_times", &TieredRange::make_times)
      .def("write", write_address<TieredRange>, Unlocked(), "write(source address, bytes, offset)")
      .def("write_file", &TieredRange::write_file, Unlocked(), py::arg("descriptor"), py::arg("position"),
           py::arg("count"), py::arg("offset"))
      .def("read", read_bytes<TieredRange>, "read(bytes, offset) -> bytes")
      .def("open_for_cpu", &TieredRange::open_for_cpu, Unlocked(),
           "open_for_cpu(start, stop) -> (window, CPU address of byte start)")
      .def(
          "export_host_pages",
          [](TieredRange& range) {
            std::vector<std::tuple<int, std::size_t, std::int64_t>> files;
            for (auto& [descriptor, pages] : range.export_host_pages())
              files.emplace_back(descriptor, pages.count() * range.page_bytes(),
                                 static_cast<std::int64_t>(pages.first * range.page_bytes()) -
                                     static_cast<std::int64_t>(range.offset()));
            return files;
          },
          Unlocked(), "[(file descriptor, bytes, offset of its first byte from byte 0)]");

  py::class_<CpuWindow, std::shared_ptr<CpuWindow>>(m, "CpuWindow",
                                                    "Host pages mapped for the CPU; keeps them alive.")
      .def_property_readonly("nbytes", &CpuWindow::nbytes);

  py::class_<ImportedPages, std::shared_ptr<ImportedPages>>(m, "ImportedPages")
      .def(py::init(&ImportedPages::create), Unlocked())
      .def_property_readonly("address", &ImportedPages::address)
      .def_property_readonly("cpu_address", &ImportedPages::cpu_address)
      .def_property_readonly("nbytes", &ImportedPages::nbytes);

  py::class_<RegisteredBlock, std::shared_ptr<RegisteredBlock>>(m, "RegisteredBlock")
      .def(py::init(&RegisteredBlock::create), Unlocked())
      .def_property_readonly("address", &RegisteredBlock::address)
      .def_property_readonly(
          "host", [](RegisteredBlock& block) { return reinterpret_cast<std::uint64_t>(block.host()); })
      .def_property_readonly("physical_bytes", &RegisteredBlock::physical_bytes)
      .def("write", write_address<RegisteredBlock>, Unlocked())
      .def("read", read_bytes<RegisteredBlock>);
}

void bind_records(py::module_& m) {
  py::class_<RecordChunk, std::shared_ptr<RecordChunk>>(m, "RecordChunk")
      .def(py::init(&RecordChunk::create), Unlocked(), py::arg("device"), py::arg("nbytes"))
      .def_property_readonly("address", &RecordChunk::address)
      .def_property_readonly("nbytes", &RecordChunk::nbytes)
      .def(
          "write",
          [](RecordChunk& chunk, const std::string& bytes, std::size_t offset) {
            chunk.write(bytes.data(), bytes.size(), offset);
          },
          Unlocked(), py::arg("bytes"), py::arg("offset"))
      .def("read", read_bytes<RecordChunk>, "read(bytes, offset) -> bytes");
}

// Runs on the reaper's thread. What is left when the interpreter ends is dropped with the reaper.
void run_after_work(int device, py::object task) {
  PyObject* callable = task.release().ptr();
  reaper::enqueue({device}, [callable] {
    py::gil_scoped_acquire lock;
    if (PyObject* result = PyObject_CallNoArgs(callable))
      Py_DECREF(result);
    else
      PyErr_WriteUnraisable(callable);
    Py_DECREF(callable);
  });
}

void bind_tier(py::module_& m) {
  py::class_<Tier, std::shared_ptr<Tier>>(m, "Tier")
      .def(py::init([](int device, int peer, bool host_access_by_node) {
             return std::make_shared<Tier>(
                 device, peer, host_access_by_node ? cu::LOCATION_HOST_NUMA : cu::LOCATION_HOST);
           }),
           Unlocked(), py::arg("device"), py::arg("peer") = -1, py::arg("host_access_by_node") = true)
      .def_property_readonly("page_bytes", &Tier::page_bytes)
      .def("allocate", &TieredRange::create, Unlocked(), py::arg("nbytes"), py::arg("split"))
      .def("allocate_growing", &TieredRange::create_growing, Unlocked(), py::arg("nbytes"), py::arg("split"))
      .def("make", &TieredRange::make, Unlocked(), py::arg("nbytes"), py::arg("split"),
           "`allocate` without mapping: a range that `map` makes usable.")
      .def(
          "reserve",
          [](Tier& tier, std::size_t bytes) {
            if (tier.pool()) tier.pool()->reserve(bytes);
          },
          Unlocked())
      .def(
          "stop",
          [](Tier& tier) {
            if (tier.pool()) tier.pool()->stop();
          },
          Unlocked())
      .def(
          "prepared_bytes",
          [](Tier& tier) { return tier.pool() ? tier.pool()->prepared_bytes() : 0; }, Unlocked());
}

}  // namespace

void register_errors() {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Error& error) {
      set_python_error(error);
    }
  });
}

void bind_memory(py::module_& m) {
  bind_tier(m);
  bind_ranges(m);
  bind_records(m);
  m.def("run_after_work", &run_after_work, py::arg("device"), py::arg("task"),
        "Call `task` on another thread once all work now queued on the device is done.");
  m.def("export_bytes", &export_bytes, py::arg("owner"), py::arg("address"), py::arg("nbytes"),
        py::arg("device_type"), py::arg("device_index"));
  m.def("memory_in_use", &memory_in_use, "Bytes held by this process, by place.");
  m.def("live_handles", &live_handles, "Physical allocations held by this process.");
  m.def("drain", &reaper::drain, Unlocked(), py::arg("seconds") = 10.0,
        "Wait until all memory given up is free; False after `seconds`.");
  m.def("shutdown", &reaper::shutdown, Unlocked(), py::arg("seconds") = 5.0);
  m.def("watch_streams", [](const std::vector<std::uint64_t>& handles) {
    std::vector<cu::Stream> streams;
    for (std::uint64_t handle : handles) streams.push_back(reinterpret_cast<cu::Stream>(handle));
    reaper::watch_streams(std::move(streams));
  });
  m.def("capture_is_open", &reaper::capture_is_open, Unlocked(), "On one of the watched streams.");
  m.def("release_staging", &release_staging, Unlocked());
}

}  // namespace dak
