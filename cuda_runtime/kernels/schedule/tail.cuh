// The end of a line of work, in pieces that workers claim when they have nothing else left.
//
// Runs of equal cost do not end together: SMs get unequal shares of the memory's bandwidth, 4 to 5%
// apart, and the last to start are late. So the last tiles of a line are no part of any run. They are
// cut along K by sizes alone, and so are the places of their sums and the order in which these are
// added: who claims a piece has no part in the result.
#pragma once

#include "schedule/line.cuh"
#include "types.cuh"

namespace dak::schedule {

// How the host wants the tail cut.
struct TailRule {
  u32 share;   // of the line's tiles, in 256ths
  u32 pieces;  // of each tile; no more than it has steps
  u32 least;   // pieces: a tail of fewer evens out nothing
  u32 spared;  // workers without a run of their own: those started last
};

struct Tail {
  static constexpr u32 nothing = ~0u;  // no piece

  u32 first_tile;  // of the line
  u32 tiles;
  u32 steps;   // of a tile,
  u32 pieces;  // in so many pieces

  // Takes the tail off a line.
  static __device__ __forceinline__ Tail cut_off(Line& line, const TailRule& rule) {
    u32 tiles = line.tiles * rule.share / 256;
    if (tiles * rule.pieces < rule.least) tiles = 0;
    line.tiles -= tiles;
    return {line.tiles, tiles, line.steps, rule.pieces};
  }

  __device__ __forceinline__ u32 total() const { return tiles * pieces; }

  __device__ __forceinline__ u32 total_steps() const { return tiles * steps; }

  // Positions of the line. Pieces of a tile follow each other, so that they are claimed, and the tile
  // finished, within a short time.
  __device__ __forceinline__ Run run(u32 piece) const {
    const u32 first = (first_tile + piece / pieces) * steps;
    const u32 part = piece % pieces;
    return {first + steps * part / pieces, first + steps * (part + 1) / pieces};
  }

  // The first piece of a tile of the line.
  __device__ __forceinline__ u32 first_piece(u32 tile) const {
    return (tile - first_tile) * pieces;
  }
};

}  // namespace dak::schedule
