// SPDX-License-Identifier: Apache-2.0
// Decoding and appending by the CUDA kernels, executed on the CPU lane by lane, against the
// definition: options, layouts, pages, widths, splits, each order of the lanes.
#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/attention_cache_cuda.h"
#include "attention_case.h"
#include "check.h"
#include "orders.h"

using namespace pentad;
using namespace pentad::attention;
using namespace pentad::attention::test;

namespace {

const CudaStream stream;

// The lists of a problem, as arrays in the device's memory, int32 or int64.
struct DeviceLists {
  std::vector<int64_t> wide[3];
  std::vector<int32_t> narrow[3], table;
  cuda::Caches caches;

  explicit DeviceLists(const Case& c) {
    const Problem& p = c.p;
    const std::vector<int64_t>* const lists[] = {&p.k_length, &p.cache_row, &p.left_pad};
    cuda::Integers* const targets[] = {&caches.lengths, &caches.rows, &caches.left_pad};
    for (int i = 0; i < 3; ++i) {
      if (lists[i]->empty()) continue;
      wide[i] = *lists[i];
      narrow[i].assign(wide[i].begin(), wide[i].end());
      const bool is_wide = chance(0.5);
      *targets[i] = {is_wide ? static_cast<const void*>(wide[i].data()) : narrow[i].data(), is_wide,
                     1};
    }
    caches.cache_rows = c.k.shape[0];
    caches.capacity = c.k.shape[2];
    if (!p.page_size) return;
    table = p.block_table;
    caches.table = table.data();
    caches.table_stride[0] = p.pages_per_sequence, caches.table_stride[1] = 1;
    caches.page_size = p.page_size, caches.pages_per_sequence = p.pages_per_sequence;
    caches.capacity = p.page_size * p.pages_per_sequence;
  }
};

// Calls decode with scratch memory of exactly the size it asks for.
void decode(const Case& c, const DeviceLists& lists, const Outputs& outputs) {
  const Problem& p = c.p;
  const int64_t bytes =
      cuda::decode_scratch(p.batch, p.heads, p.kv_heads, p.max_q, lists.caches.capacity,
                           p.value_dim, bytes_of(p.q.dtype));
  std::vector<float> scratch(bytes / 4, NAN);
  cuda::decode(stream, p, lists.caches, outputs, scratch.data());
}

double largest(const Array& x) {
  double most = 0;
  for (int64_t i = 0; i < x.size(); ++i)
    if (std::isfinite(x.value(i))) most = std::max(most, std::abs(x.value(i)));
  return most;
}

void compare(const char* what, const Case& c, const Array& got, const Array& expected,
             double allowed) {
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double a = got.value(i), b = expected.value(i);
    const bool close = a == b || (std::isnan(a) && std::isnan(b)) || std::abs(a - b) <= allowed;
    CHECK(close, what, static_cast<int>(c.p.q.dtype), c.options, "at", i, a, b, allowed);
    if (!close) return;
  }
}

// Cache positions in use, or all others, hold NaN; or one element does.
void poison(Case& c) {
  const Problem& p = c.p;
  if (chance(0.3)) {
    Array& x = chance(0.5) ? c.k : c.v;
    if (x.size() == 0) return;
    c.options += &x == &c.k ? " NaN key" : " NaN value";
    encode(x.at(pick(0, x.shape[0] - 1), pick(0, x.shape[1] - 1), pick(0, x.shape[2] - 1),
                pick(0, x.shape[3] - 1)),
           x.operand.dtype, NAN);
    return;
  }
  std::vector<bool> used(c.k.shape[0] * c.k.shape[2]);
  for (int64_t b = 0; b < p.batch; ++b)
    for (int64_t j = 0; j < p.k_length[b]; ++j) {
      int64_t row = p.cache_row.empty() ? b : p.cache_row[b];
      int64_t at = j + (p.left_pad.empty() ? 0 : p.left_pad[b]);
      if (p.page_size) {
        row = p.block_table[b * p.pages_per_sequence + j / p.page_size];
        at = j % p.page_size;
      }
      used[row * c.k.shape[2] + at] = true;
    }
  for (Array* x : {&c.k, &c.v})
    x->each([&](int64_t row, int64_t h, int64_t s, int64_t d) {
      if (!used[row * x->shape[2] + s]) encode(x->at(row, h, s, d), x->operand.dtype, NAN);
    });
}

void check_case(Case& c) {
  Problem& p = c.p;
  p.top_left = false;
  p.dropout = 0;
  if (p.k_length.empty()) return;  // no sequence at all
  poison(c);
  Array out = c.rows(false, p.value_dim, static_cast<int>(pick(0, Array::layouts - 1)));
  Array lse(chance(0.5) ? DType::f64 : DType::f32, p.batch, p.heads, p.max_q, 1);
  Array expected_out = out, expected_lse = lse;
  reference_forward(p, {expected_out.operand, expected_lse.operand, nullptr});
  const DeviceLists lists(c);
  // Results have 8 or 11 bits, and so has p before it meets the values.
  const double relative = p.q.dtype == DType::f32    ? 2e-5
                          : p.q.dtype == DType::bf16 ? 0x1p-7
                                                     : 0x1.8p-10;
  in_every_order([&] {
    Array got = out, got_lse = lse;
    decode(c, lists, {got.operand, got_lse.operand, nullptr});
    compare("out", c, got, expected_out, relative * std::max(largest(expected_out), 1.0));
    compare("lse", c, got_lse, expected_lse, 2e-5 * std::max(largest(expected_lse), 1.0));
  });
}

void random_cases() {
  for (int round = 0; round < 24; ++round)
    for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
      const int64_t dim = round % 6 == 5 ? 300 : round % 3 == 2 ? 200 : 70;
      check_case(*random_case(dtype, round % 2 ? 90 : 40, dim, true));
    }
}

// Keys (batch 1, in rows that copies can take 16 bytes of) of which none is hidden, or few.
std::unique_ptr<Case> plain_case(DType dtype, int64_t heads, int64_t queries, int64_t length,
                                 int64_t dim) {
  auto c = std::make_unique<Case>();
  Problem& p = c->p;
  p.batch = 1, p.heads = heads, p.kv_heads = 1, p.dim = p.value_dim = dim;
  p.max_q = queries, p.max_k = length, p.right = 0;
  p.scale = 1 / std::sqrt(static_cast<double>(dim));
  p.q.dtype = dtype;
  p.k_length = {length};
  c->cached = true;
  c->q = c->rows(false, dim, 0);
  c->k = {dtype, 1, 1, length + 3, dim, 0}, c->v = {dtype, 1, 1, length + 3, dim, 0};
  for (Array* x : {&c->q, &c->k, &c->v}) x->fill_normal();
  p.q = c->q.operand, p.k = c->k.operand, p.v = c->v.operand;
  c->options = " plain h" + std::to_string(heads) + " s" + std::to_string(queries) + "/" +
               std::to_string(length) + " d" + std::to_string(dim);
  return c;
}

void splits() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (int64_t dim : {64, 128, 256, 512}) check_case(*plain_case(dtype, 3, 2, 600, dim));
  check_case(*plain_case(DType::bf16, 16, 1, 1500, 64));
  check_case(*plain_case(DType::bf16, 17, 1, 300, 80));
  check_case(*plain_case(DType::f32, 1, 1, 1100, 32));
}

// The same bits in pages, whatever their size and order, and whatever capacity is left.
void pages() {
  for (DType dtype : {DType::f32, DType::bf16}) {
    auto c = plain_case(dtype, 4, 1, 700, 24);
    Array out = c->rows(false, 24, 0), lse = c->row_statistics(), paged_out = out, paged_lse = lse;
    decode(*c, DeviceLists(*c), {out.operand, lse.operand, nullptr});
    for (int64_t size : {1, 16, 48, 1000}) {
      const auto paged_case = plain_case(dtype, 4, 1, 700, 24);
      Case& paged = *paged_case;
      Problem& p = paged.p;
      const int64_t pages = 700 / size + 4;
      p.page_size = size, p.pages_per_sequence = pages;
      for (int64_t n = 0; n < pages; ++n) p.block_table.push_back(static_cast<int32_t>(n));
      std::shuffle(p.block_table.begin(), p.block_table.end(), generator);
      for (auto [to, from] : {std::pair{&paged.k, &c->k}, std::pair{&paged.v, &c->v}}) {
        *to = {dtype, pages, 1, size, 24, 0};
        for (int64_t j = 0; j < 700; ++j)
          std::memcpy(to->at(p.block_table[j / size], 0, j % size, 0), from->at(0, 0, j, 0),
                      24 * bytes_of(dtype));
      }
      p.q = c->q.operand, p.k = paged.k.operand, p.v = paged.v.operand;
      decode(paged, DeviceLists(paged), {paged_out.operand, paged_lse.operand, nullptr});
      CHECK(paged_out.memory == out.memory && paged_lse.memory == lse.memory, size);
    }
  }
}

// What is out of range gives NaN, of its own sequence alone, and touches nothing.
void bad_lists() {
  const int64_t big = int64_t{1} << 30;
  for (int what = 0; what < 7; ++what) {
    Case c;
    Problem& p = c.p;
    p.batch = 2, p.heads = p.kv_heads = p.max_q = 1, p.dim = p.value_dim = 8, p.max_k = 24;
    p.q.dtype = DType::f32;
    p.k_length = {5, 7};
    const bool paged = what >= 5;
    c.q = c.rows(false, 8, 0);
    c.k = c.v = {DType::f32, paged ? 6 : 2, 1, paged ? 8 : 24, 8, 0};
    for (Array* x : {&c.q, &c.k, &c.v}) x->fill_normal();
    p.q = c.q.operand, p.k = c.k.operand, p.v = c.v.operand;
    if (paged) p.page_size = 8, p.pages_per_sequence = 3, p.block_table = {0, 1, 2, 3, 4, 5};
    if (what == 0) p.k_length[1] = -1;
    if (what == 1) p.k_length[1] = big;
    if (what == 2) p.cache_row = {0, 2};
    if (what == 3) p.cache_row = {0, -1};
    if (what == 4) p.left_pad = {0, 18};
    if (what == 5) p.block_table[3] = 6;
    if (what == 6) p.block_table[3] = -7;
    const DeviceLists lists(c);
    Array out = c.rows(false, 8, 0), lse = c.row_statistics();
    decode(c, lists, {out.operand, lse.operand, nullptr});
    for (int64_t i = 0; i < 16; ++i) CHECK(std::isnan(out.value(i)) == (i >= 8), what, i);
    CHECK(std::isfinite(lse.value(0)) && std::isnan(lse.value(1)), what);
    Array fresh(DType::f32, 2, 1, 1, 8), k = c.k, v = c.v;
    fresh.fill_normal();
    cuda::append(stream, p, lists.caches, fresh.operand, fresh.operand, 1);
    for (auto [after, before] : {std::pair{&c.k, &k}, std::pair{&c.v, &v}}) {
      std::memcpy(before->at(0, 0, 5, 0), fresh.at(0, 0, 0, 0), 32);
      CHECK(after->memory == before->memory, what);
    }
  }
}

void append_cases() {
  for (int round = 0; round < 30; ++round) {
    const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
    const DType dtype = dtypes[round % 3];
    auto c = random_case(dtype, 60, 40, true);
    Problem& p = c->p;
    if (p.k_length.empty()) continue;
    if (!p.cache_row.empty())
      for (int64_t b = 0; b < p.batch; ++b) p.cache_row[b] = p.batch + 1 - b;
    const DeviceLists lists(*c);
    int64_t tokens = 100;
    for (int64_t b = 0; b < p.batch; ++b)
      tokens = std::min(
          tokens, lists.caches.capacity - p.k_length[b] - (p.left_pad.empty() ? 0 : p.left_pad[b]));
    Array k_new(dtype, p.batch, p.kv_heads, tokens, p.dim, round % Array::layouts);
    Array v_new(dtype, p.batch, p.kv_heads, tokens, p.value_dim);
    k_new.fill_normal(), v_new.fill_normal();
    Array k = c->k, v = c->v;
    Problem expected = p;
    expected.k = k.operand, expected.v = v.operand;
    append(expected, p.k_length, k_new.operand, v_new.operand, tokens);
    cuda::append(stream, p, lists.caches, k_new.operand, v_new.operand, tokens);
    CHECK(c->k.memory == k.memory && c->v.memory == v.memory, c->options, tokens);
  }
}

}  // namespace

int main() {
  random_cases();
  splits();
  pages();
  in_every_order(bad_lists);
  in_every_order(append_cases);
  return report();
}
