// Sparse warpgroup matrix products of Hopper (sm_90a): D[64][N] += A[64][32] * B[32][N], A 2:4 in registers.
//
// A warpgroup is four warps; warp w holds rows 16 w .. 16 w + 15 of A and D, in the very registers and metadata words
// that mma.sp.m16n8k32 takes (layout.cuh). B stands in shared memory, K-major: N rows of 128 bytes, swizzled by 128 bytes
// as the copy engine writes them.
//
// D is written while the instruction is under way, and A is read: between a fence and the wait for its group neither
// may be touched. The compiler watches that and serialises (warning C7510) what it cannot prove.
//
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions".

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SPARSERT_WGMMA 1
#else
#define SPARSERT_WGMMA 0
#endif

namespace sparsert::wgmma {

#if SPARSERT_WGMMA

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int Pending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Of a K-major operand swizzled by 128 bytes, at a multiple of 1,024 bytes; `bytes` further inside its rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t address, int bytes) {
  constexpr uint64_t kSwizzle128 = 1ull << 62, kEightRows = uint64_t(1024 / 16) << 32, kIgnored = 1ull << 16;
  return kSwizzle128 | kEightRows | kIgnored | ((address + bytes) & 0x3FFFF) >> 4;
}

// clang-format off
#define SPARSERT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SPARSERT_D16(i) SPARSERT_D4(i), SPARSERT_D4(i + 4), SPARSERT_D4(i + 8), SPARSERT_D4(i + 12)
#define SPARSERT_D32(i) SPARSERT_D16(i), SPARSERT_D16(i + 16)
#define SPARSERT_D64(i) SPARSERT_D32(i), SPARSERT_D32(i + 32)
#define SPARSERT_S16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SPARSERT_S32 SPARSERT_S16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SPARSERT_S64 SPARSERT_S32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SPARSERT_S96 SPARSERT_S64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SPARSERT_S128 SPARSERT_S96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, " \
  "%111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// A: four registers; descriptor of B; metadata; selector
#define SPARSERT_PRODUCT(N, TYPE, D, S, A0, A1, A2, A3, B, E, SEL)                                              \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." TYPE "." TYPE " {" S "}, "                  \
               "{%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", %" #E ", %" #SEL ", 1, 1, 1, 0;"             \
               : D : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(e), "n"(Selector))
#define SPARSERT_PRODUCTS(TYPE)                                                                                 \
  if constexpr (N == 32)                                                                                        \
    SPARSERT_PRODUCT(32, TYPE, SPARSERT_D16(0), SPARSERT_S16, 16, 17, 18, 19, 20, 21, 22);                      \
  else if constexpr (N == 64)                                                                                   \
    SPARSERT_PRODUCT(64, TYPE, SPARSERT_D32(0), SPARSERT_S32, 32, 33, 34, 35, 36, 37, 38);                      \
  else if constexpr (N == 128)                                                                                  \
    SPARSERT_PRODUCT(128, TYPE, SPARSERT_D64(0), SPARSERT_S64, 64, 65, 66, 67, 68, 69, 70);                     \
  else if constexpr (N == 192)                                                                                  \
    SPARSERT_PRODUCT(192, TYPE, SPARSERT_D64(0) SPARSERT_COMMA SPARSERT_D32(64), SPARSERT_S96, 96, 97, 98, 99, 100, 101, 102); \
  else                                                                                                          \
    SPARSERT_PRODUCT(256, TYPE, SPARSERT_D64(0) SPARSERT_COMMA SPARSERT_D64(64), SPARSERT_S128, 128, 129, 130, 131, 132, 133, 134)
#define SPARSERT_COMMA ,

// Selector: which lanes of each quad hold the metadata word; 0 for the first 32 inputs of a unit, 1 for the others.
template <int N, int Selector>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const uint4& a, uint64_t b, uint32_t e, __nv_bfloat16) {
  SPARSERT_PRODUCTS("bf16");
}
template <int N, int Selector>
__device__ __forceinline__ void multiply(float (&d)[N / 2], const uint4& a, uint64_t b, uint32_t e, __half) {
  SPARSERT_PRODUCTS("f16");
}
// clang-format on

#endif

}  // namespace sparsert::wgmma
