// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pentad {
namespace {

std::vector<Isa> detect() {
#if defined(__x86_64__)
  // GCC wants literals here.
#define HAS(feature) (__builtin_cpu_supports(feature) != 0)
  std::vector<Isa> levels;
  __builtin_cpu_init();
  if (!(HAS("sse4.2") && HAS("ssse3") && HAS("popcnt"))) return levels;
  levels.push_back(Isa::v2);
  if (!(HAS("avx2") && HAS("fma") && HAS("bmi") && HAS("bmi2") && HAS("f16c") && HAS("lzcnt")))
    return levels;
  levels.push_back(Isa::v3);
  if (!(HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl") && HAS("avx512cd")))
    return levels;
  levels.push_back(Isa::v4);
  if (!(HAS("avx512vpopcntdq") && HAS("avx512bitalg") && HAS("avx512vnni") && HAS("avx512bf16") &&
        HAS("avx512vbmi") && HAS("avx512vbmi2")))
    return levels;
  levels.push_back(Isa::v4x);
  return levels;
#undef HAS
#else
  return {Isa::neon};
#endif
}

Isa choose() {
  if (const char* text = std::getenv("PENTAD_ISA"); text && *text) return isa_from_name(text);
  if (isa_available().empty()) throw std::invalid_argument("this CPU lacks x86-64-v2 (SSE4.2)");
  return isa_available().back();
}

std::atomic<int> chosen{-1};

}  // namespace

const char* name(Isa level) {
  static const char* const names[] = {"v2", "v3", "v4", "v4x", "neon"};
  return names[static_cast<int>(level)];
}

const std::vector<Isa>& isa_available() {
  static const std::vector<Isa> levels = detect();
  return levels;
}

Isa isa() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level < 0) chosen.store(level = static_cast<int>(choose()), std::memory_order_relaxed);
  return static_cast<Isa>(level);
}

void set_isa(Isa level) { chosen.store(static_cast<int>(level), std::memory_order_relaxed); }

Isa isa_from_name(const char* text) {
  std::string known;
  for (Isa level : isa_available()) {
    if (std::string(name(level)) == text) return level;
    known += std::string(known.empty() ? "" : ", ") + name(level);
  }
  throw std::invalid_argument("PENTAD_ISA is '" + std::string(text) + "' but this machine has " +
                              known);
}

}  // namespace pentad
