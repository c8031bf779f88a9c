// SPDX-License-Identifier: Apache-2.0
// What is asked of the operating system about this process. process.cc is the one file that differs
// between Linux, macOS and Windows.
#pragma once
#include <cstdint>
#include <string>

namespace pentad {

// Processors that this process may use.
int usable_processors();

// A number that stays the same as long as no library is loaded.
uint64_t libraries_loaded();

// The address of what any loaded library exports to all others as `symbol`, or nullptr. A miss
// searches every library, some 20 us.
void* find_symbol(const char* symbol);

// The same in one library, if it is loaded: "torch_cpu" for libtorch_cpu.so, libtorch_cpu.dylib,
// torch_cpu.dll.
void* find_symbol(const char* library, const char* symbol);

// The file name of the library that holds `address`, "?" if unknown.
std::string library_of(void* address);

// Calls `function` in each child that this process forks, where processes fork.
void call_in_forked_child(void (*function)());

// Pages for memory that is about to be written, in one call instead of a fault for each. A hint:
// a refusal changes nothing but the time.
void supply_pages(void* data, int64_t bytes);

}  // namespace pentad
