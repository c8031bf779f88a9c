// SPDX-License-Identifier: Apache-2.0
// Turns arrays into an attention::Problem. Lengths, offsets and lists are copied first, and the
// copies are checked and used: the arrays may change under a running kernel. Those in a device's
// memory are not looked at here; its kernels stay within the arrays whatever they hold.
#pragma once
#include <array>
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_cuda.h"
#include "bindings/lists.h"
#include "bindings/tensor_caster.h"
#include "bindings/writes.h"

namespace pentad {

// The lists of a BlockMask as Python passes them: a tuple of two sizes and seven arrays.
struct MaskArgument {
  int64_t q_block = 0, k_block = 0;
  std::array<std::unique_ptr<ViewHolder>, 7> arrays;  // null without a mask
};

}  // namespace pentad

namespace pybind11::detail {

template <>
struct type_caster<pentad::MaskArgument> {
 public:
  static constexpr auto name = const_name("tuple | None");
  template <class>
  using cast_op_type = const pentad::MaskArgument&;

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 9) return false;
    const auto parts = reinterpret_borrow<tuple>(source);
    make_caster<int64_t> q_block, k_block;
    if (!q_block.load(parts[0], true) || !k_block.load(parts[1], true)) return false;
    value_.q_block = cast_op<int64_t>(q_block);
    value_.k_block = cast_op<int64_t>(k_block);
    for (size_t i = 0; i < value_.arrays.size(); ++i) {
      value_.arrays[i] = std::make_unique<pentad::ViewHolder>();
      value_.arrays[i]->borrow(parts[i + 2]);
    }
    return true;
  }
  operator const pentad::MaskArgument&() const { return value_; }

 private:
  pentad::MaskArgument value_;
};

}  // namespace pybind11::detail

namespace pentad::attention {

using lists::expect_shape;
using Optional = std::optional<TensorView>;
using Scale = std::optional<double>;  // by default dim ** -0.5

struct Options {
  const Optional &bias, &key_bias, &alibi, &sink;
  Scale scale;
  double softcap;
  int64_t left, right;
  bool top_left;
  double dropout;
  const Optional& seed;
};

struct MaskLists;

class Arguments {
 public:
  Problem problem;
  int64_t q_tokens = 0, k_tokens = 0;  // extents of q and k: Sq and Sk, or the packed totals
  bool packed = false;
  Device on;  // where q is, and everything else must be
  Writes writes;

  explicit Arguments(const char* op) : writes(op), op_(op) {}

  // q, k, v with their packed offsets.
  void set_inputs(const TensorView& q, const TensorView& k, const TensorView& v,
                  const Optional& cu_q, const Optional& cu_k);

  // Where the keys of each sequence lie: k and v are caches when `lengths` are given. `extra` are
  // positions after the lengths that are written. On a device max_k becomes the capacity.
  void set_caches(const TensorView& k, const Optional& lengths, const Optional& rows,
                  const Optional& left_pad, const Optional& table, int64_t extra,
                  const char* lengths_name);
  void set_options(const Options& o, const MaskArgument& mask);

  // An array like q (`last` = dim) or like its results (`last` = value_dim), or like k or v.
  Operand rows(const TensorView& x, const char* name, bool keys, int64_t last, bool output);

  // lse or its gradient: (B, Hq, Sq) or (Hq, total).
  Operand row_statistics(const TensorView& x, const char* name, bool output);

  // One number per key: key_mass, its gradient, that of key_bias. Contiguous.
  void* key_statistics(const TensorView& x, const char* name, int64_t heads, bool output);
  void expect_like(const TensorView& x, const char* name, const TensorView& q) const;

  // The problem as CUDA kernels take it: in the place of offsets of packed sequences, their arrays.
  Problem on_device() const;
  cuda::Packed boundaries;

 private:
  void set_bias(const TensorView& x, bool cached);
  cuda::Boundaries boundaries_of(const TensorView& x, const char* name) const;

  // Entries past a sequence's pages may hold anything; the copies hold 0.
  void copy_table(const TensorView& table, int64_t pages, int64_t extra);

  const char* op_;
  std::shared_ptr<const MaskLists> mask_;
};

// (B, H, S, D), or (S, H, D) of packed sequences.
Operand operand(const TensorView& x, bool packed);
// The dtype of lse, key_bias and their like beside q of this dtype.
DType statistics(DType dtype);

}  // namespace pentad::attention
