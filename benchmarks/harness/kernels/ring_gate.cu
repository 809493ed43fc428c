// Stands ahead of a product that reads a part of a ring: says that the parts before it have been
// read, and ends when the part has arrived.
//
// One thread without shared memory: while it waits it keeps no CTA of a streamer off an SM.
#include "ptx/memory_order.cuh"
#include "ring_words.cuh"
#include "types.cuh"

namespace dak {

struct RingGateArguments {
  u32* words;
  u32 part;
  u32 ctas;      // of the streamer
  u64 patience;  // ns
};

// harness/stream_filler.py packs this
static_assert(sizeof(RingGateArguments) == 24);

extern "C" __global__ void __launch_bounds__(1, 1)
    ring_gate(const __grid_constant__ RingGateArguments arguments) {
  // whatever read those parts ended before this kernel began
  ptx::store_release_gpu(arguments.words + ring_words::parts_read, arguments.part);
  ring_words::wait(arguments.words, ring_words::arrivals + arguments.part, arguments.ctas,
                   arguments.patience, arguments.part + 1);
}

}  // namespace dak
