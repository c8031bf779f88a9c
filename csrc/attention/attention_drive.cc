// SPDX-License-Identifier: Apache-2.0
#include "attention/attention_drive.h"

#include <cmath>

#include "common/isa.h"

namespace pentad::attention {

const Kernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v2: return v2::attention_kernels;
    case Isa::v3: return v3::attention_kernels;
    case Isa::v4: return v4::attention_kernels;
    default: return v4x::attention_kernels;
#else
    default: return neon::attention_kernels;
#endif
  }
}

void for_tasks(const Problem& p, int64_t tasks, const std::function<void(int64_t)>& task) {
  constexpr int64_t kSmall = 1 << 18;  // multiply-adds
  const int64_t pairs = p.batch * p.heads * p.max_q * std::max<int64_t>(1, p.max_k);
  if (pairs * (p.dim + p.value_dim) > kSmall) return parallel_for(tasks, task);
  for (int64_t i = 0; i < tasks; ++i) task(i);
}

namespace {

const void* element(const Operand& x, int64_t index) {
  return static_cast<const char*>(x.data) + index * size_of(x.dtype);
}

// Of the element (b, h, i, 0) of a query-side operand.
int64_t row_index(const Problem& p, const Operand& x, int64_t b, int64_t h, int64_t i) {
  const int64_t first = p.q_begin.empty() ? b * x.stride[0] : p.q_begin[b] * x.stride[2];
  return first + h * x.stride[1] + i * x.stride[2];
}

// A mask's lists for one (batch, head): the same entry for all where it has only one.
int64_t mask_plane(const BlockMask& mask, int64_t b, int64_t h) {
  return (mask.batch == 1 ? 0 : b) * mask.heads + (mask.heads == 1 ? 0 : h);
}

// Whether some query of [first, last] has some key of [key_begin, key_end) outside its window.
bool crosses_window(const Problem& p, int64_t b, int64_t first, int64_t last, int64_t key_begin,
                    int64_t key_end) {
  const int64_t offset = p.offset(b);
  return last + offset - p.left > key_begin || first + offset + p.right < key_end - 1;
}

}  // namespace

const void* q_at(const Problem& p, const Operand& x, int64_t b, int64_t h, int64_t i) {
  return element(x, row_index(p, x, b, h, i));
}

const void* k_at(const Problem& p, const Operand& x, int64_t b, int64_t kv_head, int64_t j) {
  int64_t at = kv_head * x.stride[1];
  if (!p.k_begin.empty()) {
    at += (p.k_begin[b] + j) * x.stride[2];
  } else if (p.page_size) {  // left_pad does not go with pages
    at += p.block_table[b * p.pages_per_sequence + j / p.page_size] * x.stride[0] +
          j % p.page_size * x.stride[2];
  } else {
    if (!p.left_pad.empty()) j += p.left_pad[b];
    at += (p.cache_row.empty() ? b : p.cache_row[b]) * x.stride[0] + j * x.stride[2];
  }
  return element(x, at);
}

Rows q_rows(const Problem& p, const Operand& x, int64_t b, int64_t h, int64_t first, int64_t count,
            int64_t dim) {
  return {q_at(p, x, b, h, first), nullptr, x.dtype, x.stride[2], x.stride[3], count, dim};
}

double row_statistic(const Problem& p, const Operand& x, int64_t b, int64_t h, int64_t i) {
  const int64_t at = row_index(p, x, b, h, i);
  return x.dtype == DType::f64 ? static_cast<const double*>(x.data)[at]
                               : static_cast<const float*>(x.data)[at];
}

void set_row_statistic(const Problem& p, const Operand& x, int64_t b, int64_t h, int64_t i,
                       double value) {
  const int64_t at = row_index(p, x, b, h, i);
  if (x.dtype == DType::f64) static_cast<double*>(x.data)[at] = value;
  else static_cast<float*>(x.data)[at] = static_cast<float>(value);
}

LogSum log_sum(double lse) {
  const double exact = lse * kLog2e;
  const float high = static_cast<float>(exact);
  return {high, std::isfinite(high) ? static_cast<float>(exact - high) : 0.0f};
}

KeyRange visible_keys(const Problem& p, int64_t b) {
  const int64_t offset = p.offset(b);
  return {std::max<int64_t>(0, offset - p.left),
          std::min(p.k_len(b), p.q_len(b) - 1 + offset + p.right + 1)};
}

Rule rule_of(const Problem& p, int64_t b, int64_t h) {
  Rule rule{};
  rule.scale = static_cast<float>(p.scale);
  rule.softcap = static_cast<float>(p.softcap);
  if (p.bias.data) {
    rule.bias = element(p.bias, b * p.bias.stride[0] + h * p.bias.stride[1]);
    rule.bias_dtype = p.bias.dtype;
    rule.bias_q = p.bias.stride[2];
    rule.bias_k = p.bias.stride[3];
  }
  if (p.key_bias) {
    const int64_t head = p.key_bias_heads == p.heads ? h : h / p.group();
    const int64_t first =
        p.k_begin.empty() ? b * p.key_bias_stride[0] : p.k_begin[b] * p.key_bias_stride[2];
    rule.key_bias = static_cast<const float*>(p.key_bias) + first + head * p.key_bias_stride[1];
    rule.key_bias_k = p.key_bias_stride[2];
  }
  if (p.alibi) {
    rule.alibi = true;
    rule.slope = static_cast<const float*>(p.alibi)[b * p.alibi_stride[0] + h * p.alibi_stride[1]];
  }
  if (p.sink) {
    rule.has_sink = true;
    rule.sink = static_cast<const float*>(p.sink)[h];
  }
  rule.plain = rule.softcap == 0 && !rule.alibi && !rule.key_bias && rule.scale > 1e-30f &&
               (!rule.bias || rule.bias_dtype == DType::boolean);
  rule.drop_below = static_cast<uint64_t>(p.dropout * 0x1p32);
  rule.keep_scale = static_cast<float>(1.0 / (1.0 - p.dropout));
  rule.seed = p.seed;
  rule.stream = static_cast<uint32_t>(p.first_stream + b * p.heads + h);
  rule.offset = p.offset(b);
  rule.left = p.left;
  rule.right = p.right;
  return rule;
}

Shape::Shape(const Problem& p) {
  bf16 = p.q.dtype == DType::bf16 && kernels().dot_bf16;
  units = bf16 ? ceil_div(p.dim, 2) : p.dim;
  value_units = bf16 ? ceil_div(p.value_dim, 2) : p.value_dim;
  width = padded(p.dim, kernels().lanes);
  value_width = padded(p.value_dim, kernels().lanes);
  key_rows = bf16 ? kTile / 2 : kTile;
}

bool is_packed(const Operand& x, int64_t dim) {
  return x.dtype == DType::f32 && x.stride[3] == 1 && x.stride[2] == dim &&
         dim % kernels().lanes == 0;
}

// --- Packed keys ----------------------------------------------------------------------------------

PackedKeys::PackedKeys(const Problem& problem, const Shape& shape, int forms, bool one_at_a_time)
    : problem_(problem),
      shape_(shape),
      forms_(forms),
      one_at_a_time_(one_at_a_time),
      first_tile_(problem.batch + 1) {
  int64_t longest = 0;
  for (int64_t b = 0; b < problem.batch; ++b) {
    const int64_t tiles = ceil_div(problem.k_len(b), kTile);
    first_tile_[b + 1] = first_tile_[b] + tiles;
    longest = std::max(longest, tiles);
  }
  // Pairs of f32 are used where they lie, if they lie well; caches may have pages.
  if (problem.k_length.empty()) {
    if (is_packed(problem.v, problem.value_dim)) forms_ &= ~v_pairs;
    if (is_packed(problem.k, problem.dim)) forms_ &= ~k_pairs;
  }
  const int64_t room = one_at_a_time ? longest : first_tile_.back() * problem.kv_heads;
  for (int i = 0; i < 4; ++i)
    if (forms_ >> i & 1) buffers_[i] = Scratch<float>(room * tile_size(1 << i));
}

int64_t PackedKeys::tile_size(int form) const {
  switch (form) {
    case k_lanes: return shape_.units * kTile;
    case v_lanes: return shape_.value_units * kTile;
    case k_pairs: return shape_.width * shape_.key_rows;
    default: return shape_.value_width * shape_.key_rows;
  }
}

const float* PackedKeys::get(int form, int64_t b, int64_t kv_head) const {
  if (!(forms_ & form))
    return static_cast<const float*>(
        k_at(problem_, form == k_pairs ? problem_.k : problem_.v, b, kv_head, 0));
  const int64_t first =
      one_at_a_time_ ? 0 : first_tile_[b] * problem_.kv_heads + kv_head * tiles(b);
  return buffers_[__builtin_ctz(form)].get() + first * tile_size(form);
}

void PackedKeys::pack(int64_t b, int64_t kv_head, int64_t tile) {
  const KeyRange keys = visible_keys(problem_, b);
  if ((tile + 1) * kTile <= keys.begin || tile * kTile >= keys.end) return;  // nobody will look
  const int64_t first = tile * kTile, count = std::min<int64_t>(kTile, problem_.k_len(b) - first);
  const void* each[kTile];
  for (int form = k_lanes; form <= k_pairs; form <<= 1) {
    if (!(forms_ & form)) continue;
    const bool is_key = form == k_lanes || form == k_pairs;
    const Operand& x = is_key ? problem_.k : problem_.v;
    const bool paged = problem_.page_size != 0;
    if (paged)
      for (int64_t j = 0; j < count; ++j) each[j] = k_at(problem_, x, b, kv_head, first + j);
    const Rows rows = {k_at(problem_, x, b, kv_head, first),
                       paged ? each : nullptr,
                       x.dtype,
                       x.stride[2],
                       x.stride[3],
                       count,
                       is_key ? problem_.dim : problem_.value_dim};
    float* out = const_cast<float*>(get(form, b, kv_head)) + tile * tile_size(form);
    if (form == k_lanes || form == v_lanes) kernels().pack_lanes(rows, shape_.bf16, out);
    else kernels().pack_pairs(rows, shape_.bf16, out);
  }
}

void PackedKeys::pack_one(int64_t b, int64_t kv_head) {
  for (int64_t tile = 0; tile < tiles(b); ++tile) pack(b, kv_head, tile);
}

void PackedKeys::pack_all() {
  for_tasks(problem_, first_tile_.back() * problem_.kv_heads, [&](int64_t task) {
    const int64_t kv_head = task % problem_.kv_heads, tile = task / problem_.kv_heads;
    const int64_t b =
        std::upper_bound(first_tile_.begin(), first_tile_.end(), tile) - first_tile_.begin() - 1;
    pack(b, kv_head, tile - first_tile_[b]);
  });
}

// --- Who meets whom -------------------------------------------------------------------------------

std::vector<QueryBlock> query_blocks(const Problem& p, int64_t most) {
  std::vector<QueryBlock> blocks;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = p.q_len(b);
    if (length == 0) continue;
    const int64_t unit = p.mask ? p.mask->q_block : length;
    for (int64_t h = 0; h < p.heads; ++h)
      // Later queries see more keys under a causal mask.
      for (int64_t outer = (length - 1) / unit; outer >= 0; --outer) {
        const int64_t begin = outer * unit, end = std::min(length, begin + unit);
        // Blocks of the same size, in whole groups of rows.
        const int64_t count = ceil_div(end - begin, most);
        const int64_t size = std::min(most, padded(ceil_div(end - begin, count), 6));
        for (int64_t i = (end - begin - 1) / size; i >= 0; --i) {
          const int64_t first = begin + i * size;
          blocks.push_back({b, h, first, std::min(size, end - first)});
        }
      }
  }
  return blocks;
}

void spans_of(const Problem& p, const QueryBlock& block, int64_t tile_begin, int64_t tile_end,
              std::vector<Span>& spans) {
  spans.clear();
  const int64_t b = block.b, offset = p.offset(b);
  const int64_t last = block.first + block.rows - 1;
  const int64_t low = std::max({int64_t{0}, tile_begin * kTile, block.first + offset - p.left});
  const int64_t high = std::min({p.k_len(b), tile_end * kTile, last + offset + p.right + 1});
  const auto add = [&](int64_t begin, int64_t end, const uint8_t* partial, int64_t origin,
                       int64_t step) {
    for (begin = std::max(begin, low), end = std::min(end, high); begin < end;) {
      const int64_t tile = begin / kTile, stop = std::min(end, (tile + 1) * kTile);
      Span span = {tile,
                   static_cast<int>(begin - tile * kTile),
                   static_cast<int>(stop - tile * kTile),
                   false,
                   partial ? partial + (begin - origin) : nullptr,
                   step};
      // Neighbours within a tile that are both fully allowed become one.
      if (!spans.empty() && spans.back().tile == tile && spans.back().end == span.begin &&
          !spans.back().partial && !partial) {
        span.begin = spans.back().begin;
        spans.pop_back();
      }
      span.window = crosses_window(p, b, block.first, last, tile * kTile + span.begin,
                                   tile * kTile + span.end);
      spans.push_back(span);
      begin = stop;
    }
  };
  if (!p.mask) return add(low, high, nullptr, 0, 0);
  const BlockMask& mask = *p.mask;
  const int64_t row = block.first / mask.q_block;
  const int64_t* range = mask.row_ptr + mask_plane(mask, b, block.h) * (mask.q_blocks + 1) + row;
  for (int64_t n = range[0]; n < range[1]; ++n) {
    const int64_t origin = mask.cols[n] * mask.k_block;
    const uint8_t* partial = nullptr;
    if (mask.kinds[n] >= 0)
      partial = mask.partial +
                (mask.kinds[n] * mask.q_block + block.first - row * mask.q_block) * mask.k_block;
    add(origin, origin + mask.k_block, partial, origin, mask.k_block);
  }
}

void meetings_of(const Problem& p, int64_t b, int64_t h, int64_t tile,
                 std::vector<Meeting>& meetings) {
  meetings.clear();
  const int64_t length = p.q_len(b), offset = p.offset(b);
  const auto add = [&](int64_t q_begin, int64_t q_end, int64_t k_begin, int64_t k_end,
                       const uint8_t* partial, int64_t q_origin, int64_t k_origin, int64_t step) {
    q_begin = std::max({q_begin, int64_t{0}, k_begin - offset - p.right});
    q_end = std::min({q_end, length, k_end - offset + p.left});
    while (q_begin < q_end) {
      const int64_t first = q_begin / kTile * kTile, stop = std::min(q_end, first + kTile);
      const Span span = {
          tile,
          static_cast<int>(k_begin - tile * kTile),
          static_cast<int>(k_end - tile * kTile),
          crosses_window(p, b, q_begin, stop - 1, k_begin, k_end),
          partial ? partial + (q_begin - q_origin) * step + (k_begin - k_origin) : nullptr,
          step};
      meetings.push_back(
          {first, std::min<int64_t>(kTile, length - first), q_begin - first, stop - first, span});
      q_begin = stop;
    }
  };
  const int64_t low = tile * kTile, high = std::min(p.k_len(b), low + kTile);
  if (!p.mask) return add(0, length, low, high, nullptr, 0, 0, 0);
  const BlockMask& mask = *p.mask;
  for (int64_t column = low / mask.k_block; column * mask.k_block < high; ++column) {
    const int64_t k_origin = column * mask.k_block;
    const int64_t k_begin = std::max(low, k_origin),
                  k_end = std::min(high, k_origin + mask.k_block);
    const int64_t* range = mask.col_ptr + mask_plane(mask, b, h) * (mask.k_blocks + 1) + column;
    for (int64_t n = range[0]; n < range[1]; ++n) {
      const int64_t q_origin = mask.rows[n] * mask.q_block;
      const uint8_t* partial = mask.row_kinds[n] < 0
                                   ? nullptr
                                   : mask.partial + mask.row_kinds[n] * mask.q_block * mask.k_block;
      add(q_origin, q_origin + mask.q_block, k_begin, k_end, partial, q_origin, k_origin,
          mask.k_block);
    }
  }
}

}  // namespace pentad::attention
