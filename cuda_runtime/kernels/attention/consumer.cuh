// A warpgroup that turns keys and values that arrive into results.
#pragma once

#include "attention/arguments.cuh"
#include "attention/layout.cuh"
#include "attention/queries.cuh"
#include "attention/results.cuh"
#include "attention/softmax.cuh"
#include "attention/task.cuh"
#include "attention/units.cuh"
#include "attention/visibility.cuh"
#include "pipeline/ring.cuh"
#include "pipeline/wait.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/warpgroup.cuh"
#include "ptx/wgmma.cuh"
#include "ptx/wgmma_registers.cuh"
#include "tile/panel.cuh"
#include "types.cuh"

namespace dak::attention {

template <TieredAttentionConfiguration configuration>
class Consumer {
  using L = Layout<configuration>;
  using Wide = tile::Panel<64>;
  using Tail = tile::Panel<L::tail == 0 ? 64 : L::tail>;
  static constexpr u32 tile_tokens = L::tile;
  static constexpr u32 depths = tile_tokens / Wide::depth;

 public:
  // `query` is the warpgroup's own tile in shared memory, `slots` those of its team. `part` is its
  // place in the team.
  __device__ __forceinline__ Consumer(const Arguments& arguments, Head& head, u8* query, u8* slots,
                                      u32 team, u32 part, u32 warpgroup, u32 thread)
      : arguments_(arguments),
        head_(head),
        query_(query),
        slots_(slots),
        team_(team),
        part_(part),
        warpgroup_(warpgroup),
        thread_(thread),
        results_(arguments, head, part, warpgroup, thread) {}

  // All tasks of worker `worker` of `workers`.
  __device__ __forceinline__ void run(u32 worker, u32 workers) {
    if (part_ == 0) {
      for (u32 i = worker; i < arguments_.batch; i += workers) {
        if (head_.sequences[i].begin == head_.sequences[i].end) results_.blank(i);
      }
    }
    pipeline::RingPosition task;
    for (;;) {
      pipeline::wait<configuration.bounded_waits>(&head_.announced[team_][task.stage],
                                                  task.parity, "task announced");
      if (head_.tasks[team_][task.stage].tiles == 0) break;
      work(head_.tasks[team_][task.stage]);
      task.advance(maximum_tasks);
    }
  }

 private:
  __device__ __forceinline__ void work(const Task& task) {
    const QueryRows rows =
        QueryRows::of_unit(arguments_, task.sequence, task.head, L::rows, part_);
    const Span span = task.span;
    synchronize();  // the products of the task before have ended in all warps
    load_queries<configuration>(arguments_, rows, query_, thread_);
    ptx::fence_proxy_async_shared();
    const Visibility visible(arguments_, rows, span, head_.sequences[task.sequence].end,
                             thread_ / 32 * 16 + thread_ % 32 / 4);
    synchronize();

    float sums[L::head_dim / 2];
    Softmax<tile_tokens> softmax;
    results_.begin(task, rows, sums, softmax);
    int first = task.first;
#pragma unroll 1
    for (u32 left = task.tiles; left > 0; --left, first += tile_tokens) {
      add_tile(span, first, visible, sums, softmax);
    }
    softmax.finish(task.complete ? arguments_.scale : 1.0f);
    if (task.complete && task.slots.total() == 1) {
      results_.write(rows, sums, softmax);
    } else {
      results_.put(task, rows, sums, softmax);
    }
  }

  __device__ __forceinline__ void add_tile(const Span& span, int first,
                                           const Visibility& visible,
                                           float (&sums)[L::head_dim / 2],
                                           Softmax<tile_tokens>& softmax) {
    float scores[tile_tokens / 2];
    multiply_keys(scores);
    if (arguments_.cap != 0.0f) softmax.cap(scores, arguments_.cap);
    if (!visible.whole(first, static_cast<int>(tile_tokens))) {
      softmax.hide(scores, visible, first, thread_ % 32);
    }
    u32 powers[depths][4];
    float factor[2];
    softmax.template add<configuration.half>(scores, powers, arguments_.scale, factor);
#pragma unroll
    for (u32 r = 0; r < L::head_dim / 2; ++r) sums[r] *= factor[r / 2 % 2];
    multiply_values(span, first, powers, sums);
  }

  // scores = Q K^T
  __device__ __forceinline__ void multiply_keys(float (&scores)[tile_tokens / 2]) {
    const u8* keys = wait_for_slot();
#pragma unroll
    for (u32 r = 0; r < tile_tokens / 2; ++r) scores[r] = 0.0f;
    ptx::wgmma_fence_registers(scores);
    ptx::wgmma_fence();
    using Product = ptx::Wgmma<tile_tokens, configuration.half, false>;
#pragma unroll
    for (u32 panel = 0; panel < L::wide_panels; ++panel) {
      const u64 a = Wide::descriptor(query_ + L::panel_offset(panel, warpgroup_rows));
      const u64 b = Wide::descriptor(keys + L::panel_offset(panel, tile_tokens));
#pragma unroll
      for (u32 k = 0; k < Wide::width / Wide::depth; ++k) {
        Product::run(scores, a + k * Wide::step_along_row, b + k * Wide::step_along_row);
      }
    }
    if constexpr (L::tail > 0) {
      const u64 a = Tail::descriptor(query_ + L::panel_offset(L::wide_panels, warpgroup_rows));
      const u64 b = Tail::descriptor(keys + L::panel_offset(L::wide_panels, tile_tokens));
#pragma unroll
      for (u32 k = 0; k < Tail::width / Tail::depth; ++k) {
        Product::run(scores, a + k * Tail::step_along_row, b + k * Tail::step_along_row);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_registers(scores);
    release_slot();
  }

  // sums += P V
  __device__ __forceinline__ void multiply_values(const Span& span, int first,
                                                  const u32 (&powers)[depths][4],
                                                  float (&sums)[L::head_dim / 2]) {
    u8* values = wait_for_slot();
    const u32 begin = static_cast<u32>(max(0, span.begin - first));
    const u32 end = static_cast<u32>(min(static_cast<int>(tile_tokens), span.end - first));
    if (begin > 0 || end < tile_tokens) clear_rows(values, begin, end);
    ptx::wgmma_fence_registers(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (u32 k = 0; k < depths; ++k) {
#pragma unroll
      for (u32 panel = 0; panel < L::wide_panels; ++panel) {
        const u64 b = Wide::descriptor(values + L::panel_offset(panel, tile_tokens));
        ptx::WgmmaFromRegisters<64, configuration.half>::run(
            reinterpret_cast<float(&)[32]>(sums[panel * 32]), powers[k],
            b + k * Wide::step_across_rows);
      }
      if constexpr (L::tail > 0) {
        const u64 b = Tail::descriptor(values + L::panel_offset(L::wide_panels, tile_tokens));
        ptx::WgmmaFromRegisters<L::tail, configuration.half>::run(
            reinterpret_cast<float(&)[L::tail / 2]>(sums[L::wide_panels * 32]), powers[k],
            b + k * Tail::step_across_rows);
      }
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_registers(sums);
    release_slot();
  }

  // Rows of values outside of [begin, end) become 0: what was not copied, or is no part of the
  // sequence, may be NaN, which a power of 0 would not hide.
  __device__ __forceinline__ void clear_rows(u8* values, u32 begin, u32 end) const {
    for (u32 i = thread_; i < tile_tokens * L::chunks; i += warpgroup_threads) {
      const u32 row = i / L::chunks;
      if (row >= begin && row < end) continue;
      const u32 chunk = i % L::chunks;
      const u32 panel = chunk / 8;
      u32 place = L::panel_offset(panel, tile_tokens);
      place += L::tail == 0 || panel < L::wide_panels ? Wide::place(row, chunk % 8)
                                                      : Tail::place(row, chunk % 8);
      *reinterpret_cast<uint4*>(values + place) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async_shared();
    synchronize();
  }

  __device__ __forceinline__ u8* wait_for_slot() const {
    pipeline::wait<configuration.bounded_waits>(&head_.full[team_][position_.stage],
                                                position_.parity, "slot full");
    return slots_ + position_.stage * L::slot_bytes;
  }

  // The products that read the slot have ended.
  __device__ __forceinline__ void release_slot() {
    if (thread_ == 0) ptx::mbarrier_arrive(&head_.empty[team_][position_.stage]);
    position_.advance(configuration.slots);
  }

  __device__ __forceinline__ void synchronize() const {
    ptx::named_barrier(1 + warpgroup_, warpgroup_threads);
  }

  const Arguments& arguments_;
  Head& head_;
  u8* const query_;
  u8* const slots_;
  const u32 team_;
  const u32 part_;
  const u32 warpgroup_;  // of the consumers
  const u32 thread_;     // in the warpgroup
  const Results<configuration> results_;
  pipeline::RingPosition position_{};
};

}  // namespace dak::attention
