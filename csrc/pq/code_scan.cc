// SPDX-License-Identifier: Apache-2.0
// Drives the search over codes: byte tables from cost tables, chunks of blocks that stay in cache,
// bounds by the level's kernels, and the exact costs of the rows that pass.
#include "pq/code_scan.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "common/aligned.h"
#include "common/ceil_div.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "pq/code_scan_drive.h"

namespace pentad::pq {
const CodeScanKernels& code_scan_kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::code_scan_kernels;
    case Isa::v4: return v4::code_scan_kernels;
    case Isa::v3: return v3::code_scan_kernels;
    default: return v2::code_scan_kernels;
#else
    default: return neon::code_scan_kernels;
#endif
  }
}

namespace {

constexpr int64_t kChunkBytes = 128 << 10;  // of blocks: half of a small L2 cache
constexpr int64_t kTurnedBytes = 1 << 20;   // where tables are turned for each chunk
constexpr int64_t kQueryGroup = 256;        // queries that share one pass over the codes
constexpr int64_t kMostBounded = 256;       // subspaces whose sums of bytes stay below 2^16
constexpr int64_t kSumBlocks = 32;          // whose sums are kept
constexpr int64_t kRangesGroup = 4;         // queries of one task, where each visits its own rows
constexpr float kInfinity = std::numeric_limits<float>::infinity();

const CodeScanKernels& kernels() { return code_scan_kernels(); }

// Whether bound8 turns tables, which pays over more codes than a chunk of others has.
bool takes_lanes(const Layout& layout, int64_t used, int64_t queries) {
  constexpr int64_t kMost = 256;  // subspaces: 4 MiB of tables at most
  return layout.nbits == 8 && kernels().lanes8 && used <= kMost && queries * 8 >= kernels().lanes8;
}

int64_t padded(int64_t subspaces) { return ceil_div(subspaces, int64_t{8}) * 8; }

// --- Results -------------------------------------------------------------------------------------

// The k least hits seen, or all within a radius: a reservoir, which is cut to the k least when it
// is full; then their last is the limit.
class Found {
 public:
  void search_best(int64_t k) {
    k_ = k;
    capacity_ = k + k / 2 + 16;
  }
  void search_radius(float radius) { limit_ = key_from_float(radius + 0.0f); }

  // Whether `limit` excludes anything yet.
  bool limited() const { return k_ == 0 || limit_ != kNone; }
  // Costs above it cannot be results.
  float limit() const { return float_from_key(limit_); }

  void offer(float cost, int64_t id) {
    const uint32_t key = key_from_float(cost + 0.0f);  // -0 becomes 0
    if (key > limit_) return;
    hits_.push_back({key, id});
    if (k_ && static_cast<int64_t>(hits_.size()) >= capacity_) cut();
  }

  // After a chunk: the first limit, as soon as there are k hits.
  void settle() {
    if (!limited() && static_cast<int64_t>(hits_.size()) >= k_) cut();
  }
  std::vector<Hit>& hits() { return hits_; }

 private:
  void cut() {
    std::nth_element(hits_.begin(), hits_.begin() + (k_ - 1), hits_.end());
    hits_.resize(k_);
    limit_ = hits_.back().key;
  }

  static constexpr uint32_t kNone = ~uint32_t{0};  // no cost has this key
  std::vector<Hit> hits_;
  int64_t k_ = 0, capacity_ = 0;
  uint32_t limit_ = kNone;
};

// --- One query -----------------------------------------------------------------------------------

struct Query {
  const float* table = nullptr;  // (used, K)
  float offset = 0;
  Found* found = nullptr;

  std::vector<float> least;  // of each subspace's table
  double base = 0;           // their sum
  double spans = 0;          // sum of most - least
  double group_span = 0;     // the largest such sum of kByteGroup subspaces
  double span = 0;           // the largest of one
  double size = 0;           // sum of the largest |T|
  double error = 0;          // of the float32 sum, at most
  double step = 0;           // of the byte tables
  double budget = 0;         // what a row's sum may have above `base`
  uint8_t* bytes = nullptr;  // [padded used][K]
};

constexpr uint32_t kMostBound = 65535;  // of a cost that may be as high or higher

// Rows by the integer bounds of their costs.
struct Bounded {
  std::vector<uint16_t> bound;
  std::vector<int64_t> row, range;
  int64_t size = 0;

  void clear() { size = 0; }
  void reserve(int64_t count) {
    if (count <= static_cast<int64_t>(bound.size())) return;
    bound.resize(count), row.resize(count), range.resize(count);
  }
  void push(uint32_t b, int64_t r, int64_t i) {
    bound[size] = static_cast<uint16_t>(b), row[size] = r, range[size++] = i;
  }

  // Drops what lies more than `margin` above the k-th bound; the largest bound that stays.
  uint32_t cut(int64_t k, double margin) {
    if (size <= k) return kMostBound;
    // By bisection: a vector counts faster than a selection moves, 0.2 us for 400 bounds.
    uint32_t low = 0, high = kMostBound;  // the k-th is in [low, high]
    while (low < high) {
      const uint32_t middle = (low + high) / 2;
      if (count_up_to(static_cast<uint16_t>(middle)) >= k) high = middle;
      else low = middle + 1;
    }
    if (low == kMostBound) return low;
    const auto limit = static_cast<uint32_t>(std::min<double>(low + margin, kMostBound));
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      bound[kept] = bound[i], row[kept] = row[i], range[kept] = range[i];
      kept += bound[i] <= limit;
    }
    size = kept;
    return limit;
  }

 private:
  int64_t count_up_to(uint16_t most) const {
    constexpr int64_t kStep = 1 << 14;  // that a count of 16 bits holds
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += kStep) {
      uint16_t part = 0;
      const uint16_t* b = bound.data() + i;
      const int64_t n = std::min(kStep, size - i);
      for (int64_t j = 0; j < n; ++j) part = static_cast<uint16_t>(part + (b[j] <= most));
      count += part;
    }
    return count;
  }
};

// Bounds and exact costs of rows, for a group of queries that share the rows.
class Scanner {
 public:
  Scanner(const Database& database, int64_t used, int64_t queries)
      : database_(database),
        layout_(database.blocks.layout),
        used_(used),
        queries_(queries),
        pass_stride_(std::max<int64_t>(
            1, (takes_lanes(layout_, used, queries) ? kTurnedBytes : kChunkBytes) /
                   layout_.block_bytes())),
        bytes_(aligned_buffer<uint8_t>(queries * padded(used) * layout_.entries())),
        pass_(aligned_buffer<uint64_t>(queries * pass_stride_)),
        limits_(queries),
        steps_(queries),
        bases_(queries),
        mosts_(queries),
        tables_(queries) {
    std::fill_n(bytes_.get(), queries * padded(used) * layout_.entries(), uint8_t{0});
    if (layout_.nbits == 4 && kernels().saturates4)
      scratch_ = aligned_buffer<uint8_t>(kScratchBlocks * padded(used) * kBlockRows);
    if (takes_lanes(layout_, used, queries))
      scratch_ = aligned_buffer<uint8_t>(used * layout_.entries() * kernels().lanes8);
    for (int64_t q = 0; q < queries; ++q) {
      queries_[q].bytes = bytes_.get() + q * padded(used) * layout_.entries();
      queries_[q].least.resize(used);
      tables_[q] = queries_[q].bytes;
    }
  }

  void set(int64_t q, const float* table, float offset, Found* found) {
    Query& query = queries_[q];
    query.offset = offset;
    query.found = found;
    if (query.table != table) measure(query, table);
    // (used + 1) roundings of partial sums of at most this size, twice over. Where a sum, or what
    // is above the least entry, might overflow, nothing is excluded.
    const double most = query.size + std::fabs(offset);
    query.error = most + query.size < std::numeric_limits<float>::max()
                      ? most * static_cast<double>(used_ + 2) * 0x1p-23
                      : std::numeric_limits<double>::infinity();
  }

  // Whether scan_ranges can serve the ranges of a query with this table, and of these offsets.
  bool bounds_all(const float* table, float largest_offset) {
    if (database_.bias || used_ > kMostBounded) return false;
    set(0, table, largest_offset, nullptr);
    const Query& query = queries_[0];
    return query.error < std::numeric_limits<double>::infinity();
  }

  // Offers the rows of `count` ranges to one query whose table is set. All bounds come first, in
  // units of one fixed step: a row's cost is at least `base + least + step * bound` and less than
  // `used + 2` steps above, so the k-th bound says which rows may be among the k best, and only
  // those are settled.
  //
  // 256 queries, each 32 lists of 250 rows of M 32 4 bits, k 80, one thread: 6.3 ms where limits
  // follow the settled costs from list to list, 4.3 ms so. (A selection by nth_element instead of
  // counting: 6.7 ms.)
  void scan_ranges(const int64_t* begin, const int64_t* end, const float* offset, int64_t count,
                   int64_t k, const std::vector<uint64_t>& live, Found* found) {
    Query& query = queries_[0];
    float least = kInfinity;
    for (int64_t i = 0; i < count; ++i)
      if (end[i] > begin[i]) least = std::min(least, offset ? offset[i] : 0.0f);
    const bool saturates = layout_.nbits != 4 || kernels().saturates4;
    quantize(query, (saturates ? query.group_span : query.span) / 255);
    const double margin = static_cast<double>(used_) + 3 + std::ceil(2 * query.error / query.step);
    uint32_t limit = kMostBound;
    int64_t capacity = k + 128;
    bounded_.clear();
    for (int64_t i = 0; i < count; ++i) {
      const double above = (offset ? static_cast<double>(offset[i]) - least : 0) / query.step;
      if (end[i] == begin[i] || !(above <= limit)) continue;
      const auto from = static_cast<uint32_t>(above);
      for (int64_t b = begin[i] / kBlockRows; b * kBlockRows < end[i] && from <= limit;) {
        const int64_t step = std::min(kSumBlocks, pass_stride_);
        const int64_t stop = std::min(b + step, ceil_div(end[i], kBlockRows));
        limits_[0] = limit == kMostBound ? limit : limit - from;
        bound(b, stop, live, sums_);
        bounded_.reserve(capacity + kSumBlocks * kBlockRows);
        for (int64_t at = b; at < stop; ++at) {
          uint64_t bits = pass_[at - b];
          if (!live.empty()) bits &= live[at];
          if (const int64_t left = end[i] - at * kBlockRows; left < kBlockRows)
            bits &= (uint64_t{1} << left) - 1;
          const uint16_t* sums = sums_ + (at - b) * kBlockRows;
          for (; bits; bits &= bits - 1) {
            const int r = __builtin_ctzll(bits);
            bounded_.push(std::min(sums[r] + from, kMostBound), at * kBlockRows + r, i);
          }
        }
        b = stop;
        if (bounded_.size < capacity) continue;
        limit = bounded_.cut(k, margin);
        capacity = std::max(capacity, bounded_.size + 128);
      }
    }
    bounded_.cut(k, margin);
    settle_bounded(offset, found);
  }

  // Offers the rows [first, last) of the database to all queries; first is a multiple of 64.
  void scan(int64_t first, int64_t last, const std::vector<uint64_t>& live) {
    // Of blocks: small while the limits fall fast.
    int64_t step = queries_[0].found->limited() ? pass_stride_ : 1;
    for (int64_t b = first / kBlockRows; b * kBlockRows < last;) {
      const int64_t end = std::min(b + step, ceil_div(last, kBlockRows));
      chunk(b, end, last, live);
      b = end;
      step = std::min(2 * step, pass_stride_);
    }
  }

 private:
  void measure(Query& query, const float* table) {
    query.table = table;
    query.step = 0;
    query.base = query.spans = query.span = query.group_span = query.size = 0;
    double group = 0;
    for (int64_t m = 0; m < used_; ++m) {
      float least, most;
      kernels().extent(table + m * layout_.entries(), layout_.entries(), &least, &most);
      query.least[m] = least;
      const double span = static_cast<double>(most) - least;
      query.base += least;
      query.spans += span;
      query.span = std::max(query.span, span);
      group = m % kByteGroup ? group + span : span;
      query.group_span = std::max(query.group_span, group);
      query.size += std::max(std::fabs(least), std::fabs(most));
    }
  }

  void settle_bounded(const float* offset, Found* found) {
    queries_[0].found = found;
    rows_.assign(bounded_.row.begin(), bounded_.row.begin() + bounded_.size);
    starts_.resize(rows_.size());
    for (int64_t i = 0; i < bounded_.size; ++i)
      starts_[i] = offset ? offset[bounded_.range[i]] : 0.0f;
    settle(queries_[0]);
  }

  void chunk(int64_t begin, int64_t end, int64_t last, const std::vector<uint64_t>& live) {
    bool any_limited = false;
    for (int64_t q = 0; q < static_cast<int64_t>(queries_.size()); ++q) {
      limits_[q] = 0;
      if (queries_[q].found->limited()) any_limited |= tighten(q);
    }
    if (any_limited) bound(begin, end, live);
    for (int64_t q = 0; q < static_cast<int64_t>(queries_.size()); ++q) {
      const bool limited = queries_[q].found->limited();
      if (limited && queries_[q].budget < 0 && !database_.bias) continue;  // none can pass
      const uint64_t* pass = pass_.get() + q * pass_stride_;
      rows_.clear();
      for (int64_t b = begin; b < end; ++b) {
        uint64_t bits = limited ? pass[b - begin] : ~uint64_t{0};
        if (!bits) continue;
        if (!live.empty()) bits &= live[b];
        if (const int64_t left = last - b * kBlockRows; left < kBlockRows)
          bits &= (uint64_t{1} << left) - 1;
        for (; bits; bits &= bits - 1) rows_.push_back(b * kBlockRows + __builtin_ctzll(bits));
      }
      starts_.assign(rows_.size(), queries_[q].offset);
      settle(queries_[q]);
    }
  }

  // The byte tables and the limit of query q for the cost of its k-th best. False: none can pass.
  bool tighten(int64_t q) {
    Query& query = queries_[q];
    const double limit = query.found->limit();
    double budget = limit - query.offset + query.error - query.base;
    if (query.error == std::numeric_limits<double>::infinity()) budget = query.error;
    const bool saturates = layout_.nbits != 4 || kernels().saturates4;
    if (database_.bias) {
      if (query.step == 0) quantize(query, (saturates ? query.group_span : query.span) / 255);
      steps_[q] = static_cast<float>(query.step);
      bases_[q] = static_cast<float>(query.offset + query.base - query.error);
      mosts_[q] = static_cast<float>(limit);
      query.budget = 0;
      return true;
    }
    query.budget = budget;
    if (budget < 0) return false;
    // A step that suits the budget, which falls with the limit and differs between ranges.
    double step = std::min(query.span, budget) / 255;
    if (saturates && used_ <= kByteGroup) step = std::min(query.spans, budget) / 254;
    else if (saturates)
      step = std::min(query.group_span, 1.5 * budget / ceil_div(used_, int64_t{kByteGroup})) / 255;
    if (query.step == 0 || step < 0.85 * query.step || step > 1.2 * query.step)
      quantize(query, step);
    limits_[q] = static_cast<uint32_t>(std::min(budget / query.step, 4e9));
    return true;
  }

  // bytes <= (table - least) / step.
  void quantize(Query& query, double step) {
    query.step = std::max({step, query.span * 1e-6, 1e-30});
    const float inverse = static_cast<float>((1 - 0x1p-20) / query.step);
    const int64_t entries = layout_.entries();
    for (int64_t m = 0; m < used_; ++m)
      kernels().to_bytes(query.table + m * entries, entries, query.least[m], inverse,
                         query.bytes + m * entries);
  }

  void bound(int64_t begin, int64_t end, const std::vector<uint64_t>& live,
             uint16_t* sums = nullptr) {
    BoundJob job{};
    job.block_bytes = layout_.block_bytes();
    job.used = used_;
    job.tables = tables_.data();
    job.nq = static_cast<int>(queries_.size());
    job.limit = limits_.data();
    job.step = steps_.data();
    job.base = bases_.data();
    job.most = mosts_.data();
    job.scratch = scratch_.get();
    job.pass_stride = pass_stride_;
    // Runs of blocks in which a row may be returned.
    for (int64_t b = begin; b < end;) {
      int64_t stop = b;
      // Kernels read the factors of whole blocks, so a block that is not full has a run of its own.
      const int64_t full = database_.bias ? database_.blocks.rows / kBlockRows : end;
      while (stop < end && (live.empty() || live[stop]) && (stop < full || stop == b)) ++stop;
      if (stop > b) {
        job.blocks = database_.blocks.block(b);
        job.count = stop - b;
        job.scale = factors(database_.scale, b, b == full, last_scale_);
        job.bias = factors(database_.bias, b, b == full, last_bias_);
        job.pass = pass_.get() + (b - begin);
        job.sums = sums ? sums + (b - begin) * kBlockRows : nullptr;
        if (layout_.nbits == 4) kernels().bound4(job);
        else if (layout_.nbits == 6) kernels().bound6(job);
        else kernels().bound8(job);
      }
      for (b = stop; b < end && !live.empty() && !live[b]; ++b)
        for (size_t q = 0; q < queries_.size(); ++q) pass_[q * pass_stride_ + (b - begin)] = 0;
    }
  }

  // Those of the rows from block b on; of the block that is not full a copy.
  const float* factors(const float* all, int64_t b, bool partial, float* copy) const {
    if (!all || !partial) return all ? all + b * kBlockRows : nullptr;
    std::copy(all + b * kBlockRows, all + database_.blocks.rows, copy);
    return copy;
  }

  // Offers rows_, whose sums begin at starts_.
  void settle(Query& query) {
    const auto count = static_cast<int64_t>(rows_.size());
    costs_.resize(rows_.size());
    if (layout_.nbits == 4) {
      kernels().cost4({database_.blocks.data, layout_.block_bytes(), used_, query.table,
                       rows_.data(), starts_.data(), count, costs_.data()});
    } else {
      constexpr int kSums = 8;
      int64_t i = 0;
      for (; i + kSums <= count; i += kSums) cost_rows<kSums>(query, i);
      for (; i < count; ++i) cost_rows<1>(query, i);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = rows_[i];
      float cost = costs_[i];
      if (database_.scale) cost *= database_.scale[row];
      if (database_.bias) cost += database_.bias[row];
      query.found->offer(cost, database_.ids ? database_.ids[row] : row);
    }
    query.found->settle();
  }

  // Several at a time: a sum is a chain of additions.
  template <int kSums>
  void cost_rows(const Query& query, int64_t first) {
    const int64_t entries = layout_.entries();
    const auto most = static_cast<uint8_t>(entries - 1);
    const uint8_t* codes[kSums];
    float sum[kSums];
    for (int i = 0; i < kSums; ++i) {
      const int64_t row = rows_[first + i];
      codes[i] = database_.blocks.block(row / kBlockRows) + row % kBlockRows;
      sum[i] = starts_[first + i];
    }
    const float* table = query.table;
    for (int64_t m = 0; m < used_; ++m, table += entries)
      for (int i = 0; i < kSums; ++i) sum[i] += table[codes[i][m * kBlockRows] & most];
    for (int i = 0; i < kSums; ++i) costs_[first + i] = sum[i];
  }

  const Database& database_;
  const Layout& layout_;
  int64_t used_;
  std::vector<Query> queries_;
  int64_t pass_stride_;  // blocks of a chunk
  AlignedBuffer<uint8_t> bytes_, scratch_;
  AlignedBuffer<uint64_t> pass_;
  std::vector<uint32_t> limits_;
  std::vector<float> steps_, bases_, mosts_;
  float last_scale_[kBlockRows] = {}, last_bias_[kBlockRows] = {};  // of a block that is not full
  std::vector<const uint8_t*> tables_;
  std::vector<int64_t> rows_;          // that passed
  std::vector<float> starts_, costs_;  // of them
  uint16_t sums_[kSumBlocks * kBlockRows];
  Bounded bounded_;
};

// One bit per row from one byte per row; empty without a mask.
std::vector<uint64_t> live_bits(const uint8_t* mask, int64_t rows) {
  std::vector<uint64_t> live;
  if (!mask) return live;
  live.resize(ceil_div(rows, kBlockRows));
  for (int64_t r = 0; r < rows; ++r)
    live[r / kBlockRows] |= static_cast<uint64_t>(mask[r] != 0) << r % kBlockRows;
  return live;
}

// --- Splitting -----------------------------------------------------------------------------------

constexpr double kSerialWork = 1 << 19;  // lookups below which threads do not pay

// Queries in groups, rows in slices: many queries are split by group, few split the rows.
struct Plan {
  int64_t group, groups, slice_rows, slices = 1;

  // `work`: rows times subspaces that all queries together look at.
  Plan(const Queries& queries, const Database& database, const Ranges* ranges, double work) {
    const int64_t threads = num_threads(), rows = database.blocks.rows, nq = queries.count;
    const int64_t share = ceil_div(ceil_div(nq, threads), int64_t{4}) * 4;  // of one thread
    group = ranges ? kRangesGroup : nq >= 8 * threads ? std::min(kQueryGroup, share) : kQueryGroup;
    groups = ceil_div(nq, group);
    if (!ranges && groups < threads) slices = ceil_div(threads, std::max<int64_t>(1, groups));
    slices = std::min(slices, 1 + static_cast<int64_t>(work / kSerialWork));
    slice_rows = std::max<int64_t>(1, ceil_div(ceil_div(rows, slices), kBlockRows)) * kBlockRows;
    slices = std::max<int64_t>(1, ceil_div(rows, slice_rows));
  }
};

double work_of(const Queries& queries, const Database& database, const Ranges* ranges) {
  double rows = static_cast<double>(queries.count) * static_cast<double>(database.blocks.rows);
  if (ranges) {
    rows = 0;
    for (int64_t i = 0; i < ranges->offsets[queries.count]; ++i)
      rows += static_cast<double>(ranges->end[i] - ranges->begin[i]);
  }
  return rows * static_cast<double>(queries.used);
}

// With threads where there is work for them: a parallel region costs as much as 10^4 rows.
void for_tasks(double work, int64_t tasks, const std::function<void(int64_t)>& task) {
  parallel_for_if(work >= kSerialWork, tasks, task);
}

// Of the ranges [from, to), in size.
float largest(const float* offset, int64_t from, int64_t to) {
  float most = 0;
  for (int64_t i = from; offset && i < to; ++i) most = std::max(most, std::fabs(offset[i]));
  return most;
}

// Searches everything, for the k best or, with 0, by radius; found[slice * nq + q] holds what each
// slice of the rows gives query q.
template <class Start>
int64_t search(const Queries& queries, const Database& database, const Ranges* ranges, int64_t k,
               std::vector<Found>& found, const Start& start) {
  const int64_t nq = queries.count, rows = database.blocks.rows;
  const double work = work_of(queries, database, ranges);
  const Plan plan(queries, database, ranges, work);
  const int64_t table_size = queries.used * database.blocks.layout.entries();
  const std::vector<uint64_t> live = live_bits(database.mask, rows);
  found.resize(plan.slices * nq);
  for (Found& f : found) start(f);
  for_tasks(work, plan.groups * plan.slices, [&](int64_t task) {
    const int64_t q0 = task / plan.slices * plan.group, count = std::min(plan.group, nq - q0);
    const int64_t slice = task % plan.slices, first = slice * plan.slice_rows;
    Scanner scanner(database, queries.used, ranges ? 1 : count);
    const auto set = [&](int64_t at, int64_t table, float offset, int64_t q) {
      scanner.set(at, queries.tables + table * table_size, offset, &found[slice * nq + q]);
    };
    if (!ranges) {
      for (int64_t q = 0; q < count; ++q)
        set(q, q0 + q, queries.offset ? queries.offset[q0 + q] : 0.0f, q0 + q);
      scanner.scan(first, std::min(rows, first + plan.slice_rows), live);
      return;
    }
    for (int64_t q = q0; q < q0 + count; ++q) {
      const int64_t from = ranges->offsets[q], to = ranges->offsets[q + 1];
      if (k && !ranges->table &&
          scanner.bounds_all(queries.tables + q * table_size, largest(ranges->offset, from, to))) {
        scanner.scan_ranges(ranges->begin + from, ranges->end + from,
                            ranges->offset ? ranges->offset + from : nullptr, to - from, k, live,
                            &found[q]);
        continue;
      }
      for (int64_t i = from; i < to; ++i) {
        if (ranges->begin[i] == ranges->end[i]) continue;
        set(0, ranges->table ? ranges->table[i] : q, ranges->offset ? ranges->offset[i] : 0.0f, q);
        scanner.scan(ranges->begin[i], ranges->end[i], live);
      }
    }
  });
  return plan.slices;
}

}  // namespace

void topk(const Queries& queries, const Database& database, const Ranges* ranges, int64_t k,
          float* values, int64_t* ids) {
  const int64_t nq = queries.count;
  if (nq == 0 || k == 0) return;
  const int64_t keep = std::max<int64_t>(1, std::min(k, database.blocks.rows));
  std::vector<Found> found;
  const int64_t slices =
      search(queries, database, ranges, keep, found, [&](Found& f) { f.search_best(keep); });
  const auto finish = [&](int64_t q) {
    std::vector<Hit> best;
    for (int64_t s = 0; s < slices; ++s) {
      const std::vector<Hit>& part = found[s * nq + q].hits();
      best.insert(best.end(), part.begin(), part.end());
    }
    std::sort(best.begin(), best.end());
    for (int64_t i = 0; i < k; ++i) {
      const bool present = i < keep && i < static_cast<int64_t>(best.size());
      values[q * k + i] = present ? float_from_key(best[i].key) : kInfinity;
      ids[q * k + i] = present ? best[i].id : -1;
    }
  };
  constexpr int64_t kStep = 64;
  for_tasks(static_cast<double>(nq * slices * keep) * 16, ceil_div(nq, kStep), [&](int64_t task) {
    for (int64_t q = task * kStep; q < nq && q < (task + 1) * kStep; ++q) finish(q);
  });
}

RangeResult::RangeResult(const Queries& queries, const Database& database, const Ranges* ranges,
                         float radius)
    : queries_(queries.count) {
  if (queries_ == 0) return;
  std::vector<Found> found;
  slices_ = search(queries, database, ranges, 0, found, [&](Found& f) { f.search_radius(radius); });
  for (Found& f : found) {
    hits_.push_back(std::move(f.hits()));
    total_ += static_cast<int64_t>(hits_.back().size());
  }
}

void RangeResult::write(int64_t* indptr, float* values, int64_t* ids) const {
  indptr[0] = 0;
  std::vector<Hit> hits;
  for (int64_t q = 0; q < queries_; ++q) {
    hits.clear();
    for (int64_t s = 0; s < slices_; ++s)
      hits.insert(hits.end(), hits_[s * queries_ + q].begin(), hits_[s * queries_ + q].end());
    std::sort(hits.begin(), hits.end(), [](const Hit& a, const Hit& b) {
      return a.id != b.id ? a.id < b.id : a.key < b.key;
    });
    int64_t at = indptr[q];
    for (const Hit& hit : hits) {
      ids[at] = hit.id;
      values[at++] = float_from_key(hit.key);
    }
    indptr[q + 1] = at;
  }
}

}  // namespace pentad::pq
