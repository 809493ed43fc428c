// Times loads of which each waits for the one before: the round trip of one request.
#include "ptx/memory_order.cuh"
#include "ptx/timer.cuh"
#include "types.cuh"

namespace dak {

struct RoundTripArguments {
  const u8* address;
  u32 stride;  // bytes between loads; a multiple of 4
  u32 loads;
  u32 zero;          // 0, unknown to the compiler: the address of a load depends on the last value
  u64* nanoseconds;  // of all loads together
};

// cuda_runtime/streaming.py packs this: 8 + 3 * 4 bytes, 4 of padding, 8
static_assert(sizeof(RoundTripArguments) == 32);

// One thread.
extern "C" __global__ void __launch_bounds__(1, 1)
    round_trip(const __grid_constant__ RoundTripArguments arguments) {
  const u8* next = arguments.address;
  const u64 start = ptx::globaltimer();
  for (u32 i = 0; i < arguments.loads; ++i) {
    const u32 value = ptx::load_relaxed_system(next);
    next += arguments.stride + (value & arguments.zero);
  }
  // the timer may be read before the last load returns: one in `loads`
  const u64 stop = ptx::globaltimer();
  *arguments.nanoseconds = stop - start + (reinterpret_cast<u64>(next) & arguments.zero);
}

}  // namespace dak
