// Panels: tiles in shared memory of rows of 16, 32 or 64 elements of 16 bits, swizzled as wide as a
// row. wgmma reads them either way: with depth along the rows (K-major) or across them (MN-major).
//
// A panel starts at a multiple of 1024 bytes. Its swizzle atom is 8 rows.
#pragma once

#include "ptx/shared_address.cuh"
#include "types.cuh"

namespace dak::tile {

template <u32 Width>
struct Panel {
  static_assert(Width == 16 || Width == 32 || Width == 64);
  static constexpr u32 width = Width;
  static constexpr u32 row_bytes = 2 * Width;
  static constexpr u32 chunks = row_bytes / 16;  // of 16 bytes in a row: what the swizzle permutes
  static constexpr u32 depth = 16;               // of one wgmma

  // What to add to a descriptor to go `depth` deeper: K-major, and MN-major.
  static constexpr u64 step_along_row = (depth * 2) >> 4;
  static constexpr u64 step_across_rows = (depth * row_bytes) >> 4;

  static __device__ __forceinline__ u64 descriptor(const void* panel) {
    constexpr u64 swizzle = (Width == 64 ? u64{1} : Width == 32 ? u64{2} : u64{3}) << 62;
    constexpr u64 atom_stride = u64{(8 * row_bytes) >> 4} << 32;
    constexpr u64 unused_stride = u64{1} << 16;  // an atom is as wide as the panel
    return swizzle | atom_stride | unused_stride |
           static_cast<u64>((ptx::shared_address(panel) & 0x3FFFF) >> 4);
  }

  // Where 16 bytes of a row lie, in bytes from the panel's start.
  static __device__ __forceinline__ u32 place(u32 row, u32 chunk) {
    const u32 plain = row * row_bytes + chunk * 16;
    return plain ^ ((plain >> 7 & (chunks - 1)) << 4);
  }
};

}  // namespace dak::tile
