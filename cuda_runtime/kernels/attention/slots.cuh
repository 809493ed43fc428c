// Places in device memory for results of units that several workers share.
#pragma once

#include "attention/units.cuh"
#include "schedule/tapered_line.cuh"
#include "types.cuh"

namespace dak::attention {

// Slots of a unit that are added up: `count` of them from an index on, in steps.
struct Members {
  u32 first;
  u32 step;
  u32 count;
  bool all;  // that the unit has
};

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

  // The index that `at` gives a slot for.
  __device__ __forceinline__ u32 index(u32 slot) const {
    return slot - first[0] < count[0] ? slot - first[0] : count[0] + slot - first[1];
  }

  // Slots are added up in groups of 2 to this power: about as many as there are groups. 0: at once.
  __device__ __forceinline__ u32 group_shift(u32 most_at_once) const {
    return total() <= most_at_once ? 0 : (33 - __clz(total() - 1)) / 2;
  }

  // The group of a slot,
  __device__ __forceinline__ Members group(u32 slot, u32 shift) const {
    if (shift == 0) return {0, 1, total(), true};
    const u32 begin = index(slot) >> shift << shift;
    return {begin, 1, min(total() - begin, 1u << shift), false};
  }

  // and the first slots of all groups.
  __device__ __forceinline__ Members groups(u32 shift) const {
    return {0, 1u << shift, ((total() - 1) >> shift) + 1, true};
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
