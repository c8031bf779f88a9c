// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/process.h"

namespace pentad {
namespace {

// Set in a forked child: neither OpenMP's team nor the pool's workers exist there any more.
std::atomic<bool> forked{false};
thread_local bool inside_region = false;

int default_threads() {
  if (const char* text = std::getenv("PENTAD_NUM_THREADS")) {
    const long n = std::strtol(text, nullptr, 10);
    if (n >= 1) return static_cast<int>(std::min<long>(n, kMostThreads));
  }
  return usable_processors();
}

// One parallel region: every participant draws the next task until none is left.
struct Region {
  const std::function<void(int64_t)>* task;
  int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void work() {
    inside_region = true;
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        (*task)(i);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
        next.store(tasks, std::memory_order_relaxed);
      }
    }
    inside_region = false;
  }
};

// --- The adopted OpenMP runtime ------------------------------------------------------------------

struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*in_parallel)() = nullptr;
  std::string name;
};

template <class F>
void lookup(F& f, const char* symbol) {
  f = reinterpret_cast<F>(find_symbol(symbol));
}

// Looked up until found, since torch may be imported after us; again only when another library has
// been loaded, as a miss takes its time.
const OpenMP* openmp() {
  static std::atomic<const OpenMP*> found{nullptr};
  if (forked.load(std::memory_order_relaxed)) return nullptr;
  if (const OpenMP* runtime = found.load(std::memory_order_acquire)) return runtime;
  static std::atomic<uint64_t> missed{0};
  const uint64_t now = libraries_loaded();
  if (missed.exchange(now, std::memory_order_relaxed) == now) return nullptr;
  OpenMP candidate;
  lookup(candidate.parallel, "GOMP_parallel");
  lookup(candidate.in_parallel, "omp_in_parallel");
  if (!candidate.parallel || !candidate.in_parallel) return nullptr;
  candidate.name = "openmp (" + library_of(reinterpret_cast<void*>(candidate.parallel)) + ")";
  const OpenMP* mine = new OpenMP(candidate);  // lives as long as the process
  const OpenMP* expected = nullptr;
  if (found.compare_exchange_strong(expected, mine, std::memory_order_acq_rel)) return mine;
  delete mine;
  return expected;
}

// --- Torch's number of threads -------------------------------------------------------------------

// at::get_num_threads and at::set_num_threads, the functions behind torch.set_num_threads. OpenMP
// keeps its number per thread, and torch sets a new thread's when that thread first asks, so asking
// torch is the only way to agree with it everywhere.
#if defined(_WIN32)
constexpr const char* kGetNumThreads = "?get_num_threads@at@@YAHXZ";
constexpr const char* kSetNumThreads = "?set_num_threads@at@@YAXH@Z";
#else
constexpr const char* kGetNumThreads = "_ZN2at15get_num_threadsEv";
constexpr const char* kSetNumThreads = "_ZN2at15set_num_threadsEi";
#endif
struct Torch {
  int (*get_num_threads)() = nullptr;
  void (*set_num_threads)(int) = nullptr;
};

const Torch* loaded_torch() {
  static std::atomic<const Torch*> found{nullptr};
  if (const Torch* torch = found.load(std::memory_order_acquire)) return torch;
  static std::atomic<uint64_t> missed{0};
  const uint64_t now = libraries_loaded();
  if (missed.exchange(now, std::memory_order_relaxed) == now) return nullptr;
  void* get = find_symbol("torch_cpu", kGetNumThreads);
  void* set = find_symbol("torch_cpu", kSetNumThreads);
  if (!get || !set) return nullptr;
  static const Torch torch{reinterpret_cast<int (*)()>(get), reinterpret_cast<void (*)(int)>(set)};
  found.store(&torch, std::memory_order_release);
  return &torch;
}

// --- The own pool --------------------------------------------------------------------------------

class Pool {
 public:
  static Pool& instance();

  int threads() const { return threads_.load(std::memory_order_relaxed); }
  void set_threads(int n) { threads_.store(n, std::memory_order_relaxed); }

  void run(Region& region, int participants) {
    // One region at a time: a second caller works alone rather than waiting.
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return region.work();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_) < participants - 1) {
        std::thread(&Pool::serve, this, workers_, generation_.load()).detach();
        ++workers_;
      }
      region_ = &region;
      active_ = participants - 1;
      pending_.store(participants - 1, std::memory_order_relaxed);
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    region.work();
    for (int spins = 0; pending_.load(std::memory_order_acquire) != 0; ++spins)
      if (spins > kSpins) std::this_thread::yield();
  }

 private:
  // A few microseconds: regions often follow each other closely.
  static constexpr int kSpins = 2000;

  void serve(int index, uint64_t seen) {
    for (;;) {
      for (int spins = 0; spins < kSpins && generation_.load(std::memory_order_acquire) == seen;)
        ++spins;
      Region* region = nullptr;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (index < active_) region = region_;
      }
      if (!region) continue;
      region->work();
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> threads_{default_threads()};
  Region* region_ = nullptr;
  int active_ = 0;
  int workers_ = 0;
};

std::atomic<Pool*> pool{nullptr};

// Workers do not survive a fork, and a lock may have been held: the child gets a fresh pool, the
// old one is left where it is.
void in_child() {
  Pool* old = pool.load();
  forked.store(true);
  inside_region = false;
  if (!old) return;
  Pool* fresh = new Pool;
  fresh->set_threads(old->threads());
  pool.store(fresh);
}

Pool& Pool::instance() {
  static std::once_flag once;
  std::call_once(once, [] {
    call_in_forked_child(in_child);
    pool.store(new Pool);  // never destroyed: workers may outlive static destructors
  });
  return *pool.load();
}

}  // namespace

int num_threads() {
  Pool& pool = Pool::instance();  // first, so that the fork handler is in place
  if (const Torch* torch = loaded_torch()) return std::max(1, torch->get_num_threads());
  return pool.threads();
}

void set_num_threads(int n) {
  Pool::instance().set_threads(n);
  if (const Torch* torch = loaded_torch()) torch->set_num_threads(n);
}

const char* thread_runtime() {
  const OpenMP* omp = openmp();
  return omp ? omp->name.c_str() : "own pool";
}

void parallel_for(int64_t tasks, const std::function<void(int64_t)>& task) {
  if (tasks <= 0) return;
  Region region;
  region.task = &task;
  region.tasks = tasks;
  const int participants = static_cast<int>(std::min<int64_t>(tasks, num_threads()));
  if (participants <= 1 || inside_region) {
    const bool outer = inside_region;
    region.work();
    inside_region = outer;
  } else if (const OpenMP* omp = openmp(); omp && !omp->in_parallel()) {
    omp->parallel([](void* data) { static_cast<Region*>(data)->work(); }, &region, participants, 0);
  } else if (omp) {
    region.work();
  } else {
    Pool::instance().run(region, participants);
  }
  if (region.error) std::rethrow_exception(region.error);
}

void parallel_for_if(bool worth, int64_t tasks, const std::function<void(int64_t)>& task) {
  if (worth) return parallel_for(tasks, task);
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

}  // namespace pentad
