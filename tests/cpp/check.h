// SPDX-License-Identifier: Apache-2.0
// CHECK(condition, what...) counts failures and goes on; main returns report().
#pragma once
#include <cstdio>
#include <sstream>

inline int checks = 0, failures = 0;

template <class... What>
void check(bool ok, const char* text, const char* file, int line, const What&... what) {
  ++checks;
  if (ok || ++failures > 20) return;
  std::ostringstream detail;
  ((detail << ' ' << what), ...);
  std::printf("%s:%d: %s%s\n", file, line, text, detail.str().c_str());
}

#define CHECK(condition, ...) \
  check(static_cast<bool>(condition), #condition, __FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)

inline int report() {
  std::printf("%d passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}
