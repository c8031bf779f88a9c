// SPDX-License-Identifier: Apache-2.0
#include "common/process.h"

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#endif
#if defined(__linux__)
#include <link.h>
#include <sched.h>
#elif defined(__APPLE__)
#include <mach-o/dyld.h>
#endif

#include <algorithm>
#include <atomic>
#include <thread>

namespace pentad {

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
}

uint64_t libraries_loaded() {
#if defined(__linux__)
  uint64_t adds = 0;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* out) {
        *static_cast<uint64_t*>(out) = info->dlpi_adds;
        return 1;  // the first entry will do
      },
      &adds);
  return adds;
#elif defined(__APPLE__)
  return _dyld_image_count();
#else
  static std::atomic<uint64_t> asked{0};  // Windows does not tell, and its look-ups are quick
  return ++asked;
#endif
}

#if defined(_WIN32)

void* find_symbol(const char*) { return nullptr; }  // there is no scope of all libraries

void* find_symbol(const char* library, const char* symbol) {
  const HMODULE module = GetModuleHandleA((std::string(library) + ".dll").c_str());
  return module ? reinterpret_cast<void*>(GetProcAddress(module, symbol)) : nullptr;
}

std::string library_of(void*) { return "?"; }

void call_in_forked_child(void (*)()) {}

void supply_pages(void*, int64_t) {}

#else

void* find_symbol(const char* symbol) { return dlsym(RTLD_DEFAULT, symbol); }

void* find_symbol(const char* library, const char* symbol) {
#if defined(__APPLE__)
  // dyld goes by paths, so by the path under which it was loaded.
  const std::string end = "/lib" + std::string(library) + ".dylib";
  std::string file;
  for (uint32_t i = 0; i < _dyld_image_count(); ++i)
    if (const char* name = _dyld_get_image_name(i); name && std::string(name).ends_with(end))
      file = name;
  if (file.empty()) return nullptr;
#else
  const std::string file = "lib" + std::string(library) + ".so";
#endif
  void* handle = dlopen(file.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  return handle ? dlsym(handle, symbol) : nullptr;
}

std::string library_of(void* address) {
  Dl_info info;
  if (!dladdr(address, &info) || !info.dli_fname) return "?";
  const std::string path = info.dli_fname;
  return path.substr(path.rfind('/') + 1);
}

void call_in_forked_child(void (*function)()) { pthread_atfork(nullptr, nullptr, function); }

void supply_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_POPULATE_WRITE);
#endif
}

#endif

}  // namespace pentad
