// SPDX-License-Identifier: Apache-2.0
// The CPU's executor of CUDA kernels: what it computes, and the mistakes it must see.
#include <functional>
#include <string>
#include <vector>

#include "check.h"
#include "common/cp_async.cuh"
#include "common/cuda_launch.cuh"
#include "common/mma.cuh"
#include "orders.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

using namespace pentad;

namespace {

void run(unsigned blocks, unsigned lanes, size_t shared, const std::function<void()>& kernel) {
  cuda_host::run(blocks, lanes, shared, kernel);
}

// The message of the misuse that the kernel ends in; empty without one.
std::string misuse(unsigned lanes, size_t shared, const std::function<void()>& kernel) {
  try {
    run(1, lanes, shared, kernel);
  } catch (const cuda_host::Misuse& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) { return text.find(part) != text.npos; }

void grids() {
  std::vector<int> seen(2 * 3 * 2 * 4 * 8 * 2);
  cuda_host::run({2, 3, 2}, {4, 8, 2}, 0, [&] {
    const unsigned b = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const unsigned i = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    ++seen[b * 64 + i];
  });
  for (int count : seen) CHECK(count == 1);
}

void kernel_of_two(int* out, int64_t value) { out[threadIdx.x] = static_cast<int>(value); }

void launches() {
  std::vector<int> out(32);
  launch({}, "two", kernel_of_two, Grid{1, 32}, out.data(), 7);
  CHECK(out[31] == 7);
}

// A block's sum by halves, and a transpose: each needs its barriers.
void barriers() {
  std::vector<int> sums(5), transposed(64 * 32);
  run(5, 64, shared_bytes<int>(64), [&] {
    Shared shared;
    int* part = shared.take<int>(64);
    const unsigned i = threadIdx.x;
    part[i] = static_cast<int>(i * (blockIdx.x + 1));
    for (unsigned half = 32; half; half /= 2) {
      __syncthreads();
      if (i < half) part[i] += part[i + half];
    }
    if (i == 0) sums[blockIdx.x] = part[0];
  });
  for (int b = 0; b < 5; ++b) CHECK(sums[b] == 2016 * (b + 1));
  run(1, 64, shared_bytes<int[33]>(64), [&] {
    Shared shared;
    auto* tile = shared.take<int[33]>(64);
    for (int j = 0; j < 32; ++j) tile[threadIdx.x][j] = static_cast<int>(threadIdx.x * 100 + j);
    CHECK(__syncthreads_count(threadIdx.x % 3 == 0) == 22);
    for (int i = threadIdx.x; i < 64 * 32; i += 64) transposed[i] = tile[i % 64][i / 64];
  });
  for (int i = 0; i < 64 * 32; ++i) CHECK(transposed[i] == i % 64 * 100 + i / 64);
}

void warps() {
  run(2, 96, 0, [] {
    const int lane = lane_of_warp(), warp = static_cast<int>(threadIdx.x) / 32;
    const int value = warp * 100 + lane;
    CHECK(__shfl_sync(kFullWarp, value, 5) == warp * 100 + 5);
    CHECK(__shfl_sync(kFullWarp, value, 3, 8) == warp * 100 + lane / 8 * 8 + 3);
    CHECK(__shfl_xor_sync(kFullWarp, value, 16) == warp * 100 + (lane ^ 16));
    CHECK(__shfl_up_sync(kFullWarp, value, 3) == (lane < 3 ? value : value - 3));
    CHECK(__shfl_down_sync(kFullWarp, value, 3, 16) == (lane % 16 < 13 ? value + 3 : value));
    CHECK(__ballot_sync(kFullWarp, lane % 4 == 1) == 0x22222222u);
    CHECK(__any_sync(kFullWarp, lane == 7) && !__any_sync(kFullWarp, lane == 32));
    CHECK(!__all_sync(kFullWarp, lane != 7) && __all_sync(kFullWarp, lane < 32));
    CHECK(__reduce_add_sync(kFullWarp, value) == warp * 3200 + 496);
    CHECK(__reduce_min_sync(kFullWarp, -lane) == -31);
    CHECK(__reduce_max_sync(kFullWarp, -lane) == 0);
    CHECK(__match_any_sync(kFullWarp, lane / 4) == 0xfu << lane / 4 * 4);
    if (lane < 8) CHECK(__reduce_add_sync(0xff, lane) == 28);  // a part of the warp
    float sum = static_cast<float>(lane);
    for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(kFullWarp, sum, by);
    CHECK(sum == 496);
  });
  int total = 0;
  run(3, 64, 0, [&] { atomicAdd(&total, 2); });
  CHECK(total == 384);
}

// Against plain products of the matrices that the fragments hold.
void products() {
  const auto bits_a = [](int row, int k) { return (row * 31 + k * 7 + row * k) % 5 < 2; };
  const auto bits_b = [](int k, int column) { return (column * 13 + k * 3 + column * k) % 7 < 3; };
  const auto real_a = [](int row, int k) { return static_cast<float>((row * 3 + k * 5) % 9 - 4); };
  const auto real_b = [](int k, int column) {
    return static_cast<float>((k + column * 2) % 5 - 2);
  };
  run(1, 32, 0, [&] {
    const int g = lane_of_warp() / 4, t = lane_of_warp() % 4;
    uint32_t a[4] = {}, b[2] = {}, half_a[4], half_b[2], brain_a[4], brain_b[2];
    const auto two = [](auto convert, float low, float high) {
      return static_cast<uint32_t>(convert(low).bits) | static_cast<uint32_t>(convert(high).bits)
                                                            << 16;
    };
    for (int r = 0; r < 4; ++r) {
      const int row = g + r % 2 * 8, group = t + r / 2 * 4;
      for (int i = 0; i < 32; ++i) a[r] |= static_cast<uint32_t>(bits_a(row, group * 32 + i)) << i;
      const float low = real_a(row, group * 2), high = real_a(row, group * 2 + 1);
      half_a[r] = two(__float2half, low, high);
      brain_a[r] = two(__float2bfloat16, low, high);
    }
    for (int r = 0; r < 2; ++r) {
      const int group = t + r * 4;
      for (int i = 0; i < 32; ++i) b[r] |= static_cast<uint32_t>(bits_b(group * 32 + i, g)) << i;
      const float low = real_b(group * 2, g), high = real_b(group * 2 + 1, g);
      half_b[r] = two(__float2half, low, high);
      brain_b[r] = two(__float2bfloat16, low, high);
    }
    int32_t c[4] = {1, 2, 3, 4};
    float half_c[4] = {1, 2, 3, 4}, brain_c[4] = {1, 2, 3, 4};
    mma_and_popc(c, a, b);
    mma_f16(half_c, half_a, half_b);
    mma_bf16(brain_c, brain_a, brain_b);
    for (int r = 0; r < 4; ++r) {
      const int row = g + r / 2 * 8, column = 2 * t + r % 2;
      int32_t count = r + 1;
      float sum = static_cast<float>(r + 1);
      for (int k = 0; k < 256; ++k) count += bits_a(row, k) && bits_b(k, column);
      for (int k = 0; k < 16; ++k) sum += real_a(row, k) * real_b(k, column);
      CHECK(c[r] == count, row, column);
      CHECK(half_c[r] == sum && brain_c[r] == sum, row, column);
    }
  });
}

// Matrix m holds 1000 m + 10 row + column.
void matrices() {
  run(1, 32, shared_bytes<uint16_t[8]>(32), [&] {
    Shared shared;
    auto* rows = shared.take<uint16_t[8]>(32);
    const int lane = lane_of_warp(), g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i)
      rows[lane][i] = static_cast<uint16_t>(1000 * (lane / 8) + 10 * (lane % 8) + i);
    __syncwarp();
    uint32_t r[4], turned[4];
    ldmatrix(r, rows[lane]);
    ldmatrix_transposed(turned, rows[lane]);
    for (uint32_t m = 0; m < 4; ++m) {
      const uint32_t at = 1000 * m + 10 * g + 2 * t, column = 1000 * m + 20 * t + g;
      CHECK(r[m] == (at | (at + 1) << 16), m, lane);
      CHECK(turned[m] == (column | (column + 10) << 16), m, lane);
    }
  });
}

void asynchronous_copies() {
  alignas(16) uint8_t from[4][16];
  for (int i = 0; i < 64; ++i) from[i / 16][i % 16] = static_cast<uint8_t>(i + 1);
  run(1, 32, shared_bytes<uint8_t[16]>(4), [&] {
    Shared shared;
    auto* to = shared.take<uint8_t[16]>(4);
    if (threadIdx.x) return;
    cp_async(to[0], from[0]);
    cp_async_commit();
    cp_async(to[1], from[1], 5);
    cp_async_commit();
    const bool early = cuda_host::schedule.early_copies;  // otherwise not before it is waited for
    CHECK(to[0][0] == (early ? 1 : 0xcb));
    cp_async_wait<1>();
    CHECK(to[0][0] == 1 && to[0][15] == 16 && to[1][0] == (early ? 17 : 0xcb));
    cp_async_wait<0>();
    CHECK(to[1][4] == 21 && to[1][5] == 0);
  });
}

void mistakes() {
  const std::string returned = misuse(64, 0, [] {
    if (threadIdx.x != 5) __syncthreads();
  });
  CHECK(has(returned, "lane 5 has returned") && has(returned, "waits at __syncthreads (test_cuda"),
        returned);
  const std::string elsewhere = misuse(64, 0, [] {
    if (threadIdx.x < 32) __syncthreads();
    else __syncthreads();
  });
  CHECK(has(elsewhere, "lane 32 waits at __syncthreads"), elsewhere);
  CHECK(has(misuse(32, 0,
                   [] {
                     if (threadIdx.x < 16) __shfl_sync(kFullWarp, 1, 0);
                     else __ballot_sync(kFullWarp, 1);
                   }),
            "lane 16 waits at __ballot_sync"));
  CHECK(has(misuse(32, 0, [] { __syncwarp(threadIdx.x < 16 ? 0xffffu : kFullWarp); }), "mask"));
  CHECK(has(misuse(32, 0, [] { __syncwarp(0xffff); }), "with a mask without it"));
  CHECK(has(misuse(32, 0,
                   [] {
                     if (threadIdx.x < 16) __shfl_sync(0xffff, 1, 20);
                   }),
            "a lane that is not in its mask"));
  CHECK(has(misuse(32, 64, [] { Shared().take<int>(17); }), "64 are left"));
  CHECK(has(misuse(32, 64, [] { Shared().take<char>(threadIdx.x == 9 ? 5 : 4); }), "disagree"));
  CHECK(has(misuse(33, 0, [] {}), "whole warps"));
  CHECK(has(misuse(2048, 0, [] {}), "at most 1024"));
  // What follows a mistake runs as if there had been none.
  barriers();
}

#if defined(__SANITIZE_ADDRESS__)
// A byte past each array is no memory, though another array follows it on a device.
void bounds() {
  run(1, 32, 2 * shared_bytes<char>(20), [] {
    Shared shared;
    for (char* array : {shared.take<char>(20), shared.take<char>(20)})
      CHECK(!__asan_address_is_poisoned(array + 19) && __asan_address_is_poisoned(array + 20));
  });
}
#else
void bounds() {}
#endif

// A kernel without the barrier it needs gives another result in another order.
int racy() {
  int result = 0;
  run(1, 64, shared_bytes<int>(64), [&] {
    Shared shared;
    int* values = shared.take<int>(64);
    values[threadIdx.x] = static_cast<int>(threadIdx.x);
    const int neighbour = values[(threadIdx.x + 1) % 64];
    if (threadIdx.x == 20) result = neighbour;
  });
  return result;
}

}  // namespace

int main() {
  in_every_order([] {
    grids();
    launches();
    barriers();
    warps();
    products();
    matrices();
    asynchronous_copies();
    bounds();
    mistakes();
  });
  cuda_host::schedule = {};
  const int forward = racy();
  cuda_host::schedule.order = cuda_host::Order::reverse;
  CHECK(racy() == 21 && forward != 21);
  return report();
}
