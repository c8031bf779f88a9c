// SPDX-License-Identifier: Apache-2.0
// Random problems of matrix_scan.h.
#pragma once
#include "scan/matrix_scan.h"
#include "scan_case.h"

namespace pentad::scan::test {

// Less than a vector, whole ones, a rest, and more than a block.
inline int64_t random_size() {
  const int64_t sizes[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100, 128, 130};
  return sizes[pick(0, 17)];
}

// What the sequence and the token share.
template <class P>
struct MatricesCase : Case<P> {
  using Case<P>::p;
  using Case<P>::in;
  using Case<P>::dtype;
  using Case<P>::small;
  using Case<P>::text;
  using Case<P>::option;
  using Case<P>::size;

  MatricesCase(DType type, bool is_small) : Case<P>(type, is_small) {
    // Many heads of a group are several jobs of the backward pass.
    const bool many = !small && chance(0.15);
    p.keys = small ? pick(1, 3) : many ? pick(1, 17) : random_size();
    p.values = small ? pick(1, 3) : many ? pick(1, 17) : random_size();
    // The most that the bindings let through, and what is padded up to it.
    if (!small && !many && chance(0.04))
      (chance(0.5) ? p.keys : p.values) = chance(0.5) ? 1009 : 1024;
    p.groups = pick(1, 2);
    p.heads = p.groups * (many ? pick(7, 14) : pick(1, 2));
    if (!small && chance(0.02)) p.heads = 0;
    p.delta = option("delta", 0.5);
    p.key_decay = option("key_decay", 0.35);
    const double scales[] = {1, 0.3, -2};
    p.scale = scales[pick(0, 2)];
  }
  MatricesCase(const MatricesCase&) = delete;

 protected:
  // What lies between the elements of an input is not to be read.
  Array& input(const char* name, DType type, Shape shape, const std::function<double()>& f) {
    Array x = this->array(type, std::move(shape));
    for (int64_t i = 0; i < x.size(); ++i) write_real(x.memory.data(), type, i, NAN);
    x.fill(f);
    return in.add(name, std::move(x));
  }

  void draw(const Shape& like_q, const Shape& like_v, const Shape& like_w) {
    const auto one = [] { return normal(); };
    input("q", dtype, like_q, one);
    Array& k = input("k", dtype, like_q, one);
    // With keys of length 1 and w from 0 to 2 no step of the delta rule makes a state longer.
    if (p.delta) normalise(k);
    input("v", dtype, like_v, one);
    Shape like_a = like_w;
    if (p.key_decay) like_a.push_back(p.keys);
    const bool edges = option("edges", 0.4), tiny = option("tiny", 0.1);
    // A decay of all keys needs its array.
    if (p.key_decay || option("a", 0.8))
      input("a", wide(dtype), like_a, [&] {
        const double special[] = {0, 1, -0.7, 1.1};
        if (edges && chance(0.2)) return special[pick(0, 3)];
        return tiny ? uniform(0, 1e-12) : chance(0.3) ? uniform(0, 1) : uniform(0.9, 1);
      });
    const bool twice = p.delta && option("twice", 0.2);
    if (option("w", 0.7))
      input("w", wide(dtype), like_w,
            [&] { return p.delta ? uniform(0, twice ? 2 : 1) : normal(); });
    if (option("d", 0.5)) input("d", wide(dtype), {p.heads, p.values}, one);
    size("b", p.batch), size("h", p.heads), size("g", p.groups);
    size("n", p.keys), size("p", p.values);
    text = std::string(" ") + dtype_text(dtype) + text;
  }

 private:
  void normalise(Array& k) {
    for (int64_t from = 0; from < k.count(); from += p.keys) {
      std::vector<double> key(p.keys);
      double sum = 0;
      for (int64_t n = 0; n < p.keys; ++n) key[n] = k.get(from + n), sum += key[n] * key[n];
      for (int64_t n = 0; n < p.keys; ++n) k.set(from + n, key[n] / std::sqrt(sum));
    }
  }
};

struct MatrixCase : MatricesCase<MatrixScan> {
  DType out_dtype;

  MatrixCase(DType type, bool is_small) : MatricesCase(type, is_small), out_dtype(type) {
    const int64_t lengths[] = {0, 1, 2, 3, 17, 63, 64, 65, 128, 130, 300};
    // Of the small ones some have a second chunk.
    p.length = !small ? lengths[pick(0, 10)] : chance(0.05) ? kMatrixChunk + 2 : pick(0, 4);
    p.batch = !small && chance(0.03) ? 0 : pick(1, 2);
    // A limit to the time that the definition takes.
    if (std::max(p.keys, p.values) > 1000) p.length = std::min<int64_t>(p.length, 65);
    if (p.length * p.heads * p.keys * p.values > 1 << 20) p.batch = 1, p.heads = p.groups = 1;
    p.reverse = option("reverse", 0.3);
    if (option("packed", 0.3)) {
      p.batch = 1;
      p.begin = random_pieces(p.length);
    }
    if (option("wide out", 0.3)) out_dtype = wide(type);
    draw(like_q(), like_v(), like_w());
    if (option("initial", 0.5))
      input("initial", wide(dtype), like_state(), [] { return normal(); });
    size("t", p.length);
    bind(in);
  }

  void bind(const Arrays& from) {
    p.q = from["q"], p.k = from["k"], p.v = from["v"], p.a = from["a"], p.w = from["w"];
    p.d = from["d"], p.initial = from["initial"];
  }
  Shape like_q() const { return {p.batch, p.length, p.groups, p.keys}; }
  Shape like_v() const { return {p.batch, p.length, p.heads, p.values}; }
  Shape like_w() const { return {p.batch, p.length, p.heads}; }
  Shape like_state() const { return {p.sequences(), p.heads, p.keys, p.values}; }
  size_t stored_size() const {
    return stored_matrices(p.batch, p.length, !p.begin.empty(), p.sequences()) * p.heads * p.keys *
           p.values;
  }

  // What forward writes.
  Arrays results() const {
    Arrays blank;
    blank.add("out", {out_dtype, like_v(), false});
    if (small || chance(0.7)) blank.add("last", {wide(dtype), like_state(), false});
    return blank;
  }
  // What backward writes, with `d` before the names of the inputs.
  Arrays gradients() const {
    Arrays blank;
    for (const auto& [key, array] : in.list) {
      if (!small && chance(0.1)) continue;
      const bool own = key == "q" || key == "k" || key == "v";
      blank.add(("d" + key).c_str(), {own ? dtype : wide(dtype), array.shape, false});
    }
    return blank;
  }
  static MatrixScanGradients gradients_of(const Arrays& given, const float* stored,
                                          const Arrays& to) {
    MatrixScanGradients g;
    g.d_out = given["out"], g.d_last = given["last"], g.stored = stored;
    g.dq = to["dq"], g.dk = to["dk"], g.dv = to["dv"], g.da = to["da"], g.dw = to["dw"];
    g.dd = to["dd"], g.dinitial = to["dinitial"];
    return g;
  }
};

struct MatrixUpdateCase : MatricesCase<MatrixUpdate> {
  Array state;

  explicit MatrixUpdateCase(DType type, bool is_small = false)
      : MatricesCase(type, is_small), state(type, {}) {
    p.batch = chance(0.05) ? 0 : pick(1, 4);
    int64_t rows = p.batch;
    if (option("rows", 0.5)) {
      rows += pick(0, 2);
      p.rows = random_rows(p.batch, rows);
    }
    text = " update" + text;
    draw({p.batch, p.groups, p.keys}, {p.batch, p.heads, p.values}, {p.batch, p.heads});
    const DType dtypes[] = {dtype, DType::f32, DType::bf16, DType::f16};
    state = {
        dtype == DType::f64 ? dtype : dtypes[pick(0, 3)], {rows, p.heads, p.keys, p.values}, false};
    state.fill([] { return normal(); });
    bind(in);
  }

  void bind(const Arrays& from) {
    p.q = from["q"], p.k = from["k"], p.v = from["v"], p.a = from["a"], p.w = from["w"];
    p.d = from["d"];
  }
  // Both are written, the states in place.
  Arrays results() const {
    Arrays blank;
    blank.add("out", {dtype, {p.batch, p.heads, p.values}, false});
    blank.add("state", state);
    return blank;
  }
};

}  // namespace pentad::scan::test
