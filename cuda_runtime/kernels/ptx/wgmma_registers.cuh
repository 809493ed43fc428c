// wgmma with the first operand in registers; see wgmma.cuh.
//
// D[64, N] += A[64, 16] B[16, N]: B lies in shared memory with its N contiguous (MN-major). The four
// registers of A hold pairs of elements as `tile/accumulator.cuh` places two neighbouring columns:
// rows r and r + 8 of columns 0 to 7, then the same of columns 8 to 15.
#pragma once

#include "types.cuh"

namespace dak::ptx {

// `Half`: fp16 operands, else bf16.
template <u32 N, bool Half>
struct WgmmaFromRegisters;

// Keeps the compiler from touching sums of products under way: before the first product that adds
// to them, and after the wait for the last.
template <u32 Count>
__device__ __forceinline__ void wgmma_fence_registers(float (&d)[Count]) {
#pragma unroll
  for (u32 i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i]));
}

#define DAK_WGMMA(N, TYPE, HALF, PLACES, A, B, ...)                                      \
  template <>                                                                            \
  struct WgmmaFromRegisters<N, HALF> {                                                   \
    static __device__ __forceinline__ void run(float (&d)[N / 2], const u32 (&a)[4], u64 b) { \
      asm volatile("{\n.reg .pred add;\nsetp.eq.b32 add, 0, 0;\n"                        \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE       \
                   " {" PLACES "}, {" A "}, " B ", add, 1, 1, 1;\n}\n"                   \
                   : __VA_ARGS__                                                         \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                \
    }                                                                                    \
  };

#define DAK_PLACES_16 \
        "%0, %1, %2, %3, %4, %5, %6, %7"
#define DAK_SUMS_16 \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
DAK_WGMMA(16, "bf16", false, DAK_PLACES_16, "%8, %9, %10, %11", "%12", DAK_SUMS_16)
DAK_WGMMA(16, "f16", true, DAK_PLACES_16, "%8, %9, %10, %11", "%12", DAK_SUMS_16)

#define DAK_PLACES_32 \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DAK_SUMS_32 \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
DAK_WGMMA(32, "bf16", false, DAK_PLACES_32, "%16, %17, %18, %19", "%20", DAK_SUMS_32)
DAK_WGMMA(32, "f16", true, DAK_PLACES_32, "%16, %17, %18, %19", "%20", DAK_SUMS_32)

#define DAK_PLACES_64 \
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DAK_SUMS_64 \
        "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), \
        "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
        "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), \
        "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), \
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
DAK_WGMMA(64, "bf16", false, DAK_PLACES_64, "%32, %33, %34, %35", "%36", DAK_SUMS_64)
DAK_WGMMA(64, "f16", true, DAK_PLACES_64, "%32, %33, %34, %35", "%36", DAK_SUMS_64)

#undef DAK_WGMMA

}  // namespace dak::ptx
