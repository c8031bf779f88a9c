// SPDX-License-Identifier: Apache-2.0
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "check.h"
#include "common/parallel.h"

using namespace pentad;

namespace {

void every_task_runs_once() {
  for (int threads : {1, 2, 3, 8}) {
    set_num_threads(threads);
    CHECK(num_threads() == threads, threads);
    for (int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(tasks);
      parallel_for(tasks, [&](int64_t i) { runs[i].fetch_add(1); });
      for (int64_t i = 0; i < tasks; ++i) CHECK(runs[i] == 1, threads, tasks, i);
    }
  }
}

void exceptions_arrive() {
  set_num_threads(4);
  for (int round = 0; round < 50; ++round) {
    bool caught = false;
    try {
      parallel_for(100, [&](int64_t i) {
        if (i == 13) throw std::runtime_error("thirteen");
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    CHECK(caught, round);
  }
}

void nested_and_concurrent_calls_end() {
  set_num_threads(3);
  std::atomic<int64_t> total{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round)
        parallel_for(5, [&](int64_t) { parallel_for(3, [&](int64_t) { total.fetch_add(1); }); });
    });
  }
  for (std::thread& caller : callers) caller.join();
  CHECK(total == 4 * 200 * 15, total.load());
}

#if defined(_WIN32)
void a_forked_child_has_threads() {}  // nothing forks there
#else
void a_forked_child_has_threads() {
  set_num_threads(2);
  std::atomic<int> before{0};
  parallel_for(64, [&](int64_t) { before.fetch_add(1); });
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang ends as a failure
    std::atomic<int> after{0};
    parallel_for(64, [&](int64_t) { after.fetch_add(1); });
    _exit(after == 64 && num_threads() == 2 ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, status);
}
#endif

}  // namespace

int main() {
  every_task_runs_once();
  exceptions_arrive();
  nested_and_concurrent_calls_end();
  a_forked_child_has_threads();
  return report();
}
