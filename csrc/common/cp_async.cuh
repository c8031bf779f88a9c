// SPDX-License-Identifier: Apache-2.0
// Copies from global to shared memory that run beside the lanes (cp.async, sm_80 and later). On the
// CPU a copy happens as late as it may, when its group is waited for, or as early (executor.h).
#pragma once
#include "common/cuda_launch.cuh"

namespace pentad {

#if defined(__CUDACC__)

// 16 bytes, the first `bytes` of them read and the rest zero; both addresses are multiples of 16.
__device__ inline void cp_async(void* shared, const void* global, int bytes = 16) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
               : "memory");
}
// Ends a group of copies.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kLater groups are under way. Other lanes' copies need a barrier on top.
template <int kLater>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLater) : "memory");
}

#else

inline void cp_async(void* shared, const void* global, int bytes = 16) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16)
    throw cuda_host::Misuse("cp_async of an address that is no multiple of 16");
  const cuda_host::Copy copy{shared, global, static_cast<size_t>(bytes),
                             static_cast<size_t>(16 - bytes)};
  if (cuda_host::schedule.early_copies) copy.run();
  else cuda_host::pending_copies().back().push_back(copy);
}
inline void cp_async_commit() { cuda_host::pending_copies().emplace_back(); }
template <int kLater>
void cp_async_wait() {
  auto& groups = cuda_host::pending_copies();  // the last is the one being filled
  while (groups.size() > kLater + 1) {
    for (const cuda_host::Copy& copy : groups.front()) copy.run();
    groups.erase(groups.begin());
  }
}

#endif

}  // namespace pentad
