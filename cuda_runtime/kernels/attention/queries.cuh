// The queries of a unit: rows of a tile in shared memory, the first operand of Q K^T.
//
// Row r of a head of keys is query r / ratio of query head r % ratio.
#pragma once

#include "attention/arguments.cuh"
#include "attention/layout.cuh"
#include "tile/panel.cuh"
#include "types.cuh"

namespace dak::attention {

// Rows [first, first + count) of a head of keys: those of one warpgroup.
struct QueryRows {
  u32 sequence;
  u32 head;  // of keys
  u32 first;
  u32 count;

  // `part` of `rows` is what the warpgroup has of the unit `head`, which may be a part of a head.
  static __device__ __forceinline__ QueryRows of_unit(const Arguments& arguments, u32 sequence,
                                                      u32 head, u32 rows, u32 part) {
    const u32 kv_head = arguments.blocks.quotient(head);
    const u32 first = (head - kv_head * arguments.row_blocks) * rows + part * warpgroup_rows;
    const u32 total = arguments.ratio * arguments.queries;
    const u32 count = first < total ? min(warpgroup_rows, total - first) : 0;
    return {sequence, kv_head, first, count};
  }

  // Elements from the start of the output to row `row` of these.
  __device__ __forceinline__ u64 out_place(const Arguments& arguments, u32 row,
                                           u32 head_dim) const {
    const u32 query = (first + row) / arguments.ratio;
    const u32 query_head = head * arguments.ratio + (first + row) % arguments.ratio;
    const u64 token = static_cast<u64>(sequence) * arguments.queries + query;
    return (token * (arguments.heads * arguments.ratio) + query_head) * head_dim;
  }
};

// Copies rows to `tile`; all threads of a warpgroup. The caller orders it with the products.
template <TieredAttentionConfiguration configuration>
__device__ __forceinline__ void load_queries(const Arguments& arguments, const QueryRows& rows,
                                             u8* tile, u32 thread) {
  using L = Layout<configuration>;
  const u16* query = static_cast<const u16*>(arguments.query) +
                     rows.sequence * arguments.query_batch;
  for (u32 i = thread; i < rows.count * L::chunks; i += warpgroup_threads) {
    const u32 row = i / L::chunks;
    const u32 chunk = i % L::chunks;
    const u32 position = (rows.first + row) / arguments.ratio;
    const u32 head = rows.head * arguments.ratio + (rows.first + row) % arguments.ratio;
    const u16* source =
        query + head * arguments.query_head + position * arguments.query_row + chunk * 8;
    const u32 panel = chunk / 8;
    u32 place = L::panel_offset(panel, warpgroup_rows);
    if (L::tail == 0 || panel < L::wide_panels) {
      place += tile::Panel<64>::place(row, chunk % 8);
    } else {
      place += tile::Panel<L::tail == 0 ? 64 : L::tail>::place(row, chunk % 8);
    }
    *reinterpret_cast<uint4*>(tile + place) = __ldcg(reinterpret_cast<const uint4*>(source));
  }
}

}  // namespace dak::attention
