// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels, executed on the CPU lane by lane, against the definitions: odd sizes, strides,
// every option, each order of the lanes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "orders.h"
#include "sparse/score_cuda.h"
#include "sparse/search_cuda.h"
#include "sparse/splade_cuda.h"
#include "splade_case.h"

using namespace pentad;
using namespace pentad::sparse;

namespace {

const CudaStream stream;

// Memory of exactly this size, so that the sanitizer sees what goes past it.
std::vector<char> room(int64_t bytes) { return std::vector<char>(bytes, 7); }

void cuda_forward(const SpladeHead& head, const SpladeOutputs& outputs) {
  auto scratch = room(cuda::splade_scratch(head.batch(), head.length()));
  cuda::splade_head(stream, head, outputs, scratch.data());
}

void cuda_backward(const SpladeHead& head, const SpladeGradients& gradients) {
  auto scratch = room(cuda::splade_backward_scratch(head));
  cuda::splade_head_backward(stream, head, gradients, scratch.data());
}

void as_the_definition(Case& c) {
  const Results want = c.run(reference_splade_head, reference_splade_head_backward);
  const Results got = c.run(cuda_forward, cuda_backward, &want);
  // A rounding to the dtype, or two in the gradients of a sum, and those of sums in float32.
  const double allowed = c.dtype == DType::f32 ? 3e-6 : c.dtype == DType::f16 ? 1e-3 : 8e-3;
  for (int i = 0; i < 4; ++i)
    CHECK(furthest(got.arrays[i], want.arrays[i], c.dtype) < allowed, static_cast<int>(c.dtype),
          c.dim, i, furthest(got.arrays[i], want.arrays[i], c.dtype));
  for (int64_t i = 0; i < c.b * c.vocab && c.head.pooling == SpladePooling::max; ++i)
    CHECK(got.place[i] == want.place[i] ||
              std::abs(got.top[i] - want.top[i]) <= 1e-5 * (1 + want.top[i]),
          c.dim, i, got.place[i], want.place[i]);
}

void heads() {
  for (DType dtype : {DType::f32, DType::bf16, DType::f16})
    for (auto [b, length, dim, vocab] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{2, 1, 1, 1},
                                         {3, 13, 16, 130},
                                         {2, 150, 37, 20},
                                         {2, 7, 1072, 9},
                                         {40, 5, 24, 7}})
      for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum}) {
        Case c(b, length, dim, vocab, dtype);
        c.head.pooling = pooling;
        c.head.activation = static_cast<SpladeActivation>(dim % 2);
        if (dim == 24) c.head.mask.reset(), c.head.bias.reset();
        as_the_definition(c);
      }
}

// Every array with other strides: hidden as (L, B, H) with a gap, weight as columns, d_out turned.
void strided_heads() {
  for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum})
    for (DType dtype : {DType::f32, DType::bf16}) {
      Case c(3, 20, 16, 24, dtype);
      c.head.pooling = pooling;
      std::vector<char> wide = reals(20 * 3 * 24, dtype, 1);
      c.head.hidden.data = wide.data();
      c.head.hidden.strides[0] = 24, c.head.hidden.strides[1] = 3 * 24;
      as_the_definition(c);
      c.head.weight.strides[0] = 1, c.head.weight.strides[1] = 24;
      c.head.hidden.strides[2] = 1, c.head.hidden.strides[0] = 20, c.head.hidden.strides[1] = 60;
      std::vector<float> mask(3 * 40);
      for (size_t i = 0; i < mask.size(); ++i) mask[i] = static_cast<float>(generator() % 2);
      c.head.mask = view(mask.data(), DType::f32, {3, 20});
      c.head.mask->strides[0] = 40, c.head.mask->strides[1] = 2;
      as_the_definition(c);
    }
}

// NaN of a token is NaN of all its words and found at the first token; that of a masked one is not
// read. A mask of other numbers gives NaN too.
void nans() {
  for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum}) {
    Case c(3, 5, 8, 6, DType::f32);
    c.head.pooling = pooling;
    std::fill(c.mask.begin(), c.mask.end(), 1);
    c.mask[5] = c.mask[2] = 0;
    float* hidden = reinterpret_cast<float*>(c.hidden.data());
    hidden[2 * 8 + 3] = NAN;  // masked
    hidden[8 * 8 + 3] = NAN;  // token 3 of the second sequence
    Results r = c.run(cuda_forward, cuda_backward);
    const auto number = [&](int array, int64_t i) {
      return reinterpret_cast<const float*>(r.arrays[array].data())[i];
    };
    for (int64_t v = 0; v < 6; ++v) {
      CHECK(!std::isnan(number(0, v)) && std::isnan(number(0, 6 + v)), v);
      if (pooling == SpladePooling::max) CHECK(r.place[6 + v] == 1, v, r.place[6 + v]);
      CHECK(std::isnan(number(3, v)), v);
    }
    for (int64_t h = 0; h < 8; ++h) {
      CHECK(!std::isnan(number(1, h)) && number(1, 2 * 8 + h) == 0, h);
      const int64_t at = pooling == SpladePooling::max ? 6 : 8;
      CHECK(std::isnan(number(1, at * 8 + h)), h);
    }
    c.mask[0] = 2;
    r = c.run(cuda_forward, [](auto&&...) {});
    for (int64_t v = 0; v < 6; ++v) CHECK(std::isnan(number(0, v)), v);
  }
}

void empty_heads() {
  for (SpladePooling pooling : {SpladePooling::max, SpladePooling::sum})
    for (auto [b, length, dim, vocab] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{0, 3, 4, 5},
                                         {2, 0, 4, 5},
                                         {2, 3, 0, 5},
                                         {2, 3, 4, 0}}) {
      Case c(b, length, dim, vocab, DType::bf16);
      c.head.pooling = pooling;
      as_the_definition(c);
    }
}

// --- Scores --------------------------------------------------------------------------------------

struct Sample {
  int64_t rows, columns;
  std::vector<int64_t> indptr{0};
  std::vector<int32_t> indices;
  std::vector<float> values;

  Sample(int64_t rows, int64_t columns, int most) : rows(rows), columns(columns) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<int32_t> terms(columns);
      for (int64_t j = 0; j < columns; ++j) terms[j] = static_cast<int32_t>(j);
      std::shuffle(terms.begin(), terms.end(), generator);
      terms.resize(std::min<int64_t>(columns, generator() % (most + 1)));
      std::sort(terms.begin(), terms.end());
      for (int32_t term : terms) indices.push_back(term), values.push_back(normal(generator));
      indptr.push_back(static_cast<int64_t>(indices.size()));
    }
    indices.shrink_to_fit(), values.shrink_to_fit();
  }
  Rows<float> view() const {
    return {rows, static_cast<int64_t>(indices.size()), indptr.data(), indices.data(),
            values.data()};
  }
};

std::vector<float> numbers(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<float> out(n);
  for (float& x : out) x = normal(generator);
  return out;
}

// The bits of the CPU's scores, whose own tests hold them to the definition; gradients may differ by
// the order of double sums.
void scores(const Sample& q, const Sample& d) {
  const int64_t size = q.rows * d.rows, nq = q.indices.size(), nd = d.indices.size();
  std::vector<float> got(size), want(size), dq(nq), dd(nd), want_dq(nq), want_dd(nd);
  auto scratch = room(cuda::score_scratch(q.rows, q.columns));
  cuda::score(stream, q.view(), d.view(), q.columns, got.data(), scratch.data());
  score(q.view(), d.view(), want.data());
  CHECK(got == want, q.rows, d.rows);

  const std::vector<float> g = numbers(size);
  scratch = room(cuda::score_backward_scratch(q.rows, d.rows, nq, nd, q.columns));
  cuda::score_backward(stream, q.view(), d.view(), q.columns, g.data(), dq.data(), dd.data(),
                       scratch.data());
  score_backward(q.view(), d.view(), g.data(), want_dq.data(), want_dd.data());
  for (int64_t i = 0; i < nq; ++i) CHECK(std::abs(dq[i] - want_dq[i]) < 1e-5, i, dq[i], want_dq[i]);
  for (int64_t i = 0; i < nd; ++i) CHECK(std::abs(dd[i] - want_dd[i]) < 1e-5, i, dd[i], want_dd[i]);
}

void pairs_of(const Sample& q, const Sample& d, int64_t count) {
  std::vector<int64_t> query(count), doc(count);
  for (int64_t p = 0; p < count; ++p)
    query[p] = generator() % q.rows, doc[p] = generator() % d.rows;
  const Pairs pairs{count, query.data(), doc.data()};
  std::vector<float> got(count), want(count);
  cuda::score_pairs(stream, q.view(), d.view(), pairs, got.data());
  score_pairs(q.view(), d.view(), pairs, want.data());
  CHECK(got == want, count);

  const std::vector<float> g = numbers(count);
  std::vector<float> grads[2], expected[2];
  for (int side = 0; side < 2; ++side) {
    const Sample &own = side ? d : q, &other = side ? q : d;
    const std::vector<int64_t>&rows = side ? doc : query, &others = side ? query : doc;
    std::vector<int64_t> order(count), starts(own.rows + 1);
    for (int64_t p = 0; p < count; ++p) order[p] = p, ++starts[rows[p] + 1];
    for (int64_t r = 0; r < own.rows; ++r) starts[r + 1] += starts[r];
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return rows[a] < rows[b]; });
    grads[side].resize(own.indices.size()), expected[side].resize(own.indices.size());
    cuda::score_pairs_backward(stream, own.view(), other.view(),
                               {starts.data(), order.data(), others.data(), count}, g.data(),
                               grads[side].data());
  }
  score_pairs_backward(q.view(), d.view(), pairs, g.data(), expected[0].data(), expected[1].data());
  for (int side = 0; side < 2; ++side)
    for (size_t i = 0; i < grads[side].size(); ++i)
      CHECK(std::abs(grads[side][i] - expected[side][i]) < 1e-5, side, i);
}

// --- Search --------------------------------------------------------------------------------------

// Against a sort of the scores, with few distinct values so that there are ties.
void searches(Sample docs, Sample q, int64_t k, bool masked) {
  for (float& v : docs.values) v = static_cast<float>(generator() % 3);
  for (float& v : q.values) v = static_cast<float>(generator() % 3) - 1;
  std::vector<int64_t> windows{0}, starts{0};
  std::vector<int32_t> terms;
  std::vector<int16_t> places;
  std::vector<float> values;
  for (int64_t first = 0; first < docs.rows; first += cuda::kWindowRows) {
    const int64_t last = std::min(first + cuda::kWindowRows, docs.rows);
    for (int32_t term = 0; term < docs.columns; ++term) {
      for (int64_t i = first; i < last; ++i)
        for (int64_t e = docs.indptr[i]; e < docs.indptr[i + 1]; ++e)
          if (docs.indices[e] == term)
            places.push_back(static_cast<int16_t>(i - first)), values.push_back(docs.values[e]);
      if (static_cast<int64_t>(places.size()) == starts.back()) continue;
      terms.push_back(term), starts.push_back(static_cast<int64_t>(places.size()));
    }
    windows.push_back(static_cast<int64_t>(terms.size()));
  }
  std::vector<uint8_t> mask(docs.rows);
  for (uint8_t& m : mask) m = generator() % 2;
  std::vector<float> all(q.rows * docs.rows), scores(q.rows * k);
  std::vector<int64_t> ids(q.rows * k);
  auto scratch = room(cuda::search_scratch(q.rows, docs.rows, k));
  cuda::search(stream,
               {docs.rows, static_cast<int64_t>(terms.size()), static_cast<int64_t>(places.size()),
                windows.data(), terms.data(), starts.data(), places.data(), values.data(),
                masked ? mask.data() : nullptr},
               q.view(), k, scores.data(), ids.data(), scratch.data());
  score(q.view(), docs.view(), all.data());
  for (int64_t b = 0; b < q.rows; ++b) {
    std::vector<int64_t> order;
    for (int64_t i = 0; i < docs.rows; ++i)
      if (!masked || mask[i]) order.push_back(i);
    const float* row = all.data() + b * docs.rows;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t x, int64_t y) { return row[x] > row[y]; });
    for (int64_t r = 0; r < k; ++r) {
      const bool exists = r < static_cast<int64_t>(order.size());
      CHECK(ids[b * k + r] == (exists ? order[r] : -1), docs.rows, b, r);
      CHECK(scores[b * k + r] == (exists ? row[order[r]] : -INFINITY), docs.rows, b, r);
    }
  }
}

// --- The largest of each row -----------------------------------------------------------------------

void largest(DType dtype, int64_t n, int64_t d, int64_t k, bool absolute, bool turned) {
  const int64_t size = size_of(dtype);
  std::vector<char> x(n * d * size);
  const double odd[] = {0.0, -0.0, NAN, INFINITY, -INFINITY};
  for (int64_t i = 0; i < n * d; ++i)
    write_real(
        x.data(), dtype, i,
        generator() % 9 ? static_cast<double>(generator() % 64) / 8 - 4 : odd[generator() % 5]);
  const FloatRows rows{x.data(), dtype, n, d, turned ? 1 : d, turned ? n : 1};
  std::vector<int32_t> narrow(n * k), want_narrow(n * k);
  std::vector<int64_t> wide(n * k);
  std::vector<char> values(n * k * size), want_values(n * k * size), out(n * d * size, 7),
      want_out(n * d * size);
  cuda::select_topk(stream, rows, k, absolute, narrow.data(), DType::i32, values.data(), nullptr);
  cuda::select_topk(stream, rows, k, absolute, wide.data(), DType::i64, nullptr, out.data());
  select_topk(rows, k, absolute, want_narrow.data(), DType::i32, want_values.data());
  sparsify_topk(rows, k, absolute, want_out.data());
  CHECK(narrow == want_narrow, static_cast<int>(dtype), n, d, k);
  CHECK(std::equal(wide.begin(), wide.end(), want_narrow.begin()), n, d, k);
  CHECK(values == want_values, static_cast<int>(dtype), n, d, k);
  CHECK(out == want_out, static_cast<int>(dtype), n, d, k);
}

}  // namespace

int main() {
  in_every_order([] {
    scores(Sample(1, 1, 1), Sample(1, 1, 1));
    scores(Sample(3, 50, 20), Sample(70, 50, 45));
    scores(Sample(70, 50, 20), Sample(33, 50, 45));
    scores(Sample(5, 7, 0), Sample(4, 7, 5));
    scores(Sample(0, 7, 3), Sample(4, 7, 5));
    scores(Sample(4, 7, 3), Sample(0, 7, 5));
    pairs_of(Sample(5, 200, 90), Sample(6, 200, 180), 37);
    pairs_of(Sample(5, 20, 9), Sample(6, 20, 18), 0);
    searches(Sample(0, 5, 3), Sample(2, 5, 3), 4, false);
    searches(Sample(700, 30, 12), Sample(3, 30, 9), 10, true);
    searches(Sample(300, 400, 60), Sample(1, 400, 390), 400, false);
    searches(Sample(8500, 10, 3), Sample(2, 10, 5), 30, false);
    for (DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (bool absolute : {false, true}) {
        largest(dtype, 3, 1, 1, absolute, false);
        largest(dtype, 2, 700, 5, absolute, true);
        largest(dtype, 2, 1100, 600, absolute, false);
        largest(dtype, 1, 30, 30, absolute, false);
        largest(dtype, 2, 30, 0, absolute, false);
      }
    heads();
    strided_heads();
    nans();
    empty_heads();
  });
  return report();
}
