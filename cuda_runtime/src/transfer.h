// Filling a range from CPU memory or from a file.
#pragma once

#include <sys/types.h>

#include <cstddef>

#include "tier.h"

namespace dak {

// Copy `count` bytes of any CPU memory to a range of either tier, synchronously, through a ring of pinned
// blocks. Host pages too are filled by the copy engine: mapping them for the CPU first means another
// cuMemSetAccess, which contends with the threads that make pages. The tier's device is current.
void copy_in(const Tier& tier, cu::DevicePtr target, const char* source, std::size_t count);

// The same for bytes [position, position + count) of a file, read straight into the pinned blocks: a memory
// map of the file would take a page fault for every page. Throws Checkpoint where the file ends before that.
void copy_in_file(const Tier& tier, cu::DevicePtr target, int descriptor, off_t position, std::size_t count);

// Give back the pinned blocks.
void release_staging();

}  // namespace dak
