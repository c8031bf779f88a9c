// SPDX-License-Identifier: Apache-2.0
// Hopper's barriers, tile copies and warpgroup products on the CPU's executor: what they compute, and
// the mistakes that must show.
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/hopper.cuh"
#include "orders.h"

using namespace pentad;
using namespace pentad::hopper;

namespace {

std::mt19937 random_bits(11);

float value_of(uint16_t bits, bool bf16) {
  return static_cast<float>(bf16 ? real_from_bf16(bits) : real_from_half(bits));
}

// Small whole numbers, whose sums are exact in any order.
std::vector<uint16_t> numbers(int64_t count, bool bf16) {
  std::vector<uint16_t> made(count);
  for (uint16_t& bits : made) {
    const float value = static_cast<float>(static_cast<int>(random_bits() % 9) - 4);
    bits = bf16 ? __float2bfloat16(value).bits : __float2half(value).bits;
  }
  return made;
}

std::string misuse(unsigned lanes, size_t shared, const std::function<void()>& kernel) {
  try {
    cuda_host::run(1, lanes, shared, kernel);
  } catch (const cuda_host::Misuse& error) {
    return error.what();
  }
  return "";
}
bool has(const std::string& text, const char* part) { return text.find(part) != text.npos; }

// A (rows, columns) tile at any place of a tensor with gaps, its copy without the swizzle.
void tiles() {
  constexpr int kRows = 24;
  const int64_t size[4] = {100, 50, 3, 2}, stride[4] = {1, 104, 104 * 50 + 8, 104 * 50 * 3 + 64};
  const std::vector<uint16_t> tensor = numbers(2 * stride[3], true);
  CHECK(can_tile(tensor.data(), size, stride));
  const TileMap map = tile_map(tensor.data(), size, stride, kRows);
  for (int y : {-5, 0, 40})
    for (int x : {0, 64}) {
      std::vector<uint16_t> seen(kRows * kPanel, 0xffff);
      cuda_host::run(
          1, 32, shared_bytes<uint16_t, 1024>(kRows * kPanel) + shared_bytes<Barrier>(1), [&] {
            Shared shared;
            auto* tile = shared.take<uint16_t, 1024>(kRows * kPanel);
            auto* full = shared.take<Barrier>(1);
            if (threadIdx.x == 0) full->init(1);
            publish_barriers();
            if (threadIdx.x == 0) {
              full->arrive_expecting(kRows * kPanel * 2);
              copy_tile(tile, map, full, x, y, 2, 1);
            }
            full->wait(0);
            for (int i = threadIdx.x; i < kRows * kPanel; i += 32)
              seen[i] =
                  tile[i / kPanel * kPanel + ((i % kPanel / 8) ^ (i / kPanel % 8)) * 8 + i % 8];
          });
      for (int row = 0; row < kRows; ++row)
        for (int column = 0; column < kPanel; ++column) {
          const bool inside = y + row >= 0 && y + row < size[1] && x + column < size[0];
          const int64_t at = x + column + (y + row) * stride[1] + 2 * stride[2] + stride[3];
          CHECK(seen[row * kPanel + column] == (inside ? tensor[at] : 0), x, y, row, column);
        }
    }
}

// c (64 a warpgroup, N) = a (rows, K) b^T, b (N, K), or b (K, N): by two warpgroups, one stage after
// the other through two stages that a producing warpgroup fills.
template <bool bf16, bool b_transposed, bool a_in_registers, int kRegisters>
void products(int panels) {
  constexpr int kColumns = 2 * kRegisters, kStages = 2;
  const int inner = panels * kPanel, rows = 128;
  const std::vector<uint16_t> a = numbers(rows * inner, bf16), b = numbers(kColumns * inner, bf16);
  const int64_t one[4] = {1, inner, 1, 1};
  const TileMap a_map = tile_map(a.data(), {inner, rows, 1, 1}, one, rows);
  const TileMap b_map =
      b_transposed ? tile_map(b.data(), {kColumns, inner, 1, 1}, {1, kColumns, 1, 1}, kPanel)
                   : tile_map(b.data(), {inner, kColumns, 1, 1}, one, kColumns);
  constexpr int kA = 128 * kPanel, kB = kColumns * kPanel;
  std::vector<float> c(rows * kColumns);
  cuda_host::run(
      1, 384,
      shared_bytes<uint16_t[kA], 1024>(kStages) + shared_bytes<uint16_t[kB], 1024>(kStages) +
          2 * shared_bytes<Barrier>(kStages),
      [&] {
        Shared shared;
        auto* a_tiles = shared.take<uint16_t[kA], 1024>(kStages);
        auto* b_tiles = shared.take<uint16_t[kB], 1024>(kStages);
        auto* full = shared.take<Barrier>(kStages);
        auto* empty = shared.take<Barrier>(kStages);
        if (threadIdx.x == 0)
          for (int i = 0; i < kStages; ++i) {
            full[i].init(1);
            empty[i].init(8);  // warps
          }
        publish_barriers();
        const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32;
        if (warpgroup == 0) {
          if (threadIdx.x) return;
          for (int p = 0; p < panels; ++p) {
            const int stage = p % kStages;
            empty[stage].wait(1 - p / kStages % 2);
            full[stage].arrive_expecting((kA + kB) * 2);
            copy_tile(a_tiles[stage], a_map, &full[stage], p * kPanel, 0, 0, 0);
            if (b_transposed)
              for (int n = 0; n < kColumns; n += kPanel)
                copy_tile(b_tiles[stage] + n * kPanel, b_map, &full[stage], n, p * kPanel, 0, 0);
            else copy_tile(b_tiles[stage], b_map, &full[stage], p * kPanel, 0, 0, 0);
          }
          return;
        }
        const int first = (warpgroup - 1) * 64;
        const int row = first + threadIdx.x % 128 / 32 * 16 + lane / 4;
        float sums[kRegisters];
        for (int p = 0; p < panels; ++p) {
          const int stage = p % kStages;
          full[stage].wait(p / kStages % 2);
          const Operand left(a_tiles[stage] + first * kPanel, 1024);
          const Operand right(b_tiles[stage], 1024, kPanel * 128);
          uint32_t fragments[kPanel / 16][4];
          begin();
          for (int k = 0; k < kPanel / 16; ++k) {
            const Operand b_part = right.advanced(b_transposed ? k * 2048 : k * 32);
            const bool more = p > 0 || k > 0;
            if constexpr (a_in_registers) {
              for (int i = 0; i < 4; ++i)
                std::memcpy(
                    &fragments[k][i],
                    &a[(row + i % 2 * 8) * inner + p * kPanel + k * 16 + i / 2 * 8 + lane % 4 * 2],
                    4);
              product<bf16, b_transposed>(sums, fragments[k], b_part, more);
            } else {
              product<bf16, b_transposed>(sums, left.advanced(k * 32), b_part, more);
            }
          }
          commit();
          wait<0>();
          if (lane == 0) empty[stage].arrive();
        }
        for (int i = 0; i < kRegisters; ++i)
          c[(row + i % 4 / 2 * 8) * kColumns + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
      });
  for (int row = 0; row < rows; ++row)
    for (int column = 0; column < kColumns; ++column) {
      float sum = 0;
      for (int k = 0; k < inner; ++k)
        sum += value_of(a[row * inner + k], bf16) *
               value_of(b[b_transposed ? k * kColumns + column : column * inner + k], bf16);
      CHECK(c[row * kColumns + column] == sum, bf16, b_transposed, a_in_registers, row, column);
    }
}

void mistakes() {
  const size_t shared = shared_bytes<Barrier>(1);
  CHECK(has(misuse(32, shared,
                   [] {
                     Barrier* never = Shared().take<Barrier>(1);
                     if (threadIdx.x == 0) never->init(2);
                     publish_barriers();
                     if (threadIdx.x == 0) never->arrive();
                     never->wait(0);
                   }),
            "waits at Barrier::wait"));
  CHECK(has(misuse(32, shared,
                   [] {
                     Barrier* full = Shared().take<Barrier>(1);
                     if (threadIdx.x == 0) full->init(1);
                     publish_barriers();
                     if (threadIdx.x == 0) full->arrive_expecting(2);
                     full->wait(0);
                   }),
            "waits at Barrier::wait"));
  CHECK(has(misuse(160, 0, [] { commit(); }), "no whole warpgroups"));
  CHECK(has(misuse(128, 0,
                   [] {
                     if (threadIdx.x < 64) commit();
                   }),
            "has returned"));
  // A product that is not waited for has not been written.
  cuda_host::schedule.early_copies = false;
  bool written = false;
  cuda_host::run(1, 128, shared_bytes<uint16_t, 1024>(64 * kPanel), [&] {
    Shared memory;
    auto* tile = memory.take<uint16_t, 1024>(64 * kPanel);
    for (int i = threadIdx.x; i < 64 * kPanel; i += 128) tile[i] = 0x3f80;  // 1
    __syncthreads();
    float sums[32] = {};
    begin();
    product<true>(sums, Operand(tile, 1024), Operand(tile, 1024));
    commit();
    written |= sums[0] != 0;
    wait<0>();
    CHECK(sums[0] == 16);
  });
  CHECK(!written);
}

}  // namespace

int main() {
  in_every_order([] {
    tiles();
    products<true, false, false, 64>(3);
    products<false, false, false, 32>(2);
    products<true, true, false, 64>(2);
    products<true, true, true, 64>(5);
    products<false, true, true, 32>(1);
  });
  mistakes();
  return report();
}
