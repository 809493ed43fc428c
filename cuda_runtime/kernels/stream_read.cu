// Streams a remote range and a local range into shared memory at once and counts what arrives.
//
// The first `remote.ctas` CTAs read the remote part, the rest the local part; either part may have
// no CTAs. Each CTA keeps `stages` pieces in flight, so the window of a part is
// ctas * stages * piece_bytes. One wave: the grid must fit the GPU.
#include "pipeline/bulk_reader.cuh"
#include "pipeline/ring.cuh"
#include "ptx/timer.cuh"
#include "types.cuh"

namespace dak {

struct StreamReadConfiguration {
  u32 threads;
  bool checksum;  // add up every word that arrived, for tests; takes a single pass
};

struct StreamReadPart {
  const u8* address;
  u32 piece_bytes;  // multiple of 16
  u32 pieces;       // in the range; at least `ctas`
  u32 stages;       // up to pipeline::maximum_stages
  u32 ctas;
};

struct StreamReadCounter {
  u64 bytes;     // arrived between start and stop
  u64 start;     // globaltimer, ns
  u64 stop;      // globaltimer, ns
  u64 checksum;  // sum of 32-bit words; the caller sets it to 0 before the launch
};

struct StreamReadArguments {
  StreamReadPart remote;
  StreamReadPart local;
  StreamReadCounter* counters;  // one per CTA
  u64 nanoseconds;              // how long to read, round and round; 0 for a single pass
};

// cuda_runtime/streaming.py packs these
static_assert(sizeof(StreamReadCounter) == 32 && sizeof(StreamReadArguments) == 64);

namespace stream_read_parts {

// Reads until the deadline. One thread.
__device__ __forceinline__ void read_timed(const pipeline::BulkReader& reader,
                                           pipeline::PieceWalk walk, u64 nanoseconds,
                                           StreamReadCounter* counter) {
  constexpr u32 pieces_per_look = 8;  // looking at the timer is slow
  const u64 start = ptx::globaltimer();
  const u64 deadline = start + nanoseconds;
  for (u32 stage = 0; stage < reader.stages; ++stage) reader.issue(stage, walk.take());

  pipeline::RingPosition position;
  u32 arrived = 0;
  u64 stop = start;
  while (true) {
    reader.wait(position);
    ++arrived;
    if (arrived % pieces_per_look == 0) {
      stop = ptx::globaltimer();
      if (stop >= deadline) break;
    }
    reader.issue(position.stage, walk.take());
    position.advance(reader.stages);
  }
  // the copies still in flight write to this CTA's shared memory: outlive them
  for (u32 left = reader.stages - 1; left > 0; --left) {
    position.advance(reader.stages);
    reader.wait(position);
  }
  counter->bytes = static_cast<u64>(arrived) * reader.piece_bytes;
  counter->start = start;
  counter->stop = stop;
}

// Reads each piece of the range once. All threads of the CTA.
template <StreamReadConfiguration configuration>
__device__ __forceinline__ void read_once(const pipeline::BulkReader& reader,
                                          pipeline::PieceWalk walk, u32 count,
                                          StreamReadCounter* counter) {
  const bool leader = threadIdx.x == 0;
  const u64 start = ptx::globaltimer();
  if (leader) {
    for (u32 stage = 0; stage < reader.stages && stage < count; ++stage) {
      reader.issue(stage, walk.take());
    }
  }
  pipeline::RingPosition position;
  u32 sum = 0;
  for (u32 arrived = 0; arrived < count; ++arrived) {
    reader.wait(position);
    if constexpr (configuration.checksum) {
      const u32* words = reinterpret_cast<const u32*>(reader.piece(position.stage));
      for (u32 i = threadIdx.x; i < reader.piece_bytes / 4; i += configuration.threads) {
        sum += words[i];
      }
    }
    __syncthreads();
    if (leader && arrived + reader.stages < count) reader.issue(position.stage, walk.take());
    position.advance(reader.stages);
  }
  if constexpr (configuration.checksum) atomicAdd(&counter->checksum, static_cast<u64>(sum));
  if (leader) {
    counter->bytes = static_cast<u64>(count) * reader.piece_bytes;
    counter->start = start;
    counter->stop = ptx::globaltimer();
  }
}

}  // namespace stream_read_parts

template <StreamReadConfiguration configuration>
__global__ void __launch_bounds__(configuration.threads, 1)
    stream_read(const __grid_constant__ StreamReadArguments arguments) {
  extern __shared__ __align__(128) u8 shared[];
  const bool is_remote = blockIdx.x < arguments.remote.ctas;
  const StreamReadPart part = is_remote ? arguments.remote : arguments.local;
  const u32 cta = is_remote ? blockIdx.x : blockIdx.x - arguments.remote.ctas;
  StreamReadCounter* counter = arguments.counters + blockIdx.x;

  const pipeline::BulkReader reader(shared, part.piece_bytes, part.stages);
  if (threadIdx.x == 0) reader.initialise();
  __syncthreads();

  const pipeline::PieceWalk walk{part.address, part.piece_bytes, part.pieces, part.ctas, cta};
  if (arguments.nanoseconds == 0) {
    const u32 count = (part.pieces - cta + part.ctas - 1) / part.ctas;
    stream_read_parts::read_once<configuration>(reader, walk, count, counter);
  } else if (threadIdx.x == 0) {
    stream_read_parts::read_timed(reader, walk, arguments.nanoseconds, counter);
  }
}

}  // namespace dak
