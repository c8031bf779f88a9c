// SPDX-License-Identifier: Apache-2.0
#include "common/cuda_host/executor.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <new>
#include <numeric>
#include <random>
#include <sstream>
#include <string>

#include "common/cuda_host/fiber.h"

namespace pentad::cuda_host {
namespace {

constexpr unsigned kWarp = 32, kWarpgroup = 128, kMostLanes = 1024;

enum class State { ready, at_warp, at_warpgroup, at_block, at_condition, finished };

struct Lane {
  Fiber fiber;
  uint3 index;
  State state;
  // Where it waits, and with what.
  const char* what;
  uint32_t mask;
  void* payload;
  Combine combine;
  bool (*condition)(const void*);
  const void* at;
  std::source_location where;
  size_t arrays;  // that it has taken
  std::vector<std::vector<Copy>> copies;
};

struct Aligned {
  std::align_val_t alignment;
  void operator()(std::byte* memory) const { ::operator delete[](memory, alignment); }
};
struct Array {
  std::unique_ptr<std::byte[], Aligned> memory;
  size_t bytes;
};

struct Block {
  std::vector<std::unique_ptr<Lane>> lanes;  // kept from launch to launch for their stacks
  unsigned count = 0;
  unsigned current = 0;
  // Lanes that wait.
  unsigned at_block = 0, at_warp[kMostLanes / kWarp] = {},
           at_warpgroup[kMostLanes / kWarpgroup] = {};
  std::deque<std::function<void()>> later;
  std::vector<std::vector<std::function<void()>>> products[kMostLanes / kWarpgroup];
  std::vector<Array> arrays;
  size_t shared_left = 0;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
};

thread_local Block block;

Lane& current() { return *block.lanes[block.current]; }

void run_lane(void*) {
  try {
    (*block.kernel)();
  } catch (...) {
    block.error = std::current_exception();
  }
  current().state = State::finished;
  current().fiber.finish();
}

std::string place(const Lane& lane) {
  std::ostringstream text;
  if (lane.state == State::finished) return "has returned";
  const std::string path = lane.where.file_name();
  text << "waits at " << lane.what << " (" << path.substr(path.rfind('/') + 1) << ":"
       << lane.where.line();
  if (lane.state == State::at_warp) text << ", mask " << std::hex << lane.mask;
  text << ")";
  return text.str();
}

[[noreturn]] void misuse(const std::string& message) {
  std::ostringstream text;
  text << "block (" << blockIdx.x << ", " << blockIdx.y << ", " << blockIdx.z << "): " << message;
  throw Misuse(text.str());
}

// Nobody can go on: the first lane of each place where some stand.
[[noreturn]] void stuck() {
  std::string text, last;
  for (unsigned i = 0; i < block.count; ++i) {
    const std::string here = place(*block.lanes[i]);
    if (here == last) continue;
    text += (text.empty() ? "lane " : "; lane ") + std::to_string(i) + " " + here;
    last = here;
  }
  misuse(text);
}

// Texts are literals of one place in the source, so their addresses tell.
bool together(const Lane& a, const Lane& b) {
  return a.state == b.state && a.combine == b.combine && a.mask == b.mask && a.what == b.what &&
         a.where.line() == b.where.line() && a.where.file_name() == b.where.file_name();
}

// Waits for the `expected` lanes that take part among lanes [first, first + count).
template <class TakesPart>
void collective(unsigned first, unsigned count, unsigned expected, unsigned& waiting,
                const TakesPart& takes_part) {
  Lane& self = current();
  if (++waiting < expected) return self.fiber.suspend();
  void* payloads[kMostLanes];
  for (unsigned i = 0; i < count; ++i) {
    payloads[i] = nullptr;
    if (!takes_part(i)) continue;
    const Lane& lane = *block.lanes[first + i];
    if (!together(self, lane)) return self.fiber.suspend();
    payloads[i] = lane.payload;
  }
  if (self.combine) self.combine(payloads, static_cast<int>(count));
  for (unsigned i = 0; i < count; ++i)
    if (takes_part(i)) block.lanes[first + i]->state = State::ready;
  waiting -= expected;
}

void run_block(dim3 size, size_t shared_bytes, std::vector<unsigned>& order, std::mt19937& random) {
  block.arrays.clear();
  block.at_block = 0;
  std::fill(std::begin(block.at_warp), std::end(block.at_warp), 0u);
  std::fill(std::begin(block.at_warpgroup), std::end(block.at_warpgroup), 0u);
  block.later.clear();
  for (auto& groups : block.products) groups.assign(1, {});
  block.shared_left = shared_bytes;
  block.error = nullptr;
  for (unsigned i = 0; i < block.count; ++i) {
    Lane& lane = *block.lanes[i];
    lane.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    lane.state = State::ready;
    lane.arrays = 0;
    lane.copies.assign(1, {});
    lane.fiber.start(run_lane, nullptr);
  }
  for (unsigned finished = 0; finished < block.count;) {
    bool progress = false;
    if (schedule.order == Order::shuffled) std::shuffle(order.begin(), order.end(), random);
    for (unsigned i : order) {
      Lane& lane = *block.lanes[i];
      if (lane.state == State::at_condition && lane.condition(lane.at)) lane.state = State::ready;
      if (lane.state != State::ready) continue;
      progress = true;
      block.current = i;
      threadIdx = lane.index;
      lane.fiber.resume();
      if (block.error) std::rethrow_exception(block.error);
      finished += lane.state == State::finished;
    }
    if (progress) continue;
    if (block.later.empty()) stuck();
    const size_t next = schedule.order == Order::shuffled ? random() % block.later.size() : 0;
    block.later[next]();
    block.later.erase(block.later.begin() + static_cast<std::ptrdiff_t>(next));
  }
}

}  // namespace

void run(dim3 grid, dim3 size, size_t shared_bytes, const std::function<void()>& kernel) {
  blockIdx = {0, 0, 0};
  const uint64_t count = uint64_t{size.x} * size.y * size.z;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (count == 0 || count > kMostLanes || count % kWarp)
    misuse("blocks have " + std::to_string(count) + " lanes, expected whole warps, at most 1024");
  if (blocks == 0 || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    misuse("a grid that no device takes");
  block.count = static_cast<unsigned>(count);
  block.kernel = &kernel;
  while (block.lanes.size() < count) block.lanes.push_back(std::make_unique<Lane>());
  blockDim = size;
  gridDim = grid;

  std::mt19937 random(schedule.seed);
  std::vector<unsigned> lanes(count), block_order(blocks);
  std::iota(lanes.begin(), lanes.end(), 0u);
  std::iota(block_order.begin(), block_order.end(), 0u);
  if (schedule.order == Order::reverse) {
    std::reverse(lanes.begin(), lanes.end());
    std::reverse(block_order.begin(), block_order.end());
  } else if (schedule.order == Order::shuffled) {
    std::shuffle(block_order.begin(), block_order.end(), random);
  }
  for (unsigned b : block_order) {
    blockIdx = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
    run_block(size, shared_bytes, lanes, random);
  }
}

void warp_collective(const char* what, uint32_t mask, void* payload, Combine combine,
                     const std::source_location& where) {
  Lane& lane = current();
  if (!(mask >> block.current % kWarp & 1))
    misuse("lane " + std::to_string(block.current) + " calls " + what + " with a mask without it");
  lane.state = State::at_warp;
  lane.what = what;
  lane.mask = mask;
  lane.payload = payload;
  lane.combine = combine;
  lane.where = where;
  const unsigned warp = block.current / kWarp;
  collective(warp * kWarp, kWarp, static_cast<unsigned>(std::popcount(mask)), block.at_warp[warp],
             [mask](unsigned i) { return mask >> i & 1; });
}

void block_collective(const char* what, void* payload, Combine combine,
                      const std::source_location& where) {
  Lane& lane = current();
  lane.state = State::at_block;
  lane.what = what;
  lane.mask = 0;
  lane.payload = payload;
  lane.combine = combine;
  lane.where = where;
  collective(0, block.count, block.count, block.at_block, [](unsigned) { return true; });
}

void warpgroup_collective(const char* what, void* payload, Combine combine,
                          const std::source_location& where) {
  if (block.count % kWarpgroup) misuse(std::string(what) + " in a block of no whole warpgroups");
  Lane& lane = current();
  lane.state = State::at_warpgroup;
  lane.what = what;
  lane.mask = 0;
  lane.payload = payload;
  lane.combine = combine;
  lane.where = where;
  const unsigned group = block.current / kWarpgroup;
  collective(group * kWarpgroup, kWarpgroup, kWarpgroup, block.at_warpgroup[group],
             [](unsigned) { return true; });
}

void wait_until(const char* what, bool (*ready)(const void* at), const void* at,
                const std::source_location& where) {
  if (ready(at)) return;
  Lane& lane = current();
  lane.state = State::at_condition;
  lane.what = what;
  lane.condition = ready;
  lane.at = at;
  lane.where = where;
  lane.fiber.suspend();
}

void later(std::function<void()> work) {
  if (schedule.early_copies) work();
  else block.later.push_back(std::move(work));
}

std::vector<std::vector<std::function<void()>>>& pending_products() {
  return block.products[block.current / kWarpgroup];
}

unsigned lane_number() { return block.current; }

void* shared_array(size_t bytes, size_t alignment) {
  const size_t i = current().arrays++;
  if (i == block.arrays.size()) {
    const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    if (rounded > block.shared_left)
      misuse("array " + std::to_string(i) + " of shared memory takes " + std::to_string(rounded) +
             " bytes, but " + std::to_string(block.shared_left) + " are left");
    block.shared_left -= rounded;
    const Aligned aligned{std::align_val_t{alignment}};
    auto* memory = static_cast<std::byte*>(::operator new[](bytes, aligned.alignment));
    block.arrays.push_back({{memory, aligned}, bytes});
    std::memset(block.arrays.back().memory.get(), 0xcb, bytes);
  }
  if (block.arrays[i].bytes != bytes)
    misuse("lanes disagree on the size of array " + std::to_string(i) + " of shared memory");
  return block.arrays[i].memory.get();
}

std::vector<std::vector<Copy>>& pending_copies() { return current().copies; }

}  // namespace pentad::cuda_host
