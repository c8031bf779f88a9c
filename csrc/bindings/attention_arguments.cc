// SPDX-License-Identifier: Apache-2.0
#include "bindings/attention_arguments.h"

#include <algorithm>
#include <cmath>

namespace pentad::attention {

// The copies that a BlockMask points into.
struct MaskLists {
  std::vector<int64_t> row_ptr, col_ptr;
  std::vector<int32_t> cols, kinds, rows, row_kinds;
  BlockMask mask;
};

namespace {

std::string text(const char* name) { return name; }

// --- Index arrays ----------------------------------------------------------------------------------

std::vector<int64_t> per_sequence(const Optional& view, int64_t batch, int64_t most, const char* op,
                                  const char* name) {
  if (!view) return {};
  std::vector<int64_t> copy = lists::integers(*view, op, name);
  expect_shape(*view, op, name, {batch});
  for (int64_t x : copy)
    if (x < 0 || x > most)
      bad_value(op, text(name) + " holds " + std::to_string(x) + ", expected 0 to " +
                        std::to_string(most));
  return copy;
}

int64_t longest(const std::vector<int64_t>& begin) {
  int64_t most = 0;
  for (size_t i = 1; i < begin.size(); ++i) most = std::max(most, begin[i] - begin[i - 1]);
  return most;
}

// --- Block masks -----------------------------------------------------------------------------------

template <class T>
std::vector<T> list(const TensorView& view) {
  const T* data = static_cast<const T*>(view.data);
  return {data, data + count(view)};
}

void check_mask(const MaskLists& lists, int64_t partials, const char* op) {
  const BlockMask& m = lists.mask;
  const int64_t entries = static_cast<int64_t>(lists.cols.size());
  const auto refuse = [&](const char* what) {
    bad_value(op, std::string("the block mask's ") + what + " out of order or out of range");
  };
  const auto check_pointers = [&](const std::vector<int64_t>& pointers, int64_t blocks,
                                  const char* what) {
    for (size_t i = 0; i < pointers.size(); ++i)
      if (pointers[i] < 0 || pointers[i] > entries ||
          (i % (blocks + 1) && pointers[i] < pointers[i - 1]))
        refuse(what);
  };
  check_pointers(lists.row_ptr, m.q_blocks, "row_ptr is");
  check_pointers(lists.col_ptr, m.k_blocks, "col_ptr is");
  for (int32_t kind : lists.kinds)
    if (kind < -1 || kind >= partials) refuse("kinds are");
  // Walking the rows must walk every column's list from its begin to its end.
  std::vector<int64_t> next(m.k_blocks);
  for (int64_t pair = 0; pair < m.batch * m.heads; ++pair) {
    const int64_t* row = m.row_ptr + pair * (m.q_blocks + 1);
    const int64_t* col = m.col_ptr + pair * (m.k_blocks + 1);
    std::copy(col, col + m.k_blocks, next.begin());
    for (int64_t i = 0; i < m.q_blocks; ++i)
      for (int64_t n = row[i]; n < row[i + 1]; ++n) {
        const int64_t j = m.cols[n];
        if (j < 0 || j >= m.k_blocks || (n > row[i] && j <= m.cols[n - 1])) refuse("cols are");
        const int64_t at = next[j]++;
        if (at >= col[j + 1] || m.rows[at] != i || m.row_kinds[at] != m.kinds[n])
          bad_value(op, "the block mask's lists by row and by column differ");
      }
    if (!std::equal(next.begin(), next.end(), col + 1))
      bad_value(op, "the block mask's lists by row and by column differ");
  }
}

std::shared_ptr<const MaskLists> mask_of(const MaskArgument& argument, const Problem& p,
                                         const char* op, Device on) {
  if (!argument.arrays[0]) return nullptr;
  const auto view = [&](int i) -> const TensorView& { return argument.arrays[i]->view; };
  auto lists = std::make_shared<MaskLists>();
  BlockMask& m = lists->mask;
  if (argument.q_block < 1 || argument.k_block < 1)
    bad_value(op, "the block mask's blocks have no size");
  m.q_block = argument.q_block;
  m.k_block = argument.k_block;
  m.q_blocks = p.max_q / m.q_block + (p.max_q % m.q_block != 0);
  m.k_blocks = p.max_k / m.k_block + (p.max_k % m.k_block != 0);
  const char* const names[] = {"row_ptr", "cols", "kinds", "col_ptr", "rows", "row_kinds"};
  for (int i = 0; i < 6; ++i) {
    expect(view(i), op, names[i], {i % 3 ? DType::i32 : DType::i64}, -1, on);
    if (!is_contiguous(view(i))) bad_value(op, text(names[i]) + " is not contiguous");
  }
  const TensorView& pointers = view(0);
  m.batch = pointers.rank == 3 ? pointers.shape[0] : 0;
  m.heads = pointers.rank == 3 ? pointers.shape[1] : 0;
  if ((m.batch != 1 && m.batch != p.batch) || (m.heads != 1 && m.heads != p.heads))
    bad_value(op, "row_ptr has shape " + shape_text(pointers) + ", expected (1 or " +
                      std::to_string(p.batch) + ", 1 or " + std::to_string(p.heads) + ", " +
                      std::to_string(m.q_blocks + 1) + ")");
  expect_shape(pointers, op, "row_ptr", {m.batch, m.heads, m.q_blocks + 1});
  expect_shape(view(3), op, "col_ptr", {m.batch, m.heads, m.k_blocks + 1});
  const int64_t entries = count(view(1));
  for (int i : {1, 2, 4, 5}) expect_shape(view(i), op, names[i], {entries});
  expect(view(6), op, "partial", {DType::u8}, 3, on);
  expect_shape(view(6), op, "partial", {view(6).shape[0], m.q_block, m.k_block});
  if (!is_contiguous(view(6))) bad_value(op, "partial is not contiguous");
  m.partial = static_cast<const uint8_t*>(view(6).data);
  if (on.is_cuda()) {
    m.row_ptr = static_cast<const int64_t*>(view(0).data);
    m.cols = static_cast<const int32_t*>(view(1).data);
    m.kinds = static_cast<const int32_t*>(view(2).data);
    return lists;
  }
  lists->row_ptr = list<int64_t>(view(0));
  lists->cols = list<int32_t>(view(1));
  lists->kinds = list<int32_t>(view(2));
  lists->col_ptr = list<int64_t>(view(3));
  lists->rows = list<int32_t>(view(4));
  lists->row_kinds = list<int32_t>(view(5));
  m.row_ptr = lists->row_ptr.data();
  m.cols = lists->cols.data();
  m.kinds = lists->kinds.data();
  m.col_ptr = lists->col_ptr.data();
  m.rows = lists->rows.data();
  m.row_kinds = lists->row_kinds.data();
  check_mask(*lists, view(6).shape[0], op);
  return lists;
}

}  // namespace

// --- The problem ---------------------------------------------------------------------------------

Operand operand(const TensorView& x, bool packed) {
  if (packed) return {x.data, x.dtype, {0, x.strides[1], x.strides[0], x.strides[2]}};
  return {x.data, x.dtype, {x.strides[0], x.strides[1], x.strides[2], x.strides[3]}};
}

DType statistics(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

void Arguments::set_inputs(const TensorView& q, const TensorView& k, const TensorView& v,
                           const Optional& cu_q, const Optional& cu_k) {
  Problem& p = problem;
  if (cu_q.has_value() != cu_k.has_value())
    bad_value(op_, "cu_seqlens_q and cu_seqlens_k are needed together");
  packed = cu_q.has_value();
  const int rank = packed ? 3 : 4;
  on = device_of(q);
  expect(q, op_, "q", {DType::f32, DType::bf16, DType::f16, DType::f64}, rank, on);
  expect_like(k, "k", q);
  expect_like(v, "v", q);
  const int heads = 1, tokens = packed ? 0 : 2, last = rank - 1;
  p.heads = q.shape[heads];
  p.kv_heads = k.shape[heads];
  p.dim = q.shape[last];
  p.value_dim = v.shape[last];
  q_tokens = q.shape[tokens];
  k_tokens = k.shape[tokens];
  if (p.dim < 1 || p.dim > kMaxDim || p.value_dim < 1 || p.value_dim > kMaxDim)
    bad_value(op_, "q and v have head_dim " + std::to_string(p.dim) + " and " +
                       std::to_string(p.value_dim) + ", expected 1 to " + std::to_string(kMaxDim));
  if (k.shape[last] != p.dim)
    bad_value(op_, "k has head_dim " + std::to_string(k.shape[last]) + " but q has " +
                       std::to_string(p.dim));
  if (p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads)
    bad_value(op_, "q has " + std::to_string(p.heads) +
                       " heads, which is no multiple of the heads of k, " +
                       std::to_string(p.kv_heads));
  for (int i = 0; i < last; ++i)
    if (v.shape[i] != k.shape[i])
      bad_value(op_, "v has shape " + shape_text(v) + ", which does not fit k's " + shape_text(k));
  p.q = operand(q, packed);
  p.k = operand(k, packed);
  p.v = operand(v, packed);
  if (packed) {
    boundaries = {boundaries_of(*cu_q, "cu_seqlens_q"), boundaries_of(*cu_k, "cu_seqlens_k")};
    if (!on.is_cuda()) {
      p.q_begin = lists::boundaries(*cu_q, q_tokens, op_, "cu_seqlens_q", "tokens");
      p.k_begin = lists::boundaries(*cu_k, k_tokens, op_, "cu_seqlens_k", "tokens");
    }
    if (cu_q->shape[0] != cu_k->shape[0])
      bad_value(op_, "cu_seqlens_q has " + std::to_string(cu_q->shape[0]) +
                         " entries but cu_seqlens_k has " + std::to_string(cu_k->shape[0]));
    p.batch = cu_q->shape[0] - 1;
    p.max_q = on.is_cuda() ? q_tokens : longest(p.q_begin);
    p.max_k = on.is_cuda() ? k_tokens : longest(p.k_begin);
  } else {
    p.batch = q.shape[0];
    p.max_q = q_tokens;
    p.max_k = k_tokens;
  }
  writes.input("q", q);
  writes.input("k", k);
  writes.input("v", v);
}

void Arguments::set_caches(const TensorView& k, const Optional& lengths, const Optional& rows,
                           const Optional& left_pad, const Optional& table, int64_t extra,
                           const char* lengths_name) {
  Problem& p = problem;
  if (!lengths) {
    if (rows || left_pad || table)
      bad_value(op_, "cache_rows, left_pad and block_table need lengths");
    if (!packed && k.shape[0] != p.batch)
      bad_value(op_, "k has batch " + std::to_string(k.shape[0]) + " but q has " +
                         std::to_string(p.batch));
    return;
  }
  if (packed) bad_value(op_, "cu_seqlens do not go with caches");
  int64_t capacity = k.shape[2];
  if (table) {
    if (rows || left_pad) bad_value(op_, "cache_rows and left_pad do not go with a block_table");
    expect(*table, op_, "block_table", {DType::i32}, 2, on);
    expect_shape(*table, op_, "block_table", {p.batch, table->shape[1]});
    if (k.shape[2] < 1 || table->shape[1] > kUnbounded / k.shape[2])
      bad_value(op_, "block_table has shape " + shape_text(*table) + " for pages of " +
                         std::to_string(k.shape[2]) + " rows");
    p.page_size = k.shape[2];
    p.pages_per_sequence = table->shape[1];
    capacity = p.page_size * p.pages_per_sequence;
  } else if (!rows && k.shape[0] != p.batch) {
    bad_value(
        op_, "k has batch " + std::to_string(k.shape[0]) + " but q has " + std::to_string(p.batch));
  }
  if (on.is_cuda()) {
    for (const auto& [list, name] :
         {std::pair{&lengths, lengths_name}, std::pair{&rows, "cache_rows"},
          std::pair{&left_pad, "left_pad"}}) {
      if (!*list) continue;
      expect(**list, op_, name, {DType::i32, DType::i64}, 1, on);
      expect_shape(**list, op_, name, {p.batch});
    }
    p.max_k = capacity;
    return;
  }
  p.k_length = per_sequence(lengths, p.batch, capacity, op_, lengths_name);
  p.cache_row = per_sequence(rows, p.batch, k.shape[0] - 1, op_, "cache_rows");
  p.left_pad = per_sequence(left_pad, p.batch, capacity, op_, "left_pad");
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t pad = p.left_pad.empty() ? 0 : p.left_pad[b];
    if (pad + p.k_length[b] + extra > capacity)
      bad_value(op_, "sequence " + std::to_string(b) + " needs " +
                         std::to_string(pad + p.k_length[b] + extra) +
                         " positions, but its cache has " + std::to_string(capacity));
  }
  if (table) copy_table(*table, k.shape[0], extra);
  p.max_k = p.batch ? *std::max_element(p.k_length.begin(), p.k_length.end()) : 0;
}

void Arguments::set_options(const Options& o, const MaskArgument& mask) {
  Problem& p = problem;
  const bool cached = !p.k_length.empty();
  const DType dtype = statistics(p.q.dtype);
  const double scale = o.scale ? *o.scale : std::pow(p.dim, -0.5);
  if (!std::isfinite(scale)) bad_value(op_, "scale is not finite");
  if (!(o.softcap >= 0) || !std::isfinite(o.softcap))
    bad_value(op_, "softcap is negative or not finite");
  if (o.left < -1 || o.right < -1)
    bad_value(op_, "window is (" + std::to_string(o.left) + ", " + std::to_string(o.right) +
                       "), expected -1 or more");
  p.scale = scale;
  p.softcap = o.softcap;
  p.left = o.left < 0 ? kUnbounded : std::min(o.left, kUnbounded);
  p.right = o.right < 0 ? kUnbounded : std::min(o.right, kUnbounded);
  p.top_left = o.top_left;
  if (!(o.dropout >= 0 && o.dropout < 1))
    bad_value(op_, "dropout is " + std::to_string(o.dropout) + ", expected 0 <= dropout < 1");
  p.dropout = o.dropout;
  if (o.seed) {
    expect(*o.seed, op_, "seed", {DType::i64}, -1);  // on the host
    if (count(*o.seed) != 1) bad_value(op_, "seed has shape " + shape_text(*o.seed));
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(o.seed->data));
  } else if (p.dropout > 0) {
    bad_value(op_, "dropout needs a seed");
  }
  if (o.bias) set_bias(*o.bias, cached);
  if (o.key_bias) {
    const TensorView& x = *o.key_bias;
    expect(x, op_, "key_bias", {dtype}, packed ? 2 : 3, on);
    const int heads = packed ? 0 : 1, keys = packed ? 1 : 2;
    const bool fits = (x.shape[heads] == p.heads || x.shape[heads] == p.kv_heads) &&
                      (packed || x.shape[0] == p.batch) &&
                      (cached ? x.shape[keys] >= p.max_k : x.shape[keys] == k_tokens);
    if (!fits)
      bad_value(op_, "key_bias has shape " + shape_text(x) + ", expected " +
                         (packed ? "(" : "(" + std::to_string(p.batch) + ", ") +
                         std::to_string(p.heads) +
                         (p.heads == p.kv_heads ? "" : " or " + std::to_string(p.kv_heads)) + ", " +
                         std::to_string(cached ? p.max_k : k_tokens) + ")");
    p.key_bias = x.data;
    p.key_bias_heads = x.shape[heads];
    p.key_bias_stride[0] = packed ? 0 : x.strides[0];
    p.key_bias_stride[1] = x.strides[heads];
    p.key_bias_stride[2] = x.strides[keys];
  }
  if (o.alibi) {
    const TensorView& x = *o.alibi;
    expect(x, op_, "alibi_slopes", {dtype}, -1, on);
    if (x.rank == 2) expect_shape(x, op_, "alibi_slopes", {p.batch, p.heads});
    else expect_shape(x, op_, "alibi_slopes", {p.heads});
    p.alibi = x.data;
    p.alibi_stride[0] = x.rank == 2 ? x.strides[0] : 0;
    p.alibi_stride[1] = x.strides[x.rank - 1];
  }
  if (o.sink) {
    expect(*o.sink, op_, "sink", {dtype}, 1, on);
    expect_shape(*o.sink, op_, "sink", {p.heads});
    if (!is_contiguous(*o.sink)) bad_value(op_, "sink is not contiguous");
    p.sink = o.sink->data;
  }
  if (mask.arrays[0]) {
    if (packed || cached) bad_value(op_, "a block mask does not go with cu_seqlens or caches");
    mask_ = mask_of(mask, p, op_, on);
    p.mask = &mask_->mask;
  }
  writes.input("bias", o.bias);
  writes.input("key_bias", o.key_bias);
  writes.input("alibi_slopes", o.alibi);
  writes.input("sink", o.sink);
  writes.input("seed", o.seed);
}

Operand Arguments::rows(const TensorView& x, const char* name, bool keys, int64_t last,
                        bool output) {
  const Problem& p = problem;
  expect(x, op_, name, {p.q.dtype}, packed ? 3 : 4, on);
  const int64_t heads = keys ? p.kv_heads : p.heads, tokens = keys ? k_tokens : q_tokens;
  if (packed) expect_shape(x, op_, name, {tokens, heads, last});
  else expect_shape(x, op_, name, {p.batch, heads, tokens, last});
  if (output) writes.output(name, x);
  else writes.input(name, x);
  return operand(x, packed);
}

Operand Arguments::row_statistics(const TensorView& x, const char* name, bool output) {
  const Problem& p = problem;
  if (p.q.dtype == DType::f64) expect(x, op_, name, {DType::f64}, packed ? 2 : 3, on);
  else expect(x, op_, name, {DType::f32, DType::f64}, packed ? 2 : 3, on);
  if (packed) expect_shape(x, op_, name, {p.heads, q_tokens});
  else expect_shape(x, op_, name, {p.batch, p.heads, q_tokens});
  if (output && !is_contiguous(x)) bad_value(op_, text(name) + " is not contiguous");
  if (output) writes.output(name, x);
  else writes.input(name, x);
  if (packed) return {x.data, x.dtype, {0, x.strides[0], x.strides[1], 0}};
  return {x.data, x.dtype, {x.strides[0], x.strides[1], x.strides[2], 0}};
}

void* Arguments::key_statistics(const TensorView& x, const char* name, int64_t heads, bool output) {
  const Problem& p = problem;
  expect(x, op_, name, {statistics(p.q.dtype)}, packed ? 2 : 3, on);
  if (!p.k_length.empty()) bad_value(op_, text(name) + " does not go with caches");
  if (packed) expect_shape(x, op_, name, {heads, k_tokens});
  else expect_shape(x, op_, name, {p.batch, heads, k_tokens});
  if (!is_contiguous(x)) bad_value(op_, text(name) + " is not contiguous");
  if (output) writes.output(name, x);
  else writes.input(name, x);
  return x.data;
}

void Arguments::expect_like(const TensorView& x, const char* name, const TensorView& q) const {
  expect(x, op_, name, {DType::f32, DType::bf16, DType::f16, DType::f64}, q.rank, on);
  if (x.dtype != q.dtype)
    throw TypeMismatch("[" + text(op_) + "] " + name + " has dtype " + dtype_name(x.dtype) +
                       " but q has " + dtype_name(q.dtype));
}

cuda::Boundaries Arguments::boundaries_of(const TensorView& x, const char* name) const {
  expect(x, op_, name, {DType::i32, DType::i64}, 1, on);
  if (x.shape[0] < 1) bad_value(op_, text(name) + " does not begin with 0");
  return {x.data, x.dtype == DType::i64, x.strides[0]};
}

Problem Arguments::on_device() const {
  Problem p = problem;
  if (packed) {
    p.q_begin.clear();
    p.k_begin.clear();
    p.max_q = q_tokens;
    p.max_k = k_tokens;
  }
  return p;
}

void Arguments::set_bias(const TensorView& x, bool cached) {
  Problem& p = problem;
  expect(x, op_, "bias", {DType::f32, DType::bf16, DType::f16, DType::f64, DType::boolean}, 4, on);
  if (x.dtype == DType::f64 && problem.q.dtype != DType::f64)
    throw TypeMismatch("[" + std::string(op_) +
                       "] bias has dtype float64, which goes with float64 arrays alone");
  if (packed) bad_value(op_, "bias does not go with cu_seqlens");
  const int64_t full[] = {p.batch, p.heads, p.max_q, p.max_k};
  p.bias = {x.data, x.dtype, {}};
  for (int i = 0; i < 4; ++i) {
    const bool fits = x.shape[i] == full[i] || (i == 3 && cached && x.shape[i] > full[i]);
    if (!fits && x.shape[i] != 1)
      bad_value(op_, "bias has shape " + shape_text(x) + ", which does not broadcast to (" +
                         std::to_string(p.batch) + ", " + std::to_string(p.heads) + ", " +
                         std::to_string(p.max_q) + ", " + std::to_string(p.max_k) + ")");
    p.bias.stride[i] = x.shape[i] == 1 ? 0 : x.strides[i];
  }
}

void Arguments::copy_table(const TensorView& table, int64_t pages, int64_t extra) {
  Problem& p = problem;
  p.block_table.assign(p.batch * p.pages_per_sequence, 0);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t used = (p.k_length[b] + extra + p.page_size - 1) / p.page_size;
    for (int64_t n = 0; n < used; ++n) {
      const int32_t page =
          static_cast<const int32_t*>(table.data)[b * table.strides[0] + n * table.strides[1]];
      if (page < 0 || page >= pages)
        bad_value(op_, "block_table holds page " + std::to_string(page) + ", but there are " +
                           std::to_string(pages));
      p.block_table[b * p.pages_per_sequence + n] = page;
    }
  }
}

}  // namespace pentad::attention
