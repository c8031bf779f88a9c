// SPDX-License-Identifier: Apache-2.0
#include "bindings/writes.h"

#include <algorithm>
#include <cstdlib>

namespace pentad {
namespace {

// Whether no two elements share an address: each dimension steps over all that the smaller steps
// reach. (There are other layouts without overlap; nobody asks for them.)
bool is_injective(const TensorView& view) {
  if (is_contiguous(view)) return true;
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int i = 0; i < view.rank; ++i)
    if (view.shape[i] > 1) steps.push_back({std::abs(view.strides[i]), view.shape[i]});
  std::sort(steps.begin(), steps.end());
  int64_t reach = 1;
  for (const auto& [step, size] : steps) {
    if (step < reach) return false;
    reach += step * (size - 1);
  }
  return true;
}

}  // namespace

int64_t count(const TensorView& view) {
  int64_t n = 1;
  for (int i = 0; i < view.rank; ++i) n *= view.shape[i];
  return n;
}

Writes::Extent Writes::extent(const char* name, const TensorView& view) {
  const int64_t elements = count(view), size = size_of(view.dtype);
  if (!elements) return {name, 0, 0, false};
  uintptr_t begin = reinterpret_cast<uintptr_t>(view.data), end = begin + size;
  for (int i = 0; i < view.rank; ++i)
    (view.strides[i] < 0 ? begin : end) += view.strides[i] * (view.shape[i] - 1) * size;
  const bool dense = static_cast<int64_t>(end - begin) == elements * size && is_injective(view);
  return {name, begin, end, dense};
}

void Writes::input(const char* name, const TensorView& view) {
  inputs_.push_back(extent(name, view));
}

void Writes::input(const char* name, const std::optional<TensorView>& view) {
  if (view) input(name, *view);
}

void Writes::output(const char* name, const TensorView& view) {
  if (view.read_only) bad_value(op_, std::string(name) + " is read-only");
  if (!is_injective(view)) bad_value(op_, std::string(name) + " has elements that share memory");
  const Extent written = extent(name, view);
  for (const Extent& other : outputs_) check(written, other);
  outputs_.push_back(written);
}

void Writes::finish() const {
  for (const Extent& out : outputs_)
    for (const Extent& in : inputs_) check(out, in);
}

void Writes::check(const Extent& a, const Extent& b) const {
  const bool meet = a.begin < b.end && b.begin < a.end;
  if (meet && (a.begin == b.begin || (a.dense && b.dense)))
    bad_value(op_, std::string(a.name) + " shares memory with " + b.name);
}

}  // namespace pentad
