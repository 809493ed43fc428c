// Tiles in shared memory as wgmma reads them: 16-bit elements, rows of 128 bytes, 128-byte swizzle.
//
// A tile starts at a multiple of 1024 bytes. Its swizzle atom is 8 rows of 128 bytes.
#pragma once

#include "ptx/shared_address.cuh"
#include "types.cuh"

namespace dak::tile {

constexpr u32 row_bytes = 128;
constexpr u32 columns = 64;           // elements in a row: the K of a stage for K-major tiles
constexpr u32 atom_bytes = 8 * row_bytes;
constexpr u32 product_depth = 16;     // K of one wgmma

// The descriptor of a tile: start address, distance between atoms, 128-byte swizzle.
__device__ __forceinline__ u64 descriptor(const void* tile) {
  constexpr u64 swizzle_128 = u64{1} << 62;
  constexpr u64 atom_stride = u64{atom_bytes >> 4} << 32;
  constexpr u64 unused_stride = u64{1} << 16;  // one atom holds all 64 elements across
  return swizzle_128 | atom_stride | unused_stride |
         static_cast<u64>((ptx::shared_address(tile) & 0x3FFFF) >> 4);
}

// What to add to a descriptor to go `product_depth` deeper into K.
//
// K-major tiles (K along the row): 32 bytes. MN-major tiles (K down the rows): 16 rows.
template <bool KMajor>
constexpr u64 depth_step = (KMajor ? product_depth * 2 : product_depth * row_bytes) >> 4;

}  // namespace dak::tile
