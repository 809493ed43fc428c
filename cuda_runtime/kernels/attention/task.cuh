// What a producer tells its consumers of a piece, by way of shared memory.
#pragma once

#include "attention/slots.cuh"
#include "attention/units.cuh"
#include "attention/walk.cuh"
#include "types.cuh"

namespace dak::attention {

struct Task {
  u32 sequence;
  u32 head;
  Span span;
  int first;   // token of the first tile's slot,
  u32 tiles;   // and tiles from there; 0: the worker is done
  u32 unit;
  u32 slot;    // for the result, where it is not the unit's only one
  Slots slots;  // of the unit
  bool resumes;   // goes on with what the slot has,
  bool complete;  // and leaves it finished

  template <u32 tile, u32 row_bytes>
  static __device__ __forceinline__ Task of_piece(const Units<tile, row_bytes>& units,
                                                  const Division& division, const Piece& piece,
                                                  u32 batch) {
    if (piece.first == piece.last) return {};
    const int boundary = units.boundary(piece.sequence, piece.head);
    const u32 tiles[2] = {units.span(piece.sequence, boundary, false).tiles,
                          units.span(piece.sequence, boundary, true).tiles};
    const Place place = units.place(piece.sequence, piece.head);
    const u32 unit = piece.sequence * units.heads() + piece.head;
    const u32 count = batch * units.heads();
    const int first =
        Units<tile, row_bytes>::first_token(piece.span, piece.first, piece.line == 1);
    return {piece.sequence,
            piece.head,
            piece.span,
            first,
            piece.last - piece.first,
            unit,
            Slots::line_begin(division, piece.line, count) + unit + piece.part,
            Slots::of_unit(division, place, tiles, unit, count),
            piece.resumes,
            piece.complete};
  }
};

}  // namespace dak::attention
