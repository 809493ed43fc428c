// Places in device memory for results of units that several workers share.
#pragma once

#include "attention/units.cuh"
#include "schedule/tapered_line.cuh"
#include "types.cuh"

namespace dak::attention {

// Slots of a unit: `count[line]` from `first[line]` on.
//
// Pieces of a line lie on a staircase: from one to the next either the unit or the part is the
// next. So unit + part is a slot that no other piece of the line has.
struct Slots {
  u32 first[2];
  u32 count[2];

  __device__ __forceinline__ u32 total() const { return count[0] + count[1]; }

  __device__ __forceinline__ u32 at(u32 index) const {
    return index < count[0] ? first[0] + index : first[1] + index - count[0];
  }

  // `unit` of `units`, which begins at `place` and has `tiles` on each line.
  static __device__ __forceinline__ Slots of_unit(const Division& division, const Place& place,
                                                  const u32 (&tiles)[2], u32 unit, u32 units) {
    Slots slots{};
#pragma unroll
    for (u32 line = 0; line < 2; ++line) {
      if (tiles[line] == 0) continue;
      const schedule::TaperedLine& cut = division.lines[line];
      const u32 part = cut.part_of(place.begin[line]);
      slots.count[line] = cut.part_of(place.begin[line] + tiles[line] - 1) - part + 1;
      slots.first[line] = line_begin(division, line, units) + unit + part;
    }
    return slots;
  }

  static __device__ __forceinline__ u32 line_begin(const Division& division, u32 line, u32 units) {
    return line == 0 ? 0 : units + division.lines[0].parts();
  }
};

}  // namespace dak::attention
