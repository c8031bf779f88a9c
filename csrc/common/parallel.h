// SPDX-License-Identifier: Apache-2.0
// Threads without linking OpenMP.
//
// Linking libgomp either breaks the wheel rules or puts a second OpenMP runtime beside torch's, and
// two spinning teams on the same cores cost a factor of 300. So parallel_for adopts the runtime
// that is already in the process (torch loads one with global symbols; any libgomp, libomp or
// libiomp5 exports GOMP_parallel on Linux), which makes torch.set_num_threads hold here too. Where
// there is none, an own pool serves: workers spin for a moment, then sleep, and a forked child
// starts anew.
#pragma once
#include <cstdint>
#include <functional>

namespace pentad {

constexpr int kMostThreads = 1024;

// Threads that the next parallel_for of the calling thread uses: torch's number where torch is
// loaded, else this package's own (PENTAD_NUM_THREADS, or the processors that may be used).
int num_threads();
// Sets it, torch's too where torch is loaded. 1 <= n <= kMostThreads.
void set_num_threads(int n);
// "openmp (libgomp.so.1)" or "own pool".
const char* thread_runtime();

// Runs task(i) for i in [0, tasks), each exactly once, in no fixed order. The first exception that
// a task throws is rethrown here when all have ended. Nested calls run serially.
void parallel_for(int64_t tasks, const std::function<void(int64_t)>& task);

// As above where the work is `worth` threads, else a plain loop: a parallel region takes as long as
// a small call.
void parallel_for_if(bool worth, int64_t tasks, const std::function<void(int64_t)>& task);

}  // namespace pentad
