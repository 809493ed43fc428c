// From what there is on both lines to the runs that workers have of them.
#pragma once

#include "attention/arguments.cuh"
#include "attention/units.cuh"
#include "schedule/tapered_line.cuh"
#include "types.cuh"

namespace dak::attention {

// At least, where the window lets them.
constexpr u32 readers = 16;
constexpr u32 most_of_reader = 64 * 1024;  // bytes in flight
// By so much readers may be faster than the link's time needs, since each piece has a latency besides:
// with twice as many, 256 units of 82 tokens, 1% of them over NVLink, were read in 226 us by estimate
// beside 240 of local reads, and the launch took 276.
constexpr float time_to_spare = 4.0f;
// Of a local run: SMs start up to 17 us apart, and a few stream HBM a quarter slower than others while
// remote memory is read.
constexpr float claimed_share = 0.125f;
constexpr float claimed_beside_remote = 0.25f;

// How many workers read remote memory.
//
// As many as fill the window, with a few slots each: boxes give an SM 7 GB/s of host memory,
// whatever it asks for, so a few must read to fill a link; more would hold up the local part. A link
// that could be idle for most of the time need not be full: a share of them, with time to spare,
// leaves the others to local memory. Where units have few remote tokens each piece takes a worker
// longer than the link, so that as many workers are needed as have all pieces done in the time of the
// rest.
__device__ __forceinline__ u32 count_readers(const Arguments& arguments, const Count& count,
                                             u32 workers, u32 window, u32 tile, u32 row_bytes,
                                             u32 slots) {
  const u32 finest = arguments.finest_rows;
  const u32 rounded = (count.longest_remote + finest - 1) & ~(finest - 1);
  const u32 largest = min(tile, rounded) * row_bytes;  // of a slot
  const u32 fit = max(1u, window / largest);
  const u32 most = max(1u, min(slots, most_of_reader / largest));
  const u32 each = max(1u, min(fit / readers, most));
  const float tiles = static_cast<float>(count.remote_tokens) * (1.0f / tile);
  const float link = tiles * arguments.remote_tile;
  const float rest = max(static_cast<float>(count.tiles[0]), link);
  const float pieces =
      __fdividef(static_cast<float>(count.remote_units) * arguments.remote_piece, rest);
  const u32 for_pieces = static_cast<u32>(min(pieces, static_cast<float>(workers))) + 1;
  const float busy = min(1.0f, time_to_spare * __fdividef(link, rest));
  const u32 filling = fit / each;
  const u32 for_link = min(filling, static_cast<u32>(static_cast<float>(filling) * busy) + 1);
  u32 found = min(fit, max(for_link, for_pieces));
  // Slots are whole: one more for each of a few readers less, or else as many readers as have them.
  // 18 readers that could have 32 slots would have one each, and the window would be half empty.
  const u32 more = fit / found + 1;
  found = more <= most && fit / more * 8 >= found * 7 ? fit / more : fit / (fit / found);
  if (count.tiles[0] > 0) found = min(found, max(1u, workers / 2));
  return min(min(found, workers), count.tiles[1]);
}

// What of the local runs is for claims: enough to even out the SMs, and to keep those workers busy
// that are done with their remote runs.
__device__ __forceinline__ float share_for_claims(const Arguments& arguments, const Count& count,
                                                  u32 workers, u32 remote, u32 tile) {
  if (remote == 0) return claimed_share;
  const float link =
      static_cast<float>(count.remote_tokens) * (1.0f / tile) * arguments.remote_tile;
  const float pieces =
      __fdividef(static_cast<float>(count.remote_units) * arguments.remote_piece, remote);
  const float busy = __fdividef(max(link, pieces), max(1u, count.tiles[0]));
  const float readers_share = __fdividef(remote, workers);
  return claimed_beside_remote + max(0.0f, 1.0f - busy) * min(0.5f, readers_share);
}

// Cuts the lines. `count` is of all sequences, `slots` of a worker.
__device__ __forceinline__ void divide(Division& division, const Arguments& arguments,
                                       const Count& count, u32 workers, u32 window, u32 tile,
                                       u32 row_bytes, u32 slots) {
  u32 remote = 0;
  if (count.tiles[1] > 0) {
    remote = count_readers(arguments, count, workers, window, tile, row_bytes, slots);
  }
  const float share = share_for_claims(arguments, count, workers, remote, tile);
  division.remote_workers = remote;
  division.quota = remote > 0 ? window / remote : 0;
  division.lines[0] = schedule::TaperedLine::cut(count.tiles[0], workers - remote, share,
                                                 arguments.most_chunks, arguments.least_chunk);
  division.lines[1] = schedule::TaperedLine::cut(count.tiles[1], remote);
}

}  // namespace dak::attention
