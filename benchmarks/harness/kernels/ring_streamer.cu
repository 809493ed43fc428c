// Carries parts of a remote range into a ring in device memory, by a few CTAs beside other kernels.
//
// Each CTA has every n-th piece of each part. One thread loads pieces into a ring of stages in
// shared memory, with `loads` of them in flight; another one stores them to device memory, and
// counts the CTA in when its share of a part has been written. Nothing in a CTA reads the pieces,
// so no proxy fence is needed between load and store.
//
// A part waits until what lay in its place has been read, by kernels that have ended by then. That
// wait alone depends on other kernels, and it is bounded: whoever gives up leaves a word, at which
// all others stop waiting as well.
#include "pipeline/ring.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory_order.cuh"
#include "ring_words.cuh"
#include "types.cuh"

namespace dak {

struct RingStreamerConfiguration {
  int stores;  // pieces that may be on their way out of each CTA
};

struct RingPart {
  const u8* source;
  u8* target;
  u32 pieces;
  u32 after;  // parts that must have been read before; 0: the target is free
};

struct RingStreamerArguments {
  const RingPart* parts;
  u32* words;
  u32 count;        // of parts
  u32 piece_bytes;  // multiple of 16
  u32 loads;        // in flight in each CTA
  u32 stages;       // more than loads + stores
  u64 patience;     // ns
};

// harness/stream_filler.py packs these
static_assert(sizeof(RingPart) == 24 && sizeof(RingStreamerArguments) == 40);

namespace ring_streamer_parts {

constexpr u32 maximum_stages = 32;

// The start of shared memory; pieces follow from byte `header_bytes` on.
struct Header {
  ptx::mbarrier_t full[maximum_stages];
  ptx::mbarrier_t empty[maximum_stages];
  u32 stopped;  // pieces that were asked for, once the loader has given up
};

constexpr u32 header_bytes = 1024;
constexpr u32 never = 0xffffffff;
static_assert(sizeof(Header) <= header_bytes);

__device__ __forceinline__ void wait(ptx::mbarrier_t* barrier, u32 parity) {
  while (!ptx::mbarrier_try_wait_parity(barrier, parity)) {
  }
}

// One thread.
__device__ __forceinline__ void load(const RingStreamerArguments& arguments, Header* header,
                                     u8* stages) {
  const u64 stride = static_cast<u64>(gridDim.x) * arguments.piece_bytes;
  pipeline::RingPosition loading;
  pipeline::RingPosition arriving;
  u32 loaded = 0;
  for (u32 number = 0; number < arguments.count; ++number) {
    const RingPart part = arguments.parts[number];
    if (!ring_words::wait(arguments.words, ring_words::parts_read, part.after, arguments.patience,
                          ring_words::by_streamer | (number + 1))) {
      // what was asked for arrives and is stored: the CTA must outlive it
      *const_cast<volatile u32*>(&header->stopped) = loaded;
      return;
    }
    const u8* source = part.source + static_cast<u64>(blockIdx.x) * arguments.piece_bytes;
    for (u32 piece = blockIdx.x; piece < part.pieces; piece += gridDim.x) {
      if (loaded >= arguments.loads) {
        wait(header->full + arriving.stage, arriving.parity);
        arriving.advance(arguments.stages);
      }
      // the first turn finds all stages empty
      if (loaded >= arguments.stages) wait(header->empty + loading.stage, loading.parity ^ 1);
      ptx::mbarrier_t* full = header->full + loading.stage;
      ptx::mbarrier_arrive_expect_tx(full, arguments.piece_bytes);
      ptx::bulk_load(stages + loading.stage * arguments.piece_bytes, source, arguments.piece_bytes,
                     full);
      loading.advance(arguments.stages);
      source += stride;
      ++loaded;
    }
  }
}

// One thread, of another warp.
template <RingStreamerConfiguration configuration>
__device__ __forceinline__ void store(const RingStreamerArguments& arguments, Header* header,
                                      u8* stages) {
  const u64 stride = static_cast<u64>(gridDim.x) * arguments.piece_bytes;
  pipeline::RingPosition storing;
  pipeline::RingPosition freeing;
  constexpr u32 in_flight = configuration.stores;
  u32 stored = 0;
  u32 freed = 0;
  const auto free_until = [&](u32 end) {
    for (; freed < end; ++freed) {
      ptx::mbarrier_arrive(header->empty + freeing.stage);
      freeing.advance(arguments.stages);
    }
  };
  for (u32 number = 0; number < arguments.count; ++number) {
    const RingPart part = arguments.parts[number];
    u8* target = part.target + static_cast<u64>(blockIdx.x) * arguments.piece_bytes;
    for (u32 piece = blockIdx.x; piece < part.pieces; piece += gridDim.x) {
      while (!ptx::mbarrier_try_wait_parity(header->full + storing.stage, storing.parity)) {
        if (*const_cast<volatile u32*>(&header->stopped) <= stored) {
          ptx::bulk_wait_group<0>();
          return;
        }
      }
      ptx::bulk_store(target, stages + storing.stage * arguments.piece_bytes,
                      arguments.piece_bytes);
      ptx::bulk_commit_group();
      storing.advance(arguments.stages);
      target += stride;
      ++stored;
      ptx::bulk_wait_group_read<configuration.stores>();
      if (stored > in_flight) free_until(stored - in_flight);
    }
    // At once and not with later pieces: those may wait for a product that waits for this part.
    ptx::bulk_wait_group<0>();
    free_until(stored);
    ptx::add_acquire_release_gpu(arguments.words + ring_words::arrivals + number, 1);
  }
}

}  // namespace ring_streamer_parts

// Two warps, of which one thread each works.
template <RingStreamerConfiguration configuration>
__global__ void __launch_bounds__(64, 1)
    ring_streamer(const __grid_constant__ RingStreamerArguments arguments) {
  using namespace ring_streamer_parts;
  extern __shared__ __align__(128) u8 shared[];
  Header* header = reinterpret_cast<Header*>(shared);
  u8* stages = shared + header_bytes;
  if (threadIdx.x == 0) {
    for (u32 stage = 0; stage < arguments.stages; ++stage) {
      ptx::mbarrier_init(header->full + stage, 1);
      ptx::mbarrier_init(header->empty + stage, 1);
    }
    header->stopped = never;
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) load(arguments, header, stages);
  if (threadIdx.x == 32) store<configuration>(arguments, header, stages);
}

}  // namespace dak
