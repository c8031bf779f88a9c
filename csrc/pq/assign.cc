// SPDX-License-Identifier: Apache-2.0
// Drives the kernels of assign_kernels.h: tiles, threads, and the rows that float32 cannot settle.
#include "pq/assign.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "common/ceil_div.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/reals.h"
#include "common/scratch.h"
#include "pq/assign_kernels.h"

namespace pentad::pq {
namespace {

// Up to this many centroids each is compared alone; beyond, groups are, and the group of the best
// is scored again.
constexpr int64_t kMostEach = 64;
// From here on, products of bf16 are worth their settling.
constexpr int64_t kLeastRoughDim = 32, kLeastRoughCentroids = 512;
constexpr int64_t kTaskWork = int64_t{4} << 20;  // multiply-adds

// Starting threads takes longer than a small call.
constexpr int64_t kSerialWork = int64_t{1} << 19;

void run_tasks(int64_t tasks, int64_t work, const std::function<void(int64_t)>& task) {
  parallel_for_if(work > kSerialWork, tasks, task);
}

const AssignKernels& kernels() {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::v4x: return v4x::pq_assign_kernels;
    case Isa::v4: return v4::pq_assign_kernels;
    case Isa::v3: return v3::pq_assign_kernels;
    default: return v2::pq_assign_kernels;
#else
    default: return neon::pq_assign_kernels;
#endif
  }
}

int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

// One codebook as the kernels take it.
struct Book {
  Book(const Array3& codebooks, int64_t m, Nearest metric, const AssignKernels& kernel);

  AssignCentroids packed() const { return {values.get(), bias.data(), dim, groups}; }
  double cost(const float* x, int64_t k) const {
    return nearest_cost(x, raw.data() + k * dim, dim, metric, norms.empty() ? 0 : norms[k]);
  }
  // The costs of all found, several at a time, as each is a chain of additions.
  void cost_all(const float* x, std::vector<std::pair<double, int64_t>>& found) const;
  // E of assign.h, doubled; infinity where float32 might overflow.
  double doubt(float squares) const;
  // The same for products of bf16 where a row lost `lost`; at least doubt(squares).
  double rough_doubt(float squares, float lost) const;
  void round(const AssignKernels& kernel);
  AssignCentroids rounded() const { return {pairs.get(), bias.data(), ceil_div(dim, 2), groups}; }

  Nearest metric;
  int64_t centroids, dim, padded, groups;
  bool finite = true;
  std::vector<float> raw;     // [centroids][dim]
  std::vector<float> centre;  // [padded]
  Scratch<float> values;      // [groups][dim][group]
  std::vector<float> bias;    // [groups * group], negated
  std::vector<double> norms;  // cosine
  double longest = 0;         // C
  bool rough = false;         // whether the following are there
  Scratch<float> pairs;       // bf16 [groups][ceil(dim / 2)][group][2]
  double most_lost = 0;       // max_k |c'_k - its bf16|
};

Book::Book(const Array3& codebooks, int64_t m, Nearest metric, const AssignKernels& kernel)
    : metric(metric),
      centroids(codebooks.shape[1]),
      dim(codebooks.shape[2]),
      padded(round_up(dim, kAssignPad)),
      groups(ceil_div(centroids, kernel.group)),
      raw(centroids * dim),
      centre(padded),
      values(groups * dim * kernel.group),
      bias(groups * kernel.group, -std::numeric_limits<float>::infinity()) {
  std::vector<double> mean(dim);
  for (int64_t k = 0; k < centroids; ++k)
    for (int64_t j = 0; j < dim; ++j) {
      const float c = static_cast<float>(read_real(
          codebooks.data, codebooks.dtype,
          m * codebooks.strides[0] + k * codebooks.strides[1] + j * codebooks.strides[2]));
      finite = finite && std::isfinite(c);
      raw[k * dim + j] = c;
      mean[j] += c;
    }
  if (metric == Nearest::l2)
    for (int64_t j = 0; j < dim; ++j)
      centre[j] = static_cast<float>(mean[j] / static_cast<double>(centroids));

  const int64_t group = kernel.group;
  std::fill_n(values.get() + (groups - 1) * dim * group, dim * group, 0.0f);
  if (metric == Nearest::cosine) norms.resize(centroids);
  for (int64_t k = 0; k < centroids; ++k) {
    const float* from = raw.data() + k * dim;
    float* to = values.get() + k / group * dim * group + k % group;
    double factor = 1, square = 0;
    if (metric == Nearest::cosine) {
      norms[k] = centroid_norm(from, dim);
      factor = norms[k] > 0 ? 1 / norms[k] : 0;
    }
    for (int64_t j = 0; j < dim; ++j) {
      const float c =
          metric == Nearest::cosine ? static_cast<float>(from[j] * factor) : from[j] - centre[j];
      to[j * group] = c;
      square += static_cast<double>(c) * c;
    }
    bias[k] = metric == Nearest::l2 ? static_cast<float>(-square / 2) : 0.0f;
    longest = std::max(longest, std::sqrt(square));
  }
}

void Book::cost_all(const float* x, std::vector<std::pair<double, int64_t>>& found) const {
  constexpr size_t kStep = 8;
  size_t i = 0;
  for (; i + kStep <= found.size(); i += kStep) {
    const float* c[kStep];
    double norm[kStep], cost[kStep];
    for (size_t s = 0; s < kStep; ++s) {
      const int64_t k = found[i + s].second;
      c[s] = raw.data() + k * dim;
      norm[s] = norms.empty() ? 0 : norms[k];
    }
    nearest_costs(x, c, dim, metric, norm, cost);
    for (size_t s = 0; s < kStep; ++s) found[i + s].first = cost[s];
  }
  for (; i < found.size(); ++i) found[i].first = this->cost(x, found[i].second);
}

double norm_bound(float squares, int64_t dim) {
  // The sum of squares has dim roundings of its own, and may have lost terms to underflow.
  const double d = static_cast<double>(dim);
  return std::sqrt(static_cast<double>(squares)) * (1 + d * 0x1p-24) + std::sqrt(d) * 0x1p-62;
}

double Book::doubt(float squares) const {
  const double d = static_cast<double>(dim), u = 0x1p-24;
  const double x = norm_bound(squares, dim);
  const double c = longest * (1 + 0x1p-40);
  if (!(x * c + c * c + x * x < 0x1p125)) return std::numeric_limits<double>::infinity();
  const double error =
      1.0625 * u * ((d + 4) * (x * c + c * c / 2) + (x + c) * (x + c)) + d * 0x1p-124 * (1 + x + c);
  return 2 * error;
}

void Book::round(const AssignKernels& kernel) {
  const int64_t units = ceil_div(dim, 2), group = kernel.group;
  rough = true;
  pairs = Scratch<float>(groups * units * group);
  std::vector<double> squares(groups * group);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t u = 0; u < units; ++u)
      for (int64_t i = 0; i < group; ++i) {
        uint32_t pair = 0;
        for (int64_t j = 2 * u; j < std::min(dim, 2 * u + 2); ++j) {
          const float c = values.get()[(g * dim + j) * group + i];
          const uint32_t half = real_to_16_bits(c, 7, -126);
          const double lost = c - real_from_bf16(static_cast<uint16_t>(half));
          squares[g * group + i] += lost * lost;
          pair |= half << (j % 2 * 16);
        }
        std::memcpy(pairs.get() + (g * units + u) * group + i, &pair, 4);
      }
  most_lost = std::sqrt(*std::max_element(squares.begin(), squares.end())) * (1 + 0x1p-40);
}

double Book::rough_doubt(float squares, float lost) const {
  const double x = norm_bound(squares, dim), gone = norm_bound(lost, dim);
  return 1.0625 * doubt(squares) + 2.0625 * (gone * longest + (x + gone) * most_lost);
}

// A value that at least `top` of the scores reach, and few more. By bisection, as a vector counts
// faster than a selection moves.
float largest_least(const float* scores, int64_t count, int64_t top) {
  const auto [least, most] = std::minmax_element(scores, scores + count);
  if (top == 1) return *most;
  float low = *least, high = *most;
  for (int step = 0; step < 24; ++step) {
    const float middle = low / 2 + high / 2;
    int32_t reach = 0;
    for (int64_t k = 0; k < count; ++k) reach += scores[k] >= middle;
    (reach >= top ? low : high) = middle;
    if (reach >= top && reach <= top + top / 8 + 2) break;
  }
  return low;
}

// A float below score - doubt.
float least_score(float score, double doubt) {
  return std::nextafterf(static_cast<float>(static_cast<double>(score) - doubt),
                         -std::numeric_limits<float>::infinity());
}

void write(const Assigned& out, int64_t at, int64_t code, double cost) {
  if (out.wide) static_cast<int32_t*>(out.codes)[at] = static_cast<int32_t>(code);
  else static_cast<uint8_t*>(out.codes)[at] = static_cast<uint8_t>(code);
  if (out.distances) out.distances[at] = static_cast<float>(cost);
}

// What one thread needs for its tiles.
class Tiles {
 public:
  Tiles(const AssignKernels& kernel, const Array3& x, const Assigned& out, int64_t padded,
        int64_t scores)
      : kernel_(kernel),
        x_(x),
        out_(out),
        raw_(kernel.tile_rows * padded),
        centred_(kernel.tile_rows * padded),
        columns_(padded * kernel.tile_rows),
        scores_(scores),
        pairs_(padded * kernel.tile_rows),
        pending_rows_(2 * kernel.tile_rows * padded) {
    std::fill_n(raw_.get(), kernel.tile_rows * padded, 0.0f);
  }

  // Rows [first, last) against codebook m; whether they are finite.
  bool run(const Book& book, int64_t m, int64_t first, int64_t last) {
    bool finite = true;
    int64_t at[kMostTileRows];
    for (int64_t i = first; i < last; i += kernel_.tile_rows) {
      const int rows = static_cast<int>(std::min<int64_t>(kernel_.tile_rows, last - i));
      for (int r = 0; r < rows; ++r) at[r] = ((i + r) * x_.shape[1] + m) * out_.top;
      const char* data = static_cast<const char*>(x_.data) +
                         (i * x_.strides[0] + m * x_.strides[1]) * size_of(x_.dtype);
      if (!pack(book, data, x_.dtype, x_.strides[0], x_.strides[2], rows)) {
        finite = false;
      } else if (book.rough && !hard_) {
        rough_tile(book, rows, at);
        if (pending_ >= kernel_.tile_rows) settle_pending(book, kernel_.tile_rows);
      } else {
        tile(book, rows, at);
      }
    }
    if (pending_) settle_pending(book, pending_);
    return finite;
  }

 private:
  bool pack(const Book& book, const void* data, DType dtype, int64_t row_stride, int64_t col_stride,
            int rows) {
    return kernel_.pack({data, dtype, row_stride, col_stride, rows, book.dim, book.padded,
                         book.centre.data(), raw_.get(), centred_.get(), columns_.get(), squares_});
  }
  void tile(const Book& book, int rows, const int64_t* at);
  void rough_tile(const Book& book, int rows, const int64_t* at);
  // The last `rows` of the rows that bf16 could not settle.
  void settle_pending(const Book& book, int rows) {
    pending_ -= rows;
    pack(book, pending_rows_.get() + pending_ * book.dim, DType::f32, book.dim, 1, rows);
    tile(book, rows, pending_at_ + pending_);
  }
  std::vector<std::pair<double, int64_t>> candidates(const Book& book, int r, int64_t top);

  const AssignKernels& kernel_;
  const Array3& x_;
  const Assigned& out_;
  Scratch<float> raw_, centred_, columns_, scores_;
  float squares_[kMostTileRows], best_[kMostTileRows], second_[kMostTileRows];
  float least_[kMostTileRows];
  int32_t place_[kMostTileRows];
  uint8_t masks_[kMostTileRows];
  Scratch<float> pairs_;
  float lost_[kMostTileRows], third_[kMostTileRows];
  int32_t second_place_[kMostTileRows];
  Scratch<float> pending_rows_;  // [2 tile_rows][dim]
  int64_t pending_at_[2 * kMostTileRows];
  int pending_ = 0;
  int64_t seen_ = 0, unsettled_ = 0;
  bool hard_ = false;  // bf16 settles too few rows
};

void Tiles::tile(const Book& book, int rows, const int64_t* at) {
  if (out_.top > 1) {
    for (int r = 0; r < rows; ++r) {
      const auto found = candidates(book, r, out_.top);
      for (int64_t t = 0; t < out_.top; ++t)
        write(out_, at[r] + t, found[t].second, found[t].first);
    }
    return;
  }
  const bool each = book.centroids <= kMostEach;
  const AssignScanJob job{book.packed(), columns_.get(), rows, best_, second_, place_};
  (each ? kernel_.scan_each : kernel_.scan_groups)(job);
  bool settled[kMostTileRows];
  for (int r = 0; r < rows; ++r) {
    const double doubt = book.doubt(squares_[r]);
    settled[r] = static_cast<double>(best_[r]) - static_cast<double>(second_[r]) > doubt;
    least_[r] = least_score(best_[r], doubt);
    if (!settled[r]) place_[r] = 0;
  }
  if (!each)
    kernel_.group_masks(book.packed(), centred_.get(), book.padded, rows, place_, least_, masks_);
  for (int r = 0; r < rows; ++r) {
    const float* x = raw_.get() + r * book.padded;
    std::pair<double, int64_t> best;
    if (!settled[r]) {
      best = candidates(book, r, 1)[0];
    } else if (each) {
      best.second = place_[r];
      if (out_.distances) best.first = book.cost(x, best.second);
    } else {
      unsigned mask = masks_[r];
      const int64_t begin = static_cast<int64_t>(place_[r]) * kernel_.group;
      best.second = begin + __builtin_ctz(mask);
      const bool several = mask & (mask - 1);
      if (several || out_.distances) best.first = book.cost(x, best.second);
      while (mask &= mask - 1)
        best = std::min(best,
                        {book.cost(x, begin + __builtin_ctz(mask)), begin + __builtin_ctz(mask)});
    }
    write(out_, at[r], best.second, best.first);
  }
}

// The best group by products of bf16, or the two best where the third is clearly worse: float32
// decides between their centroids.
void Tiles::rough_tile(const Book& book, int rows, const int64_t* at) {
  kernel_.round_columns(columns_.get(), book.dim, pairs_.get(), lost_);
  kernel_.scan_rough(
      {book.rounded(), pairs_.get(), rows, best_, second_, place_, third_, second_place_});
  for (int r = 0; r < rows; ++r) {
    const double rough = book.rough_doubt(squares_[r], lost_[r]);
    const double limit = static_cast<double>(best_[r]) - rough;
    const float *row = centred_.get() + r * book.padded, *x = raw_.get() + r * book.padded;
    if (!(third_[r] < limit)) {
      ++unsettled_;
      pending_at_[pending_] = at[r];
      std::copy_n(x, book.dim, pending_rows_.get() + pending_++ * book.dim);
      continue;
    }
    const int64_t places[] = {place_[r], second_place_[r]};
    const int count = second_[r] < limit ? 1 : 2;
    float scores[2 * kMostGroup];
    for (int i = 0; i < count; ++i)
      kernel_.group_scores(book.packed(), places[i], row, scores + i * kernel_.group);
    const int scored = count * kernel_.group;
    const float least =
        least_score(*std::max_element(scores, scores + scored), book.doubt(squares_[r]));
    std::pair<double, int64_t> best{std::numeric_limits<double>::infinity(), 0};
    const bool alone =
        std::count_if(scores, scores + scored, [&](float s) { return s >= least; }) == 1;
    for (int i = 0; i < scored; ++i) {
      if (!(scores[i] >= least)) continue;
      const int64_t k = places[i / kernel_.group] * kernel_.group + i % kernel_.group;
      const double cost = alone && !out_.distances ? 0 : book.cost(x, k);
      best = std::min(best, {cost, k});
    }
    write(out_, at[r], best.second, best.first);
  }
  seen_ += rows;
  hard_ = seen_ >= 4 * kernel_.tile_rows && unsettled_ * 3 > seen_;
}

// The `top` nearest of row r by the definition, in order.
std::vector<std::pair<double, int64_t>> Tiles::candidates(const Book& book, int r, int64_t top) {
  float* scores = scores_.get();
  const double doubt = book.doubt(squares_[r]);
  float least = -std::numeric_limits<float>::infinity();
  std::vector<std::pair<double, int64_t>> found;
  if (doubt < std::numeric_limits<double>::infinity()) {
    kernel_.row_scores(book.packed(), centred_.get() + r * book.padded, scores);
    least = least_score(largest_least(scores, book.centroids, top), doubt);
  } else {
    std::fill_n(scores, book.centroids, 0.0f);
  }
  found.resize(book.centroids);
  size_t count = 0;
  for (int64_t k = 0; k < book.centroids; ++k) {
    found[count].second = k;
    count += scores[k] >= least;
  }
  found.resize(count);
  book.cost_all(raw_.get() + r * book.padded, found);
  if (top == 1) std::swap(found[0], *std::min_element(found.begin(), found.end()));
  else std::partial_sort(found.begin(), found.begin() + top, found.end());
  return found;
}

}  // namespace

Verdict assign(const Array3& x, const Array3& codebooks, Nearest metric, const Assigned& out) {
  if (x.dtype == DType::f64 || codebooks.dtype == DType::f64)
    return assign_reference(x, codebooks, metric, out);
  const AssignKernels& kernel = kernels();
  const int64_t n = x.shape[0], count = x.shape[1], dim = x.shape[2];
  std::vector<std::unique_ptr<Book>> books(count);
  const bool rough = kernel.scan_rough && dim >= kLeastRoughDim && out.top == 1 &&
                     codebooks.shape[1] >= kLeastRoughCentroids && n > kernel.tile_rows;
  const int64_t book_work = count * codebooks.shape[1] * dim;
  run_tasks(count, 8 * book_work, [&](int64_t m) {
    books[m] = std::make_unique<Book>(codebooks, m, metric, kernel);
    if (rough && books[m]->longest < 0x1p62) books[m]->round(kernel);
  });
  for (const auto& book : books)
    if (!book->finite) return Verdict::bad_centroids;
  if (n == 0 || count == 0) return Verdict::fine;

  // Rows are cut so that a task is worth starting; the codebooks too, where rows are few.
  const int64_t tile_work = kernel.tile_rows * books[0]->groups * kernel.group * dim;
  const int64_t tiles = ceil_div(n, kernel.tile_rows);
  int64_t some_tiles = std::clamp<int64_t>(kTaskWork / (tile_work * count), 1, tiles);
  // What bf16 cannot settle should fill tiles of its own.
  if (rough) some_tiles = std::max(some_tiles, std::min<int64_t>(tiles / (8 * num_threads()), 32));
  const int64_t row_tasks = ceil_div(tiles, some_tiles);
  const int64_t book_tasks =
      row_tasks >= 16 ? 1 : std::min<int64_t>(count, ceil_div(16, row_tasks));
  const int64_t rows = some_tiles * kernel.tile_rows;
  std::atomic<bool> finite = true;
  run_tasks(row_tasks * book_tasks, n * book_work, [&](int64_t task) {
    Tiles work(kernel, x, out, books[0]->padded, books[0]->groups * kernel.group);
    const int64_t first = task / book_tasks * rows, part = task % book_tasks;
    for (int64_t m = count * part / book_tasks; m < count * (part + 1) / book_tasks; ++m)
      if (!work.run(*books[m], m, first, std::min(n, first + rows))) finite = false;
  });
  return finite ? Verdict::fine : Verdict::bad_vectors;
}

}  // namespace pentad::pq
