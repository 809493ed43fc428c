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
// from device memory when the kernel starts: a captured launch serves them all. That, the division of
// work and copies of the first tiles to L2 go ahead while the kernels before still run.
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
#include "window/reading.cuh"

namespace dak {

namespace attention {

// By several threads: the barriers of each slot and task.
template <TieredAttentionConfiguration configuration>
__device__ __forceinline__ void initialise(Head& head, u32 thread) {
  for (u32 team = 0; team < configuration.teams; ++team) {
    if (thread < configuration.slots) {
      ptx::mbarrier_init(&head.full[team][thread], Arrivals<configuration>::full);
      ptx::mbarrier_init(&head.empty[team][thread], Arrivals<configuration>::empty);
    }
    if (thread < maximum_tasks) {
      ptx::mbarrier_init(&head.announced[team][thread], Arrivals<configuration>::announced);
    }
  }
  ptx::fence_mbarrier_init();
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
  if (threadIdx.x < attention::maximum_slots) {
    attention::initialise<configuration>(head, threadIdx.x);
  }
  if (threadIdx.x % 32 == 31 && threadIdx.x / 32 < 3) {
    attention::read_residency(arguments, threadIdx.x / 32, head);
  }
  if (threadIdx.x == 96) {
    ptx::prefetch_tensor_map(&maps.caches[0].wide.boxes[attention::boxes - 1]);
    ptx::prefetch_tensor_map(&maps.caches[1].wide.boxes[attention::boxes - 1]);
    if (arguments.launch == nullptr) ptx::launch_dependents();
  }
  const attention::Bounds<configuration> bounds(arguments, head);
  bounds.read();
  // rows without a query are 0
  for (u32 i = threadIdx.x; i < attention::consumer_warpgroups * L::query_bytes / 16;
       i += attention::threads) {
    reinterpret_cast<uint4*>(queries)[i] = make_uint4(0, 0, 0, 0);
  }

  // neighbouring runs on neighbouring CTAs, the few remote ones on different ones
  const u32 producer = threadIdx.x / 32 - attention::consumer_warpgroups * 4;
  const bool produces = threadIdx.x % 32 == 0 && producer < configuration.teams;
  // Planned by the bounds of now, while the kernels before still run, and again in the rare case
  // that those have written others.
#pragma unroll 1
  for (bool certain = bounds.constant();; certain = true) {
    __syncthreads();
    attention::plan<configuration>(arguments, workers, head);
    if (produces) {
      attention::Producer<configuration>::prepare(arguments, maps, head, producer,
                                                  producer * gridDim.x + blockIdx.x);
    }
    __syncwarp();
    ptx::wait_for_predecessors();
    if (certain || !__syncthreads_or(bounds.changed())) break;
    bounds.read();
  }

  if (warpgroup == attention::consumer_warpgroups) {
    ptx::release_registers<104>();
    if (produces) {
      attention::Producer<configuration>(
          arguments, maps, head, slots + producer * configuration.slots * L::slot_bytes, producer,
          producer * gridDim.x + blockIdx.x, workers)
          .run();
    } else if (arguments.launch != nullptr && threadIdx.x % 128 == 96) {
      const u32 controlled = head.window.controlled;
      if (controlled > 0) window::end_reading(arguments.link, arguments.launch, gridDim.x);
      ptx::launch_dependents();
    }
    __syncwarp();
  } else {
    ptx::take_registers<200>();
    const u32 team = warpgroup / L::warpgroups;
    attention::Consumer<configuration> consumer(
        arguments, head, queries + warpgroup * L::query_bytes,
        slots + team * configuration.slots * L::slot_bytes, team, warpgroup % L::warpgroups,
        warpgroup, threadIdx.x % attention::warpgroup_threads);
    consumer.run(team * gridDim.x + blockIdx.x, workers);
  }
}

}  // namespace dak
