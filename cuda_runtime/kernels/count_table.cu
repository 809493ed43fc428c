// Counts what the stock kernels and copies of a captured graph read in one replay: a launch for many
// of them. The host goes on filling the table while the graph is captured.
#include "schedule/tier_record.cuh"
#include "types.cuh"

namespace dak {

constexpr u32 table_reads = 64;

struct CountedRead {
  schedule::TierRecord* record;  // null: the table ends before
  u64 start;                     // bytes [start, start + size) of the buffer
  u64 size;
  u64 calls;
};
static_assert(sizeof(CountedRead) == 32);  // cuda_runtime/read_count.py packs it

struct CountTableArguments {
  const CountedRead* reads;
};

extern "C" __global__ void __launch_bounds__(table_reads)
    count_table(const __grid_constant__ CountTableArguments arguments) {
  const CountedRead read = arguments.reads[threadIdx.x];
  if (read.record == nullptr) return;
  const u64 split = __ldcg(&read.record->split);
  const u64 local = split <= read.start ? 0 : min(split - read.start, read.size);
  if (local > 0) atomicAdd(&read.record->local_bytes, local);
  if (read.size > local) atomicAdd(&read.record->remote_bytes, read.size - local);
  if (read.calls > 0) atomicAdd(&read.record->calls, read.calls);
}

}  // namespace dak
