// out = softmax(scale Q K^T) V for a few queries of each sequence: keys and values of which a part
// lies in a remote tier, read in place.
//
// Persistent teams (one or two consumer warpgroups) drain a remote and a local line of work at once.
// A producer thread for each team keeps tiles of keys and values in flight into shared memory by TMA.
// The queries of all heads that share a head of keys are the rows of one wgmma, so keys and values
// are read once. Teams that share a sequence leave their results in device memory, and the last one
// to finish adds them up.
//
// Lengths, where the caches are cut, and the window that bounds the remote bytes in flight are read
// from device memory when the kernel starts: a captured launch serves them all.
#include "attention/arguments.cuh"
#include "attention/consumer.cuh"
#include "attention/layout.cuh"
#include "attention/plan.cuh"
#include "attention/producer.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"
#include "types.cuh"

namespace dak {

namespace attention {

template <TieredAttentionConfiguration configuration>
__device__ __forceinline__ void initialise(Head& head) {
  for (u32 team = 0; team < configuration.teams; ++team) {
    for (u32 slot = 0; slot < configuration.slots; ++slot) {
      ptx::mbarrier_init(&head.full[team][slot], Arrivals<configuration>::full);
      ptx::mbarrier_init(&head.empty[team][slot], Arrivals<configuration>::empty);
    }
  }
  ptx::fence_mbarrier_init();
  head.remote_tokens = 0;
  head.longest_remote = 0;
}

}  // namespace attention

template <TieredAttentionConfiguration configuration>
__global__ void __launch_bounds__(attention::threads, 1)
    tiered_attention(const __grid_constant__ attention::TensorMaps maps,
                     const __grid_constant__ attention::Arguments arguments) {
  using L = attention::Layout<configuration>;
  extern __shared__ __align__(1024) u8 shared[];
  attention::Head& head = *reinterpret_cast<attention::Head*>(shared);
  u8* queries = shared + attention::head_bytes;
  u8* slots = queries + attention::consumer_warpgroups * L::query_bytes;
  const u32 warpgroup = threadIdx.x / attention::warpgroup_threads;
  const u32 workers = gridDim.x * configuration.teams;

  // different warps, so that none waits for another
  if (threadIdx.x == 0) attention::initialise<configuration>(head);
  if (threadIdx.x % 32 == 0 && threadIdx.x / 32 - 1 < 2) {
    attention::read_split(arguments, threadIdx.x / 32 - 1, head);
  }
  if (threadIdx.x == 96) {
    ptx::prefetch_tensor_map(&maps.caches[0].wide.boxes[attention::boxes - 1]);
    ptx::prefetch_tensor_map(&maps.caches[1].wide.boxes[attention::boxes - 1]);
    ptx::launch_dependents();
  }
  // rows without a query are 0
  for (u32 i = threadIdx.x; i < attention::consumer_warpgroups * L::query_bytes / 16;
       i += attention::threads) {
    reinterpret_cast<uint4*>(queries)[i] = make_uint4(0, 0, 0, 0);
  }
  // lengths and new tokens come from the kernels before
  ptx::wait_for_predecessors();
  __syncthreads();
  attention::plan<configuration>(arguments, workers, head);

  // neighbouring runs on neighbouring CTAs, the few remote ones on different ones
  if (warpgroup == attention::consumer_warpgroups) {
    ptx::release_registers<72>();
    const u32 team = threadIdx.x / 32 % 4;
    if (threadIdx.x % 32 == 0 && team < configuration.teams) {
      attention::Producer<configuration> producer(
          arguments, maps, head, slots + team * configuration.slots * L::slot_bytes, team);
      producer.run(team * gridDim.x + blockIdx.x);
    }
    __syncwarp();
  } else {
    ptx::take_registers<216>();
    const u32 team = warpgroup / L::warpgroups;
    attention::Consumer<configuration> consumer(
        arguments, head, queries + warpgroup * L::query_bytes,
        slots + team * configuration.slots * L::slot_bytes, team, warpgroup % L::warpgroups,
        warpgroup, threadIdx.x % attention::warpgroup_threads);
    consumer.run(team * gridDim.x + blockIdx.x, workers);
  }
}

}  // namespace dak
