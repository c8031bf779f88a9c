// SPDX-License-Identifier: Apache-2.0
// hopper.cuh by the instructions. Code for other architectures traps: they are not to launch it.
#pragma once

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PENTAD_HOPPER(...) __VA_ARGS__
#else
#define PENTAD_HOPPER(...) __trap()
#endif

namespace pentad::hopper {

inline bool runs_on(int device) { return compute_capability(device) == 90; }

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// --- Barriers ---------------------------------------------------------------------------------------

__device__ inline void Barrier::init(int arrivals) {
  PENTAD_HOPPER(asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                             "r"(arrivals) : "memory"));
}
__device__ inline void publish_barriers() {
  PENTAD_HOPPER(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
  __syncthreads();
}
__device__ inline void Barrier::arrive() {
  PENTAD_HOPPER(asm volatile(
      "mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory"));
}
__device__ inline void Barrier::arrive_expecting(int bytes) {
  PENTAD_HOPPER(asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
      "r"(bytes) : "memory"));
}
__device__ inline void Barrier::wait(int parity) {
  int done = 0;
  while (!done)
    PENTAD_HOPPER(
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.b32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_address(this)),
                     "r"(parity) : "memory"));
}

// --- Tiles ------------------------------------------------------------------------------------------

// The driver's own function, found through the runtime, so that the extension needs no driver.
inline TileMap tile_map(const void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
                        int rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                cudaEnableDefault, &status),
               "cuTensorMapEncodeTiled");
    if (status != cudaDriverEntryPointSuccess)
      throw DeviceError("the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(found);
  }();
  cuuint64_t sizes[4], strides[3];
  for (int i = 0; i < 4; ++i) sizes[i] = static_cast<cuuint64_t>(size[i]);
  for (int i = 1; i < 4; ++i)
    strides[i - 1] = size[i] == 1 ? 16 : static_cast<cuuint64_t>(stride[i] * 2);
  const cuuint32_t box[4] = {kPanel, static_cast<cuuint32_t>(rows), 1, 1}, every[4] = {1, 1, 1, 1};
  TileMap made;
  if (encode(&made.map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(data), sizes, strides,
             box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
    throw DeviceError("the CUDA driver refuses a map of tiles");
  return made;
}

__device__ inline void copy_tile(void* shared, const TileMap& map, Barrier* barrier, int x, int y,
                                 int z, int w) {
  PENTAD_HOPPER(asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(&map.map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z), "r"(w) : "memory"));
}

// --- Products ---------------------------------------------------------------------------------------

// A matrix descriptor: address, offsets in 16 bytes, and the 128-byte swizzle in the top bits.
__device__ inline Operand::Operand(const void* shared, int stride, int panel)
    : descriptor((shared_address(shared) & 0x3ffff) >> 4 | static_cast<uint64_t>(panel >> 4) << 16 |
                 static_cast<uint64_t>(stride >> 4) << 32 | uint64_t{1} << 62) {}
__device__ inline Operand Operand::advanced(int bytes) const {
  Operand moved;
  moved.descriptor = descriptor + (bytes >> 4);
  return moved;
}

#define PENTAD_C8(c, i)                                                                       \
  "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3]), "+f"(c[i + 4]), "+f"(c[i + 5]), \
      "+f"(c[i + 6]), "+f"(c[i + 7])
#define PENTAD_C32(c, i) \
  PENTAD_C8(c, i), PENTAD_C8(c, i + 8), PENTAD_C8(c, i + 16), PENTAD_C8(c, i + 24)
#define PENTAD_C64(c) PENTAD_C32(c, 0), PENTAD_C32(c, 32)
#define PENTAD_NAMES_32                                                               \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define PENTAD_NAMES_64                                                               \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, "  \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, "  \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"

// One instruction for each shape and type; operands behind c: a, b, whether to accumulate.
#define PENTAD_WGMMA(shape, type, names, a, b, p, flags)                                         \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " p ", 0;\nwgmma.mma_async.sync.aligned." shape ".f32." type \
  "." type " " names ", " a ", " b ", p, 1, 1" flags ";\n}"

template <bool bf16, bool b_transposed, int kRegisters>
__device__ inline void product(float (&c)[kRegisters], const Operand& a, const Operand& b,
                               bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64, "64 or 128 columns");
  [[maybe_unused]] constexpr int transposed = b_transposed;
  [[maybe_unused]] const int p = accumulate;
#define PENTAD_PRODUCT(type)                                                                       \
  if constexpr (kRegisters == 32)                                                                  \
    asm volatile(PENTAD_WGMMA("m64n64k16", type, PENTAD_NAMES_32, "%32", "%33", "%34", ", 0, %35") \
                 : PENTAD_C32(c, 0)                                                                \
                 : "l"(a.descriptor), "l"(b.descriptor), "r"(p), "n"(transposed));                 \
  else                                                                                             \
    asm volatile(                                                                                  \
        PENTAD_WGMMA("m64n128k16", type, PENTAD_NAMES_64, "%64", "%65", "%66", ", 0, %67")         \
        : PENTAD_C64(c)                                                                            \
        : "l"(a.descriptor), "l"(b.descriptor), "r"(p), "n"(transposed))
  PENTAD_HOPPER(if constexpr (bf16) { PENTAD_PRODUCT("bf16"); } else { PENTAD_PRODUCT("f16"); });
#undef PENTAD_PRODUCT
}

template <bool bf16, bool b_transposed, int kRegisters>
__device__ inline void product(float (&c)[kRegisters], const uint32_t (&a)[4], const Operand& b,
                               bool accumulate) {
  static_assert(kRegisters == 32 || kRegisters == 64, "64 or 128 columns");
  [[maybe_unused]] constexpr int transposed = b_transposed;
  [[maybe_unused]] const int p = accumulate;
#define PENTAD_PRODUCT(type)                                                                      \
  if constexpr (kRegisters == 32)                                                                 \
    asm volatile(PENTAD_WGMMA("m64n64k16", type, PENTAD_NAMES_32, "{%32, %33, %34, %35}", "%36",  \
                              "%37", ", %38")                                                     \
                 : PENTAD_C32(c, 0)                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(p),         \
                   "n"(transposed));                                                              \
  else                                                                                            \
    asm volatile(PENTAD_WGMMA("m64n128k16", type, PENTAD_NAMES_64, "{%64, %65, %66, %67}", "%68", \
                              "%69", ", %70")                                                     \
                 : PENTAD_C64(c)                                                                  \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor), "r"(p),         \
                   "n"(transposed))
  PENTAD_HOPPER(if constexpr (bf16) { PENTAD_PRODUCT("bf16"); } else { PENTAD_PRODUCT("f16"); });
#undef PENTAD_PRODUCT
}

__device__ inline void begin() {
  PENTAD_HOPPER(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}
__device__ inline void commit() {
  PENTAD_HOPPER(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}
template <int kLater>
__device__ inline void wait() {
  PENTAD_HOPPER(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLater) : "memory"));
}
template <int kRegisters>
__device__ inline void hold(float (&c)[kRegisters]) {
#pragma unroll
  for (int i = 0; i < kRegisters; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

template <int kRegisters>
__device__ inline void fewer_registers() {
  PENTAD_HOPPER(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}
template <int kRegisters>
__device__ inline void more_registers() {
  PENTAD_HOPPER(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters)));
}

}  // namespace pentad::hopper
