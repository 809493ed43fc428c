// Streams shared memory out to a range, round and round, and counts what was written.
//
// The bytes written are zeros. One wave: the grid must fit the GPU.
#include "pipeline/bulk_reader.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/timer.cuh"
#include "types.cuh"

namespace dak {

struct StreamWriteConfiguration {
  u32 threads;
  int groups_in_flight;  // pieces that may be under way in each CTA
};

struct StreamWriteCounter {
  u64 bytes;  // written between start and stop
  u64 start;  // globaltimer, ns
  u64 stop;   // globaltimer, ns
  u64 unused;
};

struct StreamWriteArguments {
  u8* address;
  u32 piece_bytes;               // multiple of 16
  u32 pieces;                    // in the range; at least the number of CTAs
  StreamWriteCounter* counters;  // one per CTA
  u64 nanoseconds;               // how long to write
};

// cuda_runtime/streaming.py packs these
static_assert(sizeof(StreamWriteCounter) == 32 && sizeof(StreamWriteArguments) == 32);

template <StreamWriteConfiguration configuration>
__global__ void __launch_bounds__(configuration.threads, 1)
    stream_write(const __grid_constant__ StreamWriteArguments arguments) {
  extern __shared__ __align__(128) u8 shared[];
  u32* words = reinterpret_cast<u32*>(shared);
  for (u32 i = threadIdx.x; i < arguments.piece_bytes / 4; i += configuration.threads) words[i] = 0;
  ptx::fence_proxy_async_shared();
  __syncthreads();
  if (threadIdx.x != 0) return;

  pipeline::PieceWalk walk{arguments.address, arguments.piece_bytes, arguments.pieces, gridDim.x,
                           blockIdx.x};
  const u64 start = ptx::globaltimer();
  const u64 deadline = start + arguments.nanoseconds;
  u32 written = 0;
  do {
    ptx::bulk_store(const_cast<u8*>(walk.take()), shared, arguments.piece_bytes);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group<configuration.groups_in_flight - 1>();
    ++written;
  } while (written % 8 != 0 || ptx::globaltimer() < deadline);
  ptx::bulk_wait_group<0>();

  StreamWriteCounter* counter = arguments.counters + blockIdx.x;
  counter->bytes = static_cast<u64>(written) * arguments.piece_bytes;
  counter->start = start;
  counter->stop = ptx::globaltimer();
}

}  // namespace dak
