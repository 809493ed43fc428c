// Bytes as a DLPack capsule, which keeps a Python object alive for as long as the tensor made of it.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace dak {

inline constexpr int DLPACK_CPU = 1;
inline constexpr int DLPACK_CUDA = 2;

// A one-dimensional uint8 capsule ("dltensor") over [address, address + nbytes). `owner` is released by the
// reaper, on its own thread, whichever thread drops the tensor.
pybind11::capsule export_bytes(pybind11::object owner, std::uint64_t address, std::int64_t nbytes,
                               int device_type, int device_index);

}  // namespace dak
