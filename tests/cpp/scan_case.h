// SPDX-License-Identifier: Apache-2.0
// Random problems for the tests of the scans, with arrays of any strides, each in memory of its own
// size.
#pragma once
#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "common/reals.h"
#include "scan/scan.h"

namespace pentad::scan::test {

inline std::mt19937 generator(11);

inline int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline bool chance(double p) { return std::bernoulli_distribution(p)(generator); }
inline double normal(double deviation = 1) {
  return std::normal_distribution<double>(0, deviation)(generator);
}
inline double uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

using Shape = std::vector<int64_t>;

class Array {
 public:
  Operand operand;
  std::vector<uint8_t> memory;
  Shape shape;

  // `plain`: contiguous. Else the order of the dimensions, gaps, directions and the alignment are
  // random; with `shared` some dimensions have stride 0, but not one of the two parts of a number.
  Array(DType dtype, Shape dimensions, bool plain = true, bool shared = false)
      : shape(std::move(dimensions)) {
    const int rank = static_cast<int>(shape.size());
    std::vector<int> order(rank);
    for (int i = 0; i < rank; ++i) order[i] = i;
    if (!plain && chance(0.6)) std::shuffle(order.begin(), order.end(), generator);
    int64_t step = !plain && chance(0.2) ? 2 : 1;
    for (int n = rank - 1; n >= 0; --n) {
      const int i = order[n];
      if (shared && chance(0.15) && !(i == rank - 1 && shape[i] == 2)) continue;
      operand.stride[i] = step;
      step *= std::max<int64_t>(shape[i], 1) + (!plain && chance(0.1));
      if (!plain && chance(0.1)) {
        start_ += operand.stride[i] * (std::max<int64_t>(shape[i], 1) - 1);
        operand.stride[i] = -operand.stride[i];
      }
    }
    const int64_t lead = plain ? 0 : pick(0, 3);
    start_ += lead;
    memory.resize((step + lead) * size_of(dtype));
    operand.dtype = dtype;
    if (count() == 0) memory.clear(), start_ = 0;
    place();
    for (int64_t i = 0; i < size(); ++i) write_real(memory.data(), dtype, i, 7.5);
  }
  Array(const Array& other)
      : operand(other.operand), memory(other.memory), shape(other.shape), start_(other.start_) {
    place();
  }
  Array& operator=(const Array& other) {
    operand = other.operand, memory = other.memory, shape = other.shape, start_ = other.start_;
    place();
    return *this;
  }

  int64_t count() const {
    int64_t n = 1;
    for (int64_t size : shape) n *= size;
    return n;
  }
  // Where the nth element lies, in units of the dtype.
  int64_t offset(int64_t n) const {
    int64_t sum = 0;
    for (int i = static_cast<int>(shape.size()) - 1; i >= 0; --i)
      sum += n % shape[i] * operand.stride[i], n /= shape[i];
    return sum;
  }
  double get(int64_t n) const { return read_real(operand.data, operand.dtype, offset(n)); }
  void set(int64_t n, double x) { write_real(operand.data, operand.dtype, offset(n), x); }
  template <class F>
  void fill(F f) {
    for (int64_t n = 0; n < count(); ++n) set(n, f());
  }
  // All of the memory, with what lies between the elements.
  int64_t size() const { return static_cast<int64_t>(memory.size()) / size_of(operand.dtype); }
  double value(int64_t i) const { return read_real(memory.data(), operand.dtype, i); }

 private:
  void place() {
    operand.data = memory.empty() ? nullptr : memory.data() + start_ * size_of(operand.dtype);
  }
  int64_t start_ = 0;
};

// Arrays by name. One that was never added is absent.
struct Arrays {
  std::vector<std::pair<std::string, Array>> list;

  Array& add(const char* name, Array array) {
    list.emplace_back(name, std::move(array));
    return list.back().second;
  }
  const Array* find(const std::string& name) const {
    for (const auto& [key, array] : list)
      if (key == name) return &array;
    return nullptr;
  }
  Operand operator[](const char* name) const {
    const Array* array = find(name);
    return array ? array->operand : Operand{};
  }
};

inline const char* dtype_text(DType dtype) {
  return dtype == DType::f64   ? "f64"
         : dtype == DType::f32 ? "f32"
         : dtype == DType::f16 ? "f16"
                               : "bf16";
}

// Lengths around the sizes of vectors and chunks.
inline int64_t random_length() {
  const int64_t lengths[] = {0, 1, 2, 3, 7, 16, 31, 32, 33, 63, 64, 65, 96, 130};
  return lengths[pick(0, 13)];
}
// Boundaries of packed sequences, some of them empty.
inline std::vector<int64_t> random_pieces(int64_t length) {
  std::vector<int64_t> begin = {0};
  for (int64_t s = pick(0, 4); s > 0; --s) begin.push_back(pick(0, length));
  begin.push_back(length);
  std::sort(begin.begin(), begin.end());
  return begin;
}

// Rows of a cache of `rows` for a batch: none twice, some of padding.
inline std::vector<int64_t> random_rows(int64_t batch, int64_t rows) {
  std::vector<int64_t> all(rows);
  for (int64_t i = 0; i < rows; ++i) all[i] = i;
  std::shuffle(all.begin(), all.end(), generator);
  all.resize(batch);
  for (int64_t& row : all)
    if (chance(0.2)) row = -pick(1, 100);
  return all;
}

constexpr DType kDtypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

inline DType wide(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

// A problem of P with its arrays. `bind` points the problem at them.
template <class P>
struct Case {
  P p;
  Arrays in;
  std::string text;
  DType dtype;
  bool small;            // for differences: short, and no two elements share memory
  double natural = 1.0;  // the size of what is summed

  Case(DType type, bool is_small) : dtype(type), small(is_small) {}

  bool option(const char* name, double probability) {
    const bool chosen = chance(probability);
    if (chosen) text += std::string(" ") + name;
    return chosen;
  }
  void size(const char* name, int64_t n) { text += std::string(" ") + name + std::to_string(n); }
  Array array(DType type, Shape shape) const { return {type, shape, false, !small}; }
  Array& add(const char* name, DType type, Shape shape, const std::function<double()>& f) {
    Array& x = in.add(name, array(type, std::move(shape)));
    x.fill(f);
    return x;
  }
  int64_t length() const { return small ? pick(0, 5) : random_length(); }
  // Few and many channels: less than a vector, several, and a rest.
  int64_t channels() const { return small ? pick(1, 3) : chance(0.3) ? pick(1, 7) : pick(8, 70); }
};

// Gradients of sum(given * results) against central differences of the inputs "x" of each "dx".
template <class C>
void check_slopes(C& c, Arrays blank, const std::function<void(const Arrays&)>& forward,
                  const std::function<void(const Arrays& given, const Arrays& to)>& backward) {
  Arrays given = blank, gradients = c.gradients();
  for (auto& [key, array] : given.list) array.fill([] { return normal(); });
  backward(given, gradients);
  const auto loss = [&] {
    forward(blank);
    double sum = 0;
    for (size_t n = 0; n < blank.list.size(); ++n)
      for (int64_t i = 0; i < blank.list[n].second.count(); ++i)
        sum += blank.list[n].second.get(i) * given.list[n].second.get(i);
    return sum;
  };
  for (auto& [key, input] : c.in.list) {
    const Array* gradient = gradients.find("d" + key);
    CHECK(gradient, key, c.text);
    for (int64_t i = 0; gradient && i < input.count(); ++i) {
      const double x = input.get(i), step = 1e-5;
      if (!std::isfinite(x)) continue;
      input.set(i, x + step);
      const double above = loss();
      input.set(i, x - step);
      const double slope = (above - loss()) / (2 * step);
      input.set(i, x);
      CHECK(std::abs(slope - gradient->get(i)) < 1e-5 * (1 + std::abs(slope)), "d" + key, i, slope,
            gradient->get(i), c.text);
    }
  }
}

struct ScanCase : Case<SelectiveScan> {
  ScanCase(DType type, bool is_small) : Case(type, is_small) {
    p.groups = pick(1, 3);
    p.dim = chance(0.02) ? 0 : channels() * p.groups;
    p.batch = chance(0.03) ? 0 : pick(1, 3);
    p.length = length();
    p.states = small ? pick(1, 3) : chance(0.4) ? 16 : pick(1, 20);
    p.complex = option("complex", 0.3);
    p.softplus = option("softplus", 0.5);
    p.reverse = option("reverse", 0.3);
    p.constant_b = option("constant_b", 0.25);
    p.constant_c = option("constant_c", 0.25);
    if (p.constant_b && p.constant_c) p.groups = 1;
    if (option("packed", 0.3)) {
      p.batch = 1;
      p.begin = random_pieces(p.length);
    }
    size("b", p.batch), size("d", p.dim), size("t", p.length), size("n", p.states);
    size("g", p.groups);
    text = std::string(" scan ") + dtype_text(dtype) + text;
    natural = 1 + std::sqrt(static_cast<double>(p.states * p.length));

    const auto one = [] { return normal(); };
    const auto positive = [&] { return p.softplus ? normal() : std::abs(normal(0.3)); };
    const bool huge = !p.complex && option("huge", 0.2);
    add("u", dtype, like_u(), one);
    add("delta", dtype, like_u(), [&] { return huge && chance(0.1) ? 100 : positive(); });
    const bool edges = option("edges", 0.3);  // decays of exactly 0 and exactly 1
    int64_t n = 0;
    add("a", wide(dtype), with_parts(like_a()), [&] {
      if (p.complex && n++ % 2) return uniform(-3, 3);
      return edges && chance(0.3) ? chance(0.5) ? 0 : -1e4 : -uniform(0, 2);
    });
    add("b", p.constant_b ? wide(dtype) : dtype, with_parts(like_b()), one);
    add("c", p.constant_c ? wide(dtype) : dtype, with_parts(like_c()), one);
    if (option("d", 0.6)) add("d", wide(dtype), {p.dim}, one);
    if (option("z", 0.5)) add("z", dtype, like_u(), one);
    if (option("delta_bias", 0.5)) add("delta_bias", wide(dtype), {p.dim}, positive);
    if (option("initial", 0.5)) add("initial", wide(dtype), with_parts(like_state()), one);
    p.u = in["u"], p.delta = in["delta"], p.z = in["z"], p.a = in["a"], p.b = in["b"];
    p.c = in["c"], p.d = in["d"], p.delta_bias = in["delta_bias"], p.initial = in["initial"];
  }
  ScanCase(const ScanCase&) = delete;

  Shape with_parts(Shape shape) const {
    if (p.complex) shape.push_back(2);
    return shape;
  }
  Shape like_u() const { return {p.batch, p.dim, p.length}; }
  Shape like_a() const { return {p.dim, p.states}; }
  Shape varying() const { return {p.batch, p.groups, p.states, p.length}; }
  Shape like_b() const { return p.constant_b ? like_a() : varying(); }
  Shape like_c() const { return p.constant_c ? like_a() : varying(); }
  Shape like_state() const { return {p.sequences(), p.dim, p.states}; }

  // What forward writes.
  Arrays results() const {
    Arrays blank;
    blank.add("out", {dtype, like_u(), false});
    if (small || chance(0.7)) blank.add("last", {wide(dtype), with_parts(like_state()), false});
    return blank;
  }
  // What backward writes, with `d` before the names of the inputs.
  Arrays gradients() const {
    Arrays blank;
    for (const auto& [key, array] : in.list) {
      const bool is_like_u = key == "u" || key == "delta" || key == "z";
      if (key != "u" && !small && chance(0.15)) continue;
      blank.add(("d" + key).c_str(), {is_like_u ? dtype : wide(dtype), array.shape, false});
    }
    return blank;
  }
  SelectiveScanGradients gradients_of(const Arrays& given, const float* stored,
                                      const Arrays& to) const {
    SelectiveScanGradients g;
    g.d_out = given["out"], g.d_last = given["last"], g.stored = stored;
    g.du = to["du"], g.ddelta = to["ddelta"], g.da = to["da"], g.db = to["db"], g.dc = to["dc"];
    g.dd = to["dd"], g.dz = to["dz"], g.ddelta_bias = to["ddelta_bias"];
    g.dinitial = to["dinitial"];
    return g;
  }
};

struct RecurrenceCase : Case<Recurrence> {
  bool constant = false;

  RecurrenceCase(DType type, bool is_small) : Case(type, is_small) {
    p.outer = chance(0.03) ? 0 : pick(1, 3);
    p.inner = chance(0.03) ? 0 : channels();
    p.length = length();
    p.complex = option("complex", 0.3);
    p.log_space = option("log_space", 0.3);
    p.reverse = option("reverse", 0.3);
    constant = option("constant", 0.3);
    size("o", p.outer), size("i", p.inner), size("t", p.length);
    text = std::string(" recurrence ") + dtype_text(dtype) + text;
    natural = 1 + std::sqrt(static_cast<double>(p.length));
    const bool edges = option("edges", 0.3);
    int64_t n = 0;
    double size = 1, phase = 0;
    add("a", dtype, like_a(), [&]() -> double {
      if (!p.complex || n % 2 == 0) {
        size = edges && chance(0.3) ? chance(0.5) : uniform(0, 1);
        phase = p.complex ? uniform(-3, 3) : 0;
      }
      const bool imaginary = p.complex && n++ % 2;
      if (p.log_space) return imaginary ? phase : std::log(size);
      return size * (imaginary ? std::sin(phase) : std::cos(phase));
    });
    add("x", dtype, all(), [] { return normal(); });
    if (option("h0", 0.5)) add("h0", dtype, without_time(), [] { return normal(); });
    p.a = in["a"], p.x = in["x"], p.h0 = in["h0"];
    if (constant) p.a.stride[2] = 0;
  }
  RecurrenceCase(const RecurrenceCase&) = delete;

  Shape with_parts(Shape shape) const {
    if (p.complex) shape.push_back(2);
    return shape;
  }
  Shape all() const { return with_parts({p.outer, p.inner, p.length}); }
  Shape like_a() const { return constant ? with_parts({p.outer, p.inner, 1}) : all(); }
  Shape without_time() const { return with_parts({p.outer, p.inner}); }

  Arrays gradients() const {
    Arrays blank;
    const auto type = [&] { return chance(0.5) ? dtype : wide(dtype); };
    if (small || chance(0.85)) blank.add("da", {type(), like_a(), false});
    if (small || chance(0.85)) blank.add("dx", {type(), all(), false});
    if (in.find("h0")) blank.add("dh0", {type(), without_time(), false});
    return blank;
  }
  RecurrenceGradients gradients_of(const Array& h, const Array& dh, const Arrays& to) const {
    return {h.operand, dh.operand, to["da"], to["dx"], to["dh0"], constant};
  }
};

inline int64_t random_width() {
  const int64_t widths[] = {1, 2, 3, 4, 4, 4, 5, 8, 9, 17, 64};
  return widths[pick(0, 10)];
}

struct ConvCase : Case<CausalConv> {
  std::vector<int32_t> seq_idx;

  ConvCase(DType type, bool is_small, bool update = false) : Case(type, is_small) {
    p.batch = chance(0.03) ? 0 : pick(1, 3);
    p.dim = chance(0.03) ? 0 : channels();
    p.length = update ? pick(0, 5) : length();
    p.width = small ? pick(1, 4) : random_width();
    p.silu = option("silu", 0.5);
    if (!update && option("packed", 0.25)) {
      p.batch = 1;
      p.begin = random_pieces(p.length);
    }
    const bool indexed = !update && p.begin.empty() && option("seq_idx", 0.3);
    size("b", p.batch), size("d", p.dim), size("t", p.length), size("w", p.width);
    text = std::string(update ? " conv update " : " conv ") + dtype_text(dtype) + text;
    natural = 1 + std::sqrt(static_cast<double>(p.width));
    const auto one = [] { return normal(); };
    const auto own = [&] { return dtype == DType::f64 ? dtype : kDtypes[pick(0, 2)]; };
    add("x", dtype, like_x(), one);
    add("weight", own(), {p.dim, p.width}, one);
    if (option("bias", 0.6)) add("bias", own(), {p.dim}, one);
    if (!update && !indexed && option("initial", 0.5)) add("initial", dtype, like_initial(), one);
    p.x = in["x"], p.weight = in["weight"], p.bias = in["bias"], p.initial = in["initial"];
    if (!indexed) return;
    // One index per step in another order than plain: [t][b].
    seq_idx.resize(p.batch * p.length);
    const double change = chance(0.5) ? 0.05 : 0.4;
    for (int64_t b = 0; b < p.batch; ++b) {
      int32_t index = static_cast<int32_t>(pick(0, 3));
      for (int64_t t = 0; t < p.length; ++t) {
        if (chance(change)) index += static_cast<int32_t>(pick(0, 2));
        seq_idx[t * p.batch + b] = chance(0.1) ? static_cast<int32_t>(-pick(1, 2)) : index;
      }
    }
    p.seq_idx = seq_idx.data();
    p.seq_idx_stride[0] = 1, p.seq_idx_stride[1] = p.batch;
  }
  ConvCase(const ConvCase&) = delete;

  Shape like_x() const { return {p.batch, p.dim, p.length}; }
  Shape like_initial() const { return {p.sequences(), p.dim, p.width - 1}; }
  Arrays results() const {
    Arrays blank;
    blank.add("out", {dtype, like_x(), false});
    if (!p.seq_idx && (small || chance(0.5))) blank.add("final", {dtype, like_initial(), false});
    return blank;
  }
  Arrays gradients() const {
    Arrays blank;
    for (const auto& [key, array] : in.list) {
      const bool sums = key == "weight" || key == "bias";
      if (small || chance(0.85))
        blank.add(("d" + key).c_str(), {sums ? wide(dtype) : dtype, array.shape, false});
    }
    return blank;
  }
  static CausalConvGradients gradients_of(const Arrays& given, const Arrays& to) {
    return {given["out"], given["final"], to["dx"], to["dweight"], to["dbias"], to["dinitial"]};
  }
};

struct StateCase : Case<StateUpdate> {
  Array state;

  explicit StateCase(DType type) : Case(type, false), state(type, {}) {
    p.batch = chance(0.05) ? 0 : pick(1, 4);
    p.groups = pick(1, 3);
    p.heads = p.groups * pick(1, 3);
    p.head_dim = channels();
    p.states = chance(0.4) ? 16 : pick(1, 40);
    p.softplus = option("softplus", 0.5);
    int64_t rows = p.batch;
    if (option("rows", 0.5)) {
      rows += pick(0, 2);
      p.rows = random_rows(p.batch, rows);
    }
    size("b", p.batch), size("h", p.heads), size("p", p.head_dim), size("n", p.states);
    text = std::string(" state update ") + dtype_text(dtype) + text;
    natural = 1 + std::sqrt(static_cast<double>(p.states));
    const auto one = [] { return normal(); };
    const Shape like_x = {p.batch, p.heads, p.head_dim}, like_d = {p.heads, p.head_dim};
    const Shape like_b = {p.batch, p.groups, p.states};
    add("x", dtype, like_x, one);
    add("dt", dtype, like_x, one);
    add("a", wide(dtype), {p.heads, p.head_dim, p.states}, [] { return -uniform(0, 2); });
    add("b", dtype, like_b, one);
    add("c", dtype, like_b, one);
    if (option("d", 0.6)) add("d", wide(dtype), like_d, one);
    if (option("z", 0.5)) add("z", dtype, like_x, one);
    if (option("dt_bias", 0.5)) add("dt_bias", wide(dtype), like_d, one);
    const DType dtypes[] = {dtype, DType::f32, DType::bf16, DType::f16};
    state = {dtype == DType::f64 ? dtype : dtypes[pick(0, 3)],
             {rows, p.heads, p.head_dim, p.states},
             false};
    state.fill(one);
    p.x = in["x"], p.dt = in["dt"], p.a = in["a"], p.b = in["b"], p.c = in["c"];
    p.d = in["d"], p.z = in["z"], p.dt_bias = in["dt_bias"];
  }
  StateCase(const StateCase&) = delete;
};

struct LinearCase : Case<FewRowsLinear> {
  explicit LinearCase(DType type) : Case(type, false) {
    p.rows = pick(1, kMostRows);
    // Less than a vector, several, a rest; and what is shared by threads.
    const bool large = chance(0.1);
    p.inputs = large ? pick(600, 1600) : chance(0.3) ? 64 * pick(0, 3) : pick(0, 200);
    p.outputs = large ? pick(300, 700) : chance(0.3) ? 8 * pick(0, 5) : pick(0, 70);
    size("r", p.rows), size("i", p.inputs), size("o", p.outputs);
    text = std::string(" linear ") + dtype_text(dtype) + text;
    natural = 1 + std::sqrt(static_cast<double>(p.inputs));
    const auto one = [] { return normal(); };
    add("x", dtype, {p.rows, p.inputs}, one);
    const int64_t gap = option("gap", 0.3) ? pick(1, 9) : 0;
    in.add("weight", {dtype, {p.outputs, p.inputs + gap}}).fill(one);
    if (option("bias", 0.5)) add("bias", dtype, {p.outputs}, one);
    p.x = in["x"], p.weight = in["weight"], p.bias = in["bias"];
    if (option("shared", 0.1)) p.weight.stride[0] = 0;
  }
  LinearCase(const LinearCase&) = delete;
};

}  // namespace pentad::scan::test
