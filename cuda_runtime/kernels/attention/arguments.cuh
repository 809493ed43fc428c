// What the host hands to the attention kernel. lowering/attention/launch.py packs this record.
#pragma once

#include "schedule/divisor.cuh"
#include "schedule/tier_record.cuh"
#include "types.cuh"
#include "window/record.cuh"

namespace dak::attention {

// Keys or values, [batch, heads, tokens, head_dim] in any order of the first three. Bytes from one
// to the next are multiples of 16.
struct Cache {
  schedule::TierRecord* record;  // null where all of it is local
  u64 offset;                    // of the first element in its buffer
  u64 batch_bytes;
  u64 head_bytes;
  u64 token_bytes;
  schedule::Divisor token_grains;  // token_bytes / 16
};

struct Arguments {
  Cache caches[2];      // keys, values
  const int* lengths;   // valid tokens of each sequence, the queries' own included; null: all
  const int* starts;    // first valid token; null: 0
  window::Record* link; // bytes that may be in flight from the remote tier; null: all is local
  window::LaunchWindow* launch;  // null: the host fixes them
  const void* query;    // [batch, heads * ratio, queries, head_dim]
  void* out;            // [batch, queries, heads * ratio, head_dim], contiguous
  float* partials;      // unfinished results
  u32* counters;        // zero between launches; claims, then for each unit and warpgroup, and for
                        // each slot of results and warpgroup, what arrived
  u64 query_batch;      // elements from one to the next, multiples of 8
  u64 query_head;
  u64 query_row;
  u32 batch;
  u32 heads;            // of keys and values
  u32 ratio;            // query heads of each
  u32 queries;
  u32 tokens;           // that the caches can hold
  u32 row_blocks;       // parts that the queries of a head are cut into
  u32 causal;           // 1: query i of Q sees tokens up to length - Q + i
  u32 visible;          // tokens that a query sees back from there; 0: all
  float scale;          // of scores, times log2(e); under a soft cap the cap times log2(e)
  float cap;            // 2 log2(e) scale / cap; 0: none
  u32 most_chunks;      // that the end of a local run is cut into,
  u32 least_chunk;      // of so many tiles or more
  float remote_tile;    // local tiles that are read while the link brings a remote one,
  float remote_piece;   // and while a worker has a piece of a remote unit
  schedule::Divisor blocks;  // row_blocks
  u32 sweep_tokens;     // of a sweep of the remote line (attention/walk.cuh); 2^30: unit by unit
  u32 most_at_once;     // results of a unit that are added up at once, and not first in groups
  u32 finest_rows;      // copies end at multiples of so many tokens, a power of 2
  u32 unused;
};
static_assert(sizeof(Cache) == 48 && sizeof(Arguments) == 264);

}  // namespace dak::attention
