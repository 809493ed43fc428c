// Filling a range from CPU memory.
#pragma once

#include <cstddef>

#include "tier.h"

namespace dak {

// Copy `count` bytes of any CPU memory to a range of either tier, synchronously, through a ring of pinned
// blocks. Host pages too are filled by the copy engine (48 GB/s on H200 over PCIe): mapping them for the CPU
// first takes longer and holds up the threads that make pages (12 GB/s). The tier's device is current.
void copy_in(const Tier& tier, cu::DevicePtr target, const char* source, std::size_t count);

// Give back the pinned blocks.
void release_staging();

}  // namespace dak
