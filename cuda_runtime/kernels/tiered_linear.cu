// y[M, N] = epilogue(x[M, K] W^T): weights of which a part lies in a remote tier, read in place.
//
// Persistent workers (a CTA, or a cluster of CTAs with tokens of their own each) drain a remote and a
// local line of work at once. A producer thread keeps tiles in flight into shared memory by TMA, two
// warpgroups multiply them with the weights as the 64-row operand of wgmma. Within a cluster each
// weight tile is read once and multicast.
//
// Which part is remote is read from device memory when the kernel starts, and so is the window that
// bounds the remote bytes in flight: a captured launch serves every residency. Rows that were copied
// ahead lie in a ring in device memory: they are read there, by tensor maps of their own.
#include "linear/arguments.cuh"
#include "linear/consumer.cuh"
#include "linear/layout.cuh"
#include "linear/plan.cuh"
#include "linear/producer.cuh"
#include "linear/walk.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid_dependency.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tensor_copy.cuh"
#include "ptx/warpgroup.cuh"
#include "types.cuh"
#include "window/reading.cuh"

namespace dak {

namespace linear {

template <TieredLinearConfiguration configuration>
__device__ __forceinline__ void initialise_barriers(Head& head, u32 ctas) {
  for (u32 stage = 0; stage < configuration.stages; ++stage) {
    ptx::mbarrier_init(&head.full[stage], Arrivals::full);
    ptx::mbarrier_init(&head.early[stage], Arrivals::early);
    ptx::mbarrier_init(&head.empty[stage], Arrivals::empty);
    ptx::mbarrier_init(&head.cluster_empty[stage], Arrivals::cluster_empty(ctas));
  }
  ptx::mbarrier_init(&head.undisturbed, Arrivals::undisturbed);
  ptx::fence_mbarrier_init();
}

template <TieredLinearConfiguration configuration>
__device__ __forceinline__ void synchronize() {
  if constexpr (configuration.cluster) {
    ptx::cluster_synchronize();
  } else {
    __syncthreads();
  }
}

}  // namespace linear

template <TieredLinearConfiguration configuration>
__global__ void __launch_bounds__(linear::threads, configuration.ctas_per_sm)
    tiered_linear(const __grid_constant__ linear::RowMaps first_weight,
                  const __grid_constant__ linear::RowMaps second_weight,
                  const __grid_constant__ ptx::TensorMap first_in_ring,
                  const __grid_constant__ ptx::TensorMap second_in_ring,
                  const __grid_constant__ ptx::TensorMap tokens,
                  const __grid_constant__ linear::Arguments arguments) {
  extern __shared__ __align__(1024) u8 shared[];
  linear::Head& head = *reinterpret_cast<linear::Head*>(shared);
  u8* stages = shared + linear::head_bytes;
  const u32 ctas = configuration.cluster ? ptx::cluster_size() : 1;
  const u32 rank = configuration.cluster ? ptx::cluster_rank() : 0;
  const u32 workers = gridDim.x / ctas;
  const u32 warpgroup = threadIdx.x / 128;

  // different warps, so that neither waits for the other
  if (threadIdx.x == 0) {
    linear::plan<configuration>(arguments, workers, head);
    head.assignment = linear::assign<configuration>(head, blockIdx.x / ctas, workers);
  }
  if (threadIdx.x == 32) linear::initialise_barriers<configuration>(head, ctas);
  if (threadIdx.x == 64) {
    ptx::prefetch_tensor_map(&first_weight.tile);
    ptx::prefetch_tensor_map(&tokens);
    if (arguments.launch == nullptr) ptx::launch_dependents();
  }
  linear::synchronize<configuration>();

  if (warpgroup == linear::consumer_warpgroups) {
    if constexpr (configuration.ctas_per_sm == 1) ptx::release_registers<104>();
    const linear::TensorMaps maps{
        {&first_weight, &second_weight}, {&first_in_ring, &second_in_ring}, &tokens};
    if (threadIdx.x % 128 == 0) {
      linear::Producer<configuration> producer(arguments, maps, head, stages, rank, ctas);
      producer.run();
    } else if (threadIdx.x % 128 == 64) {
      linear::Producer<configuration> beside(arguments, maps, head, stages, rank, ctas);
      beside.bring_first_tokens();
    } else if (arguments.launch != nullptr && threadIdx.x % 128 == 32) {
      if (head.controlled > 0) window::end_reading(arguments.link, arguments.launch, gridDim.x);
      ptx::launch_dependents();
    }
    __syncwarp();
  } else {
    if constexpr (configuration.ctas_per_sm == 1) ptx::take_registers<200>();
    ptx::wait_for_predecessors();
    linear::Consumer<configuration> consumer(arguments, head, stages, rank, ctas, warpgroup,
                                             threadIdx.x % 128);
    consumer.run();
  }
  // nobody may leave while a neighbour still arrives at its barriers
  if constexpr (configuration.cluster) ptx::cluster_synchronize();
}

}  // namespace dak
