// SPDX-License-Identifier: Apache-2.0
// Runs a kernel's grid on the CPU: the blocks one after the other, the lanes of a block as fibers.
//
// Why fibers: a kernel is straight-line code with barriers in it, at any depth of loops and calls.
// A loop over the lanes cannot stop in the middle of that; threads could, but 256 of them for a
// block take a second where fibers take a millisecond, and their order could not be chosen. A fiber
// runs until it waits for others, so between two barriers the lanes run one after the other, in an
// order that the test chooses: a kernel whose result depends on it has a race.
//
// What is an error here, though a device may get away with it: a lane that has returned while others
// wait at a barrier; lanes of a warp at different collectives, or at one with different masks; a
// mask without the caller; blocks that are not whole warps; more shared memory than was asked for.
// Shared arrays are allocations of their own, so the address sanitizer sees their bounds, and start
// with garbage. What is not modelled: memory order between blocks (they run one after the other, so
// a block must not wait for a later one), bank conflicts, and speed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local uint3 threadIdx, blockIdx;
inline thread_local dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace pentad::cuda_host {

enum class Order { forward, reverse, shuffled };

// Of the lanes and the blocks of the next launches; tests run each kernel in several orders.
struct Schedule {
  Order order = Order::forward;
  uint32_t seed = 1;
  bool early_copies = false;  // cp_async copies at once, and not when it is waited for
};
inline thread_local Schedule schedule;

// What a kernel must not do, with the block, the lanes and the source lines.
struct Misuse : std::logic_error {
  using std::logic_error::logic_error;
};

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel);

// --- For the language of kernels (cuda_host.h), called by lanes -------------------------------------

// Gets the payloads of all lanes that take part, by lane (a warp: 32) or thread of the block; null
// for others. Runs once, when the last has come.
using Combine = void (*)(void* const* payloads, int count);

void warp_collective(const char* what, uint32_t mask, void* payload, Combine combine,
                     const std::source_location& where);
void block_collective(const char* what, void* payload, Combine combine,
                      const std::source_location& where);
// Of four warps in a row, the first of which is a multiple of four: sm_90's wgmma.
void warpgroup_collective(const char* what, void* payload, Combine combine,
                          const std::source_location& where);

// Waits until ready(at), which other lanes or `later` bring about.
void wait_until(const char* what, bool (*ready)(const void* at), const void* at,
                const std::source_location& where);

// What a device does beside the lanes, as the bulk copies of sm_90: as late as it may, when no lane
// can go on otherwise, or at once (early_copies).
void later(std::function<void()> work);

// Of the caller in its block.
unsigned lane_number();

// The block's next array in the order of the calls; each lane asks for the same ones.
void* shared_array(size_t bytes, size_t alignment);

// Copies that have been begun and not waited for, one list per group. A device may copy at any time
// in between. Here that is at the end, so that a missing wait shows, or at once (early_copies), so
// that a missing barrier before it does.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;
  void run() const {
    std::memcpy(to, from, bytes);
    std::memset(static_cast<char*>(to) + bytes, 0, zeros);
  }
};
std::vector<std::vector<Copy>>& pending_copies();

// Products of the caller's warpgroup that have been begun and not waited for, one list per group.
std::vector<std::vector<std::function<void()>>>& pending_products();

}  // namespace pentad::cuda_host
