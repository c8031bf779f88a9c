// SPDX-License-Identifier: Apache-2.0
// Drives the search in inverted lists: queries in groups, windows one after the other, so that a
// group shares the window's postings in the cache; one query splits the windows over threads, which
// tell each other the k-th best score.
#include "sparse/search.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <utility>

#include "common/aligned.h"
#include "common/ceil_div.h"
#include "common/parallel.h"
#include "common/topk.h"
#include "sparse/query_weights.h"

namespace pentad::sparse {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kMostSum = 65535;
constexpr int64_t kVisibleTerms = 128;  // that can all add at least 1 to a sum
constexpr int64_t kMostTerms = 4096;    // of the bounds; beyond, documents are scored one by one
constexpr int64_t kGroup = 128;         // queries of one task
constexpr int64_t kFewGroups = 1024;    // of the documents of a window, for a small k
constexpr float kShare = 0.97f;  // of the k-th bound: bounds are some tenths of a per cent high

// --- Candidates ----------------------------------------------------------------------------------

// Bounds are compared by these bits, to a thousandth, which lets them be counted rather than sorted.
constexpr int kFineBits = 13;
uint32_t coarse_bits(float bound) {
  uint32_t bits;
  std::memcpy(&bits, &bound, 4);
  return bits >> kFineBits;
}
float from_coarse_bits(uint32_t coarse) {
  const uint32_t bits = coarse << kFineBits;
  float bound;
  std::memcpy(&bound, &bits, 4);
  return bound;
}

// Of one query, over all threads: the bound below which documents are dropped.
class Limit {
 public:
  float get() const { return value_.load(std::memory_order_relaxed); }
  // To a share of a bound that k documents reach, rounded down: so it comes to the same, however
  // the documents were split when the bound was found. Infinity stands for bounds that are not
  // known; those near the end of float32 are too coarse.
  void raise(float bound, float share) {
    const float value = from_coarse_bits(coarse_bits(bound)) * share;
    if (!(value >= 0x1p-100f && value < kInfinity)) return;
    float now = get();
    while (value > now && !value_.compare_exchange_weak(now, value, std::memory_order_relaxed)) {
    }
  }

 private:
  std::atomic<float> value_{-kInfinity};
};

struct Candidate {
  float bound;
  int64_t document;
};

// A bound that at least k of the candidates reach, 0 < k <= their number: the k-th largest, rounded
// down. Of 2,000 and k = 1000 in 3 us, where a selection takes 20.
float kth_bound(const std::vector<Candidate>& candidates, int64_t k) {
  constexpr uint32_t kBuckets = 4096;  // of a thousandth: bounds down to a sixteenth of the largest
  uint32_t top = 0;
  for (const Candidate& c : candidates) top = std::max(top, coarse_bits(c.bound));
  const uint32_t base = top - std::min(top, kBuckets - 1);
  if (static_cast<int64_t>(candidates.size()) >= kBuckets / 16) {
    uint32_t counts[kBuckets] = {};
    for (const Candidate& c : candidates) ++counts[std::max(coarse_bits(c.bound), base) - base];
    int64_t left = k;
    for (uint32_t b = kBuckets - 1; b > 0; --b)
      if ((left -= counts[b]) <= 0) return from_coarse_bits(base + b);
  }
  std::vector<float> bounds;
  for (const Candidate& c : candidates) bounds.push_back(c.bound);
  std::nth_element(bounds.begin(), bounds.begin() + (k - 1), bounds.end(), std::greater<>());
  return from_coarse_bits(coarse_bits(bounds[k - 1]));
}

// A reservoir of the documents of one query by their bounds: those within `share` of the k-th best
// bound so far are kept.
class Candidates {
 public:
  void start(int64_t k, float share) { k_ = k, share_ = share; }
  int64_t k() const { return k_; }
  float share() const { return share_; }
  std::vector<Candidate>& all() { return all_; }

  void push(float bound, int64_t document) { all_.push_back({bound, document}); }
  // After a window: drops what lies below the limit, which the k-th bound raises.
  void settle(Limit& limit) {
    const auto size = static_cast<int64_t>(all_.size());
    if (size < k_ + k_ / 2 + 64) return;
    cut(limit);
  }
  void cut(Limit& limit) {
    if (static_cast<int64_t>(all_.size()) <= k_) return;
    limit.raise(kth_bound(all_, k_), share_);
    drop(limit.get());
  }
  void drop(float limit) {
    all_.erase(std::remove_if(all_.begin(), all_.end(),
                              [&](const Candidate& c) { return c.bound < limit; }),
               all_.end());
  }

 private:
  std::vector<Candidate> all_;
  int64_t k_ = 0;
  float share_ = 1;
};

// --- One query -----------------------------------------------------------------------------------

struct Query {
  const int32_t* terms;
  const float* weights;
  int64_t count;
  bool negative = false;  // has weights below 0
  Limit limit;

  bool bounded() const { return count <= kMostTerms; }
};

// Finds the candidates of windows, for one query at a time.
class Searcher {
 public:
  Searcher(const Documents& documents, const Pruning& pruning)
      : documents_(documents),
        pruning_(pruning),
        sums_(aligned_buffer<uint16_t>(kWindow)),
        found_(aligned_buffer<uint16_t>(kWindow)) {}

  // Of the window, the documents [begin, end), begin a multiple of 64.
  void search(int64_t w, int64_t begin, int64_t end, Query& query, Candidates& candidates) {
    const Window& window = documents_.windows[w];
    first_ = w * kWindow + begin, count_ = end - begin;
    if (!query.bounded()) return take_all(candidates);
    find_terms(window, query);
    float limit = query.limit.get();
    if (limit > 0) drop_blocks(limit);
    if (terms_.empty()) return;
    find_postings(window, begin, end);
    weigh();
    if (needed(limit) > most_) return;  // no document of the window can reach it
    const int64_t blocks = row_bytes(count_) / kRowBlock;
    uint16_t* sums = sums_.get() + begin;
    add(blocks, sums);
    if (documents_.mask) search_kernels().clear(documents_.mask + first_, count_, sums);
    if (limit == -kInfinity) {
      const int64_t sum = kth_sum(sums, blocks, candidates.k());
      if (sum) query.limit.raise(bound_of(sum), candidates.share());
      limit = query.limit.get();
    }
    const int64_t from = needed(limit);
    if (from > most_) return;  // by a limit that another thread has raised meanwhile
    const int64_t count =
        search_kernels().find_from(sums, blocks, static_cast<uint16_t>(from), found_.get());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t d = found_[i];  // of those that `clear` took, where a sum of 0 is enough
      if (d < count_ && (!documents_.mask || documents_.mask[first_ + d]))
        candidates.push(bound_of(sums[d]), first_ + d);
    }
    candidates.settle(query.limit);
  }

 private:
  struct Term {
    int64_t place;  // in the window
    double most;    // that it adds to a score
    uint16_t weight;
    Postings postings;
  };

  // Every document, whatever its terms.
  void take_all(Candidates& candidates) const {
    for (int64_t i = first_; i < first_ + count_; ++i)
      if (!documents_.mask || documents_.mask[i]) candidates.push(kInfinity, i);
  }

  // -1 where the window lacks the term. As terms rise, one stands at its own number less at most
  // as many places as the window lacks terms, which is none or few where documents are many. The
  // steps have no branches, so that the processor looks up several terms at once.
  static int64_t place_of(const Window& window, int32_t term) {
    if (!window.count) return -1;
    const int64_t last = window.count - 1, lacking = window.terms[last] - last;
    const int64_t low = std::clamp<int64_t>(term - lacking, 0, last);
    const int32_t* at = window.terms + low;
    for (int64_t left = std::clamp<int64_t>(term, low, last) - low + 1; left > 1;) {
      const int64_t half = left / 2;
      at += half * (at[half - 1] < term);
      left -= half;
    }
    return *at == term ? at - window.terms : -1;
  }

  void find_terms(const Window& window, const Query& query) {
    terms_.clear();
    for (int64_t i = 0; i < query.count; ++i) {
      if (!(query.weights[i] > 0)) continue;
      const int64_t place = place_of(window, query.terms[i]);
      if (place < 0) continue;
      const double most = 255.0 * window.scales[place] * query.weights[i];
      // Values that are all 0 add nothing; a scale that is no number comes from a broken file.
      if (most > 0 && std::isfinite(most)) terms_.push_back({place, most, 0, {}});
    }
    const auto cut = static_cast<size_t>(pruning_.query_cut);
    if (!cut || terms_.size() <= cut) return;
    std::nth_element(terms_.begin(), terms_.begin() + (cut - 1), terms_.end(),
                     [](const Term& a, const Term& b) { return a.most > b.most; });
    terms_.resize(cut);
  }

  // Each is a cache miss or two, so all are fetched before the first is looked at, and none of the
  // terms that are left out.
  void find_postings(const Window& window, int64_t begin, int64_t end) {
    for (const Term& term : terms_) prefetch_postings(window, term.place);
    for (Term& term : terms_) {
      Postings& p = term.postings = postings_of(window, term.place);
      if (p.row) p.row += begin;
      else if (end - begin < window.documents) {
        const auto from = std::lower_bound(p.documents, p.documents + p.count, begin);
        const auto to = std::lower_bound(from, p.documents + p.count, end);
        p = {nullptr, from, p.values + (from - p.documents), to - from};
      }
    }
  }

  void drop_blocks(float limit) {
    const double from = pruning_.block_factor * limit;
    if (!(from > 0)) return;
    terms_.erase(std::remove_if(terms_.begin(), terms_.end(),
                                [&](const Term& term) { return term.most < from; }),
                 terms_.end());
  }

  // Weights in a unit by which the sums stay below 2^16. Of many terms, one that holds nearly all of
  // the total may be cut off at 65,535: by less than the 1 that every term is granted for rounding.
  void weigh() {
    double total = 0;
    for (const Term& term : terms_) total += term.most;
    const auto count = static_cast<int64_t>(terms_.size());
    visible_ = count <= kVisibleTerms;
    const int64_t least = visible_ ? 256 : 0;  // of a weight: any posting shows in the sum
    unit_ = static_cast<double>(kMostSum - count * (least + 1)) / total;
    most_ = 0;
    for (Term& term : terms_) {
      const double weight = std::ceil(term.most * unit_ * (256.0 / 255));
      term.weight =
          static_cast<uint16_t>(std::clamp<double>(weight, static_cast<double>(least), kMostSum));
      most_ += 255 * term.weight >> 8;
    }
  }

  // Above the score of a document with this sum: each term lost less than 1 to rounding.
  float bound_of(int64_t sum) const {
    return static_cast<float>(static_cast<double>(sum + static_cast<int64_t>(terms_.size())) /
                              unit_);
  }
  // The least sum of such a bound; not 0 where every common term shows.
  int64_t needed(float limit) const {
    const double least = visible_ ? 1 : 0;
    const double sum = limit * unit_ * (1 - 0x1p-22) - static_cast<double>(terms_.size());
    return static_cast<int64_t>(limit > 0 ? std::clamp<double>(sum, least, kMostSum + 1) : least);
  }

  void add(int64_t blocks, uint16_t* sums) {
    rows_.clear();
    row_weights_.clear();
    for (const Term& term : terms_)
      if (term.postings.row) {
        rows_.push_back(term.postings.row);
        row_weights_.push_back(term.weight);
      }
    search_kernels().add_rows(rows_.data(), row_weights_.data(), static_cast<int64_t>(rows_.size()),
                              blocks, sums);
    for (const Term& term : terms_)
      if (!term.postings.row)
        search_kernels().add_list(term.postings.documents, term.postings.values,
                                  term.postings.count, term.weight, sums_.get());
  }

  // A sum that at least k documents of the window have, 0 where none is found. The largest of
  // disjoint groups belong to different documents; where groups are many more than k, the k-th of
  // these is hardly less than that of all. Two passes over the sums, this and find_from: 3 us of
  // 65,536 documents.
  int64_t kth_sum(const uint16_t* sums, int64_t blocks, int64_t k) {
    const int64_t depth = k <= kFewGroups / 16 ? kWindow / kFewGroups : 8;
    const int64_t groups = blocks * kRowBlock / depth / kRowBlock * kRowBlock;
    if (groups < 4 * k) return bisect(sums, blocks, k);
    search_kernels().group_most(sums, groups, depth, found_.get());
    return bisect(found_.get(), groups / kRowBlock, k);
  }

  // The largest sum that at least k have.
  static int64_t bisect(const uint16_t* sums, int64_t blocks, int64_t k) {
    int64_t low = 0, high = kMostSum;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      const bool reached =
          search_kernels().count_from(sums, blocks, static_cast<uint16_t>(middle)) >= k;
      (reached ? low : high) = reached ? middle : middle - 1;
    }
    return low;
  }

  const Documents& documents_;
  const Pruning& pruning_;
  AlignedBuffer<uint16_t> sums_, found_;
  std::vector<Term> terms_;
  std::vector<const uint8_t*> rows_;
  std::vector<uint16_t> row_weights_;
  int64_t first_ = 0, count_ = 0;  // documents
  double unit_ = 0;                // of a score, in the sums
  int64_t most_ = 0;               // that a sum can be
  bool visible_ = true;
};

// --- Settling ------------------------------------------------------------------------------------

// The hits [begin, end) of those candidates.
void score(const Forward& forward, const Weights& weights, const std::vector<Candidate>& candidates,
           int64_t begin, int64_t end, Hit* hits) {
  constexpr int64_t kAhead = 6, kFarAhead = 16;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kFarAhead < end)
      __builtin_prefetch(forward.indptr + candidates[i + kFarAhead].document);
    if (i + kAhead < end) prefetch(forward, candidates[i + kAhead].document);
    const int64_t document = candidates[i].document;
    hits[i] = {key_from_float(0.0f - weights.score(forward, document)), document};
  }
}

// By keys, digit by digit from the last, and ids within equal keys: a thousand in 8 us, where
// comparisons, whose outcome no one could foresee, take 40.
void sort(std::vector<Hit>& hits) {
  if (hits.size() < 256) return std::sort(hits.begin(), hits.end());
  uint32_t differ = 0;
  for (const Hit& hit : hits) differ |= hit.key ^ hits[0].key;
  std::vector<Hit> sorted(hits.size());
  for (int shift = 0; shift < 32; shift += 8) {
    if (!(differ >> shift & 255)) continue;
    size_t places[256] = {}, total = 0;
    for (const Hit& hit : hits) ++places[hit.key >> shift & 255];
    for (size_t& place : places) place = std::exchange(total, total + place);
    for (const Hit& hit : hits) sorted[places[hit.key >> shift & 255]++] = hit;
    hits.swap(sorted);
  }
  for (auto run = hits.begin(); run != hits.end();) {
    const auto end = std::find_if(run, hits.end(), [&](const Hit& h) { return h.key != run->key; });
    if (end - run > 1) std::sort(run, end);
    run = end;
  }
}

// The k best of the candidates, in order. Where bounds are bounds, k of the best are scored first,
// or a few more, and their worst score says which of the others may do better: `enough` becomes the
// least such bound.
std::vector<Hit> settle(const Documents& documents, const Query& query,
                        std::vector<Candidate>& candidates, int64_t k, bool exact, float* enough) {
  Weights weights;
  weights.set(query.terms, query.weights, query.count);
  const auto all = static_cast<int64_t>(candidates.size());
  const auto from = [&](int64_t begin, float bound) {  // keeps the order, which is nearly that of
    return std::stable_partition(candidates.begin() + begin, candidates.end(),  // the rows
                                 [&](const Candidate& c) { return c.bound >= bound; }) -
           candidates.begin();
  };
  const bool some = exact && 0 < k && k < all;
  const int64_t first = some ? from(0, kth_bound(candidates, k)) : all;
  std::vector<Hit> hits(all);
  const auto score_part = [&](int64_t start, int64_t to) {
    constexpr int64_t kStep = 64;
    parallel_for_if(to - start >= 4 * kStep, ceil_div(to - start, kStep), [&](int64_t task) {
      const int64_t begin = start + task * kStep;
      score(documents.forward, weights, candidates, begin, std::min(to, begin + kStep),
            hits.data());
    });
  };
  score_part(0, first);
  int64_t end = first;
  *enough = -kInfinity;
  if (exact && first >= k && k) {
    // Bounds and scores have been rounded.
    const float worst = -float_from_key(std::max_element(hits.begin(), hits.begin() + first)->key);
    const float least = std::min(worst, std::numeric_limits<float>::max());
    *enough = least - std::fabs(least) * 0x1p-22f;
    end = from(first, *enough);
    score_part(first, end);
  }
  hits.resize(end);
  sort(hits);
  if (static_cast<int64_t>(hits.size()) > k) hits.resize(k);
  return hits;
}

// The rest of a result in which documents without a common term have a place: those that score 0,
// in order. `best` is sorted.
void fill(const Documents& documents, std::vector<Hit>& best, int64_t k) {
  const uint32_t zero = key_from_float(0);
  while (!best.empty() && best.back().key >= zero) best.pop_back();
  if (static_cast<int64_t>(best.size()) >= k) return;
  std::vector<int64_t> taken;
  for (const Hit& hit : best) taken.push_back(hit.id);
  std::sort(taken.begin(), taken.end());
  auto next = taken.begin();
  for (int64_t i = 0; i < documents.forward.documents && static_cast<int64_t>(best.size()) < k;
       ++i) {
    if (next != taken.end() && *next == i) ++next;
    else if (!documents.mask || documents.mask[i]) best.push_back({zero, i});
  }
}

}  // namespace

void topk(const Documents& documents, const SparseQueries& queries, int64_t k,
          const Pruning& pruning, float* scores, int64_t* found) {
  const int64_t nq = queries.count, windows = static_cast<int64_t>(documents.windows.size());
  const int64_t keep = std::min(k, documents.forward.documents);
  if (nq == 0 || k == 0) return;
  std::unique_ptr<Query[]> all(new Query[nq]);
  for (int64_t q = 0; q < nq; ++q) {
    Query& query = all[q];
    const int64_t begin = queries.indptr[q];
    query.terms = queries.terms + begin;
    query.weights = queries.weights + begin;
    query.count = queries.indptr[q + 1] - begin;
    query.negative = std::any_of(query.weights, query.weights + query.count,
                                 [](float weight) { return weight < 0; });
  }
  // Many queries are split into groups, few over the windows.
  const int64_t threads = num_threads();
  const int64_t group = std::clamp<int64_t>(ceil_div(nq, threads), 1, kGroup);
  const int64_t groups = ceil_div(nq, group);
  // Blocks are passed over by what was found before them, which must not depend on threads.
  // A window or two are searched before another thread has woken.
  const bool alone = pruning.block_factor > 0 || windows < 4;
  const int64_t split = alone ? 1 : ceil_div(threads, groups);
  // Few windows in halves, so that threads have the same to do.
  const int64_t piece = split > 1 && windows < 4 * split ? kWindow / 2 : kWindow;
  const int64_t pieces = ceil_div(documents.forward.documents, piece);
  const int64_t parts = keep ? std::clamp<int64_t>(split, 1, pieces) : 0;
  std::vector<Candidates> candidates(nq * std::max<int64_t>(parts, 1));
  const bool exact = !pruning.query_cut && pruning.block_factor == 0 && pruning.alpha == 1;
  for (Candidates& c : candidates) c.start(keep, kShare * static_cast<float>(pruning.alpha));
  const bool worth = documents.forward.documents * nq >= 4096;
  parallel_for_if(worth, groups * parts, [&](int64_t task) {
    const int64_t first = task / parts * group, part = task % parts;
    Searcher searcher(documents, pruning);
    for (int64_t p = part; p < pieces; p += parts) {
      const int64_t w = p * piece / kWindow, begin = p * piece % kWindow;
      const int64_t end = std::min(begin + piece, documents.windows[w].documents);
      for (int64_t q = first; q < std::min(nq, first + group); ++q)
        searcher.search(w, begin, end, all[q], candidates[q * parts + part]);
    }
  });
  const uint32_t zero = key_from_float(0);
  // Few queries are settled one after the other, each by all threads.
  parallel_for_if(worth && nq >= 2 * threads, nq, [&](int64_t q) {
    Query& query = all[q];
    Candidates gathered;
    gathered.start(keep, candidates[q * std::max<int64_t>(parts, 1)].share());
    for (int64_t part = 0; part < parts; ++part) {
      const std::vector<Candidate>& some = candidates[q * parts + part].all();
      gathered.all().insert(gathered.all().end(), some.begin(), some.end());
    }
    gathered.cut(query.limit);
    float enough;  // -inf after a pruned search
    std::vector<Hit> hits = settle(documents, query, gathered.all(), keep, exact, &enough);
    const auto positive = [&] {
      return keep == 0 || (static_cast<int64_t>(hits.size()) == keep && hits.back().key < zero);
    };
    // All windows once more, with all terms, from a limit on.
    const auto search_from = [&](float limit, float share) {
      Query again{query.terms, query.weights, query.count, query.negative, {}};
      again.limit.raise(limit, 1);
      Candidates more;
      more.start(keep, share);
      const Pruning none;
      Searcher searcher(documents, none);
      for (int64_t w = 0; w < windows; ++w)
        searcher.search(w, 0, documents.windows[w].documents, again, more);
      hits = settle(documents, query, more.all(), keep, true, &enough);
      return again.limit.get();
    };
    float limit = query.limit.get();
    // Documents that share no term that was looked up have a place.
    if (!exact && !positive()) limit = search_from(-kInfinity, kShare);
    // Documents were dropped that the limit known now admits.
    if (enough > -kInfinity && enough < limit) search_from(enough, 0);
    if (!positive() && query.negative) {
      // Documents may score below those without a common term, and terms of negative weight were
      // not looked up.
      std::vector<Candidate> every;
      for (int64_t i = 0; i < documents.forward.documents; ++i)
        if (!documents.mask || documents.mask[i]) every.push_back({kInfinity, i});
      hits = settle(documents, query, every, keep, true, &enough);
    } else if (!positive()) {
      fill(documents, hits, keep);
    }
    for (int64_t i = 0; i < k; ++i) {
      const bool present = i < static_cast<int64_t>(hits.size());
      scores[q * k + i] = present ? 0.0f - float_from_key(hits[i].key) : -kInfinity;
      found[q * k + i] = present ? hits[i].id : -1;
    }
  });
}

}  // namespace pentad::sparse
