// SPDX-License-Identifier: Apache-2.0
// hopper.cuh on the CPU: the same addresses, swizzles and fragments, by plain loops.
#pragma once
#include <memory>
#include <vector>

#define __grid_constant__

namespace pentad::hopper {

using cuda_host::Where;

inline bool runs_on(int) { return true; }

// --- Barriers ---------------------------------------------------------------------------------------

// The 64 bits of a barrier.
struct BarrierState {
  int32_t bytes;      // expected and not come
  uint16_t arrivals;  // that are missing
  uint16_t expected : 15, phase : 1;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

// Applies `change`, and ends the phase where nothing is missing.
template <class Change>
void update(Barrier* barrier, Change change) {
  auto state = std::bit_cast<BarrierState>(barrier->state);
  change(state);
  if (state.arrivals == 0 && state.bytes == 0) {
    state.arrivals = state.expected;
    state.phase ^= 1;
  }
  barrier->state = std::bit_cast<uint64_t>(state);
}

inline void Barrier::init(int arrivals) {
  BarrierState begun{};
  begun.arrivals = static_cast<uint16_t>(arrivals);
  begun.expected = static_cast<uint16_t>(arrivals) & 0x7fff;
  state = std::bit_cast<uint64_t>(begun);
}
inline void publish_barriers() { __syncthreads(); }
inline void Barrier::arrive() { arrive_expecting(0); }
inline void Barrier::arrive_expecting(int bytes) {
  if (std::bit_cast<BarrierState>(state).arrivals == 0)
    throw cuda_host::Misuse("more arrivals at a barrier than its phase takes");
  update(this, [bytes](BarrierState& s) {
    s.bytes += bytes;
    --s.arrivals;
  });
}
inline void Barrier::wait(int parity) {
  const auto ended = [](int phase) {
    return phase ? [](const void* at) {
      return std::bit_cast<BarrierState>(static_cast<const Barrier*>(at)->state).phase != 1;
    } : [](const void* at) {
      return std::bit_cast<BarrierState>(static_cast<const Barrier*>(at)->state).phase != 0;
    };
  };
  cuda_host::wait_until("Barrier::wait", ended(parity), this, Where::current());
}

// --- Tiles ------------------------------------------------------------------------------------------

// Where the byte of a swizzled tile lies.
inline std::byte* swizzled(std::byte* at) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  return reinterpret_cast<std::byte*>(address ^ (address >> 3 & 0x70));
}

inline TileMap tile_map(const void* data, const int64_t (&size)[4], const int64_t (&stride)[4],
                        int rows) {
  TileMap map{data, {}, {}, rows};
  for (int i = 0; i < 4; ++i) {
    map.size[i] = size[i];
    map.stride[i] = 2 * stride[i];
  }
  return map;
}

inline void copy_tile(void* shared, const TileMap& map, Barrier* barrier, int x, int y, int z,
                      int w) {
  auto* tile = static_cast<std::byte*>(shared);
  if (reinterpret_cast<uintptr_t>(shared) % kTileAlignment)
    throw cuda_host::Misuse("a tile begins at no multiple of 1,024 bytes");
  cuda_host::later([=] {
    for (int row = 0; row < map.rows; ++row)
      for (int column = 0; column < kPanel; ++column) {
        const int64_t at[4] = {x + column, y + row, z, w};
        const auto* from = static_cast<const std::byte*>(map.data);
        bool inside = true;
        for (int i = 0; i < 4; ++i) {
          inside = inside && at[i] >= 0 && at[i] < map.size[i];
          if (at[i]) from += at[i] * map.stride[i];
        }
        uint16_t element = 0;
        if (inside) std::memcpy(&element, from, 2);
        std::memcpy(swizzled(tile + row * 128 + column * 2), &element, 2);
      }
    update(barrier, [&](BarrierState& s) { s.bytes -= map.rows * kPanel * 2; });
  });
}

// --- Products ---------------------------------------------------------------------------------------

inline Operand::Operand(const void* shared, int stride, int panel)
    : start(static_cast<const std::byte*>(shared)), stride(stride), panel(panel) {}
inline Operand Operand::advanced(int bytes) const {
  Operand moved = *this;
  moved.start += bytes;
  return moved;
}

template <bool bf16>
float widened(uint32_t bits) {
  return static_cast<float>(bf16 ? real_from_bf16(static_cast<uint16_t>(bits))
                                 : real_from_half(static_cast<uint16_t>(bits)));
}

// Element (row, k) of an operand, k below 16.
template <bool bf16>
float element(const Operand& from, bool transposed, int row, int k) {
  const int64_t offset = transposed ? row % kPanel * 2 + row / kPanel * int64_t{from.panel} +
                                          k % 8 * 128 + k / 8 * int64_t{from.stride}
                                    : row % 8 * 128 + row / 8 * int64_t{from.stride} + k * 2;
  uint16_t bits;
  std::memcpy(&bits, swizzled(const_cast<std::byte*>(from.start) + offset), 2);
  return widened<bf16>(bits);
}

// What a lane gives; a from registers, or else from shared memory.
struct ProductOfLane {
  float* c;
  const uint32_t* a;
  Operand a_shared, b;
  bool accumulate;
};

template <bool bf16, bool b_transposed, int kRegisters>
void multiply(const std::vector<ProductOfLane>& lanes) {
  constexpr int kColumns = 2 * kRegisters;
  float a[64][16], b[kColumns][16];
  for (int row = 0; row < 64; ++row)
    for (int k = 0; k < 16; ++k) {
      const ProductOfLane& lane = lanes[row / 16 * 32 + row % 8 * 4 + k % 8 / 2];
      a[row][k] = lane.a ? widened<bf16>(lane.a[k / 8 * 2 + row / 8 % 2] >> k % 2 * 16 & 0xffff)
                         : element<bf16>(lane.a_shared, false, row, k);
    }
  for (int column = 0; column < kColumns; ++column)
    for (int k = 0; k < 16; ++k) b[column][k] = element<bf16>(lanes[0].b, b_transposed, column, k);
  for (int row = 0; row < 64; ++row)
    for (int column = 0; column < kColumns; ++column) {
      const ProductOfLane& lane = lanes[row / 16 * 32 + row % 8 * 4 + column % 8 / 2];
      float& sum = lane.c[column / 8 * 4 + row / 8 % 2 * 2 + column % 2];
      if (!lane.accumulate) sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
    }
}

template <bool bf16, bool b_transposed, int kRegisters>
void begin_product(ProductOfLane lane, const Where& where) {
  cuda_host::warpgroup_collective(
      "product", &lane,
      [](void* const* payloads, int count) {
        std::vector<ProductOfLane> lanes;
        for (int i = 0; i < count; ++i)
          lanes.push_back(*static_cast<const ProductOfLane*>(payloads[i]));
        auto work = [lanes] { multiply<bf16, b_transposed, kRegisters>(lanes); };
        if (cuda_host::schedule.early_copies) work();
        else cuda_host::pending_products().back().push_back(work);
      },
      where);
}

template <bool bf16, bool b_transposed, int kRegisters>
void product(float (&c)[kRegisters], const Operand& a, const Operand& b, bool accumulate) {
  begin_product<bf16, b_transposed, kRegisters>({c, nullptr, a, b, accumulate}, Where::current());
}
template <bool bf16, bool b_transposed, int kRegisters>
void product(float (&c)[kRegisters], const uint32_t (&a)[4], const Operand& b, bool accumulate) {
  begin_product<bf16, b_transposed, kRegisters>({c, a, b, b, accumulate}, Where::current());
}

inline void begin() {}
inline void commit() {
  cuda_host::warpgroup_collective(
      "commit", nullptr, [](void* const*, int) { cuda_host::pending_products().emplace_back(); },
      Where::current());
}
template <int kLater>
void wait() {
  cuda_host::warpgroup_collective(
      "wait", nullptr,
      [](void* const*, int) {
        auto& groups = cuda_host::pending_products();  // the last is the one being filled
        while (groups.size() > kLater + 1) {
          for (const auto& work : groups.front()) work();
          groups.erase(groups.begin());
        }
      },
      Where::current());
}
template <int kRegisters>
void hold(float (&)[kRegisters]) {}
template <int kRegisters>
void fewer_registers() {}
template <int kRegisters>
void more_registers() {}

}  // namespace pentad::hopper
