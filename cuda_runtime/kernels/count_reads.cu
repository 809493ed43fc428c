// Counts one call of a stock kernel, or a copy.
#include "schedule/count_read.cuh"
#include "schedule/tier_record.cuh"
#include "types.cuh"

namespace dak {

constexpr u32 maximum_reads = 4;

struct CountReadsArguments {
  schedule::TierRecord* record;
  u32 reads;
  u32 calls;
  struct {
    u64 start;  // bytes [start, start + size) of the buffer
    u64 size;
  } read[maximum_reads];
};
static_assert(sizeof(CountReadsArguments) == 80);  // cuda_runtime/read_count.py packs it

extern "C" __global__ void __launch_bounds__(32)
    count_reads(const __grid_constant__ CountReadsArguments arguments) {
  if (threadIdx.x > 0) return;
  const u64 split = __ldcg(&arguments.record->split);
  u64 local = 0;
  u64 all = 0;
#pragma unroll
  for (u32 i = 0; i < maximum_reads; ++i) {
    if (i >= arguments.reads) break;
    local += schedule::local_bytes(split, arguments.read[i].start, arguments.read[i].size);
    all += arguments.read[i].size;
  }
  schedule::count(arguments.record, local, all, arguments.calls);
}

}  // namespace dak
