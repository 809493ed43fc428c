// Filling a range from CPU memory.
#pragma once

#include <cstddef>

#include "tier.h"

namespace dak {

// Copy `count` bytes of CPU memory to host pages, at an address of a CpuWindow, on several threads.
void write_by_cpu(cu::DevicePtr target, const char* source, std::size_t count);

// Copy them to device memory, synchronously, through a ring of pinned blocks. The tier's device is current.
void write_by_copy_engine(const Tier& tier, cu::DevicePtr target, const char* source,
                          std::size_t count);

// Give back the pinned blocks.
void release_staging();

}  // namespace dak
