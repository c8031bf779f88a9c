// SPDX-License-Identifier: Apache-2.0
// Random problems of scan2d.h.
#pragma once
#include "scan/scan2d.h"
#include "scan_case.h"

namespace pentad::scan::test {

// What both scans of images share.
template <class P>
struct ImageCase : Case<P> {
  using Case<P>::p;
  using Case<P>::in;
  using Case<P>::dtype;
  using Case<P>::small;

  ImageCase(DType type, bool is_small) : Case<P>(type, is_small) {
    // Now and then more batch rows than the pieces of the backward pass.
    p.batch = chance(0.03) ? 0 : !small && chance(0.1) ? pick(9, 11) : pick(1, 3);
    p.dim = chance(0.03) ? 0 : this->channels();
    p.states = small ? pick(1, 3) : chance(0.3) ? 16 : pick(1, 20);
  }
  ImageCase(const ImageCase&) = delete;

  int64_t places() const { return in.find("u")->shape[2]; }
  // What forward writes.
  Arrays results() const {
    Arrays blank;
    blank.add("out", {dtype, in.find("u")->shape, false});
    return blank;
  }
  // What backward writes, with `d` before the names of the inputs.
  Arrays gradients() const {
    Arrays blank;
    for (const auto& [key, array] : in.list) {
      if (!small && chance(0.15)) continue;
      const bool own = key == "u" || key == "delta";
      blank.add(("d" + key).c_str(), {own ? dtype : wide(dtype), array.shape, false});
    }
    return blank;
  }

 protected:
  void name_sizes(const char* entry, int64_t terms) {
    this->size("b", p.batch), this->size("d", p.dim), this->size("n", p.states);
    this->text = std::string(" ") + entry + " " + dtype_text(dtype) + this->text;
    this->natural = 1 + std::sqrt(static_cast<double>(terms));
  }
  void draw(const char* name, DType type, Shape shape) {
    this->add(name, type, std::move(shape), [] { return normal(); });
  }
  // Decays of exactly 0 and exactly 1 among others.
  void draw_rates(Shape shape) {
    const bool edges = this->option("edges", 0.3);
    this->add("a", wide(dtype), std::move(shape),
              [&] { return edges && chance(0.3) ? chance(0.5) ? 0 : -1e4 : -uniform(0, 2); });
  }
};

struct CrossCase : ImageCase<CrossScan> {
  std::vector<int32_t> order;

  CrossCase(DType type, bool is_small) : ImageCase(type, is_small) {
    p.length = length();
    p.directions = chance(0.05) ? 0 : pick(1, small ? 2 : 5);
    p.softplus = option("softplus", 0.5);
    p.delta_by_step = option("delta_by_step", 0.4);
    p.b_by_step = option("b_by_step", 0.4), p.c_by_step = option("c_by_step", 0.4);
    for (int64_t k = 0; k < p.directions; ++k) {
      std::vector<int32_t> places(p.length);
      for (int64_t t = 0; t < p.length; ++t) places[t] = static_cast<int32_t>(t);
      if (chance(0.3)) std::reverse(places.begin(), places.end());
      else if (chance(0.6)) std::shuffle(places.begin(), places.end(), generator);
      order.insert(order.end(), places.begin(), places.end());
    }
    p.order = order.data();
    size("k", p.directions), size("t", p.length);
    const Shape like_u = {p.batch, p.dim, p.length}, like_d = {p.directions, p.dim};
    const Shape like_b = {p.batch, p.directions, p.states, p.length};
    const auto positive = [&] { return p.softplus ? normal() : std::abs(normal(0.3)); };
    draw("u", dtype, like_u);
    add("delta", dtype, {p.batch, p.directions, p.dim, p.length}, positive);
    draw_rates({p.directions, p.dim, p.states});
    draw("b", dtype, like_b);
    draw("c", dtype, like_b);
    if (option("d", 0.6)) draw("d", wide(dtype), like_d);
    if (option("delta_bias", 0.5)) add("delta_bias", wide(dtype), like_d, positive);
    p.u = in["u"], p.delta = in["delta"], p.a = in["a"], p.b = in["b"], p.c = in["c"];
    p.d = in["d"], p.delta_bias = in["delta_bias"];
    name_sizes("cross-scan", p.states * p.length);
  }

  size_t stored_size() const { return p.chunks() * p.states * p.dim; }
  static CrossScanGradients gradients_of(const Operand& d_out, const float* stored,
                                         const Arrays& to) {
    return {d_out,    stored,   to["du"], to["ddelta"],     to["da"],
            to["db"], to["dc"], to["dd"], to["ddelta_bias"]};
  }
};

struct WavefrontCase : ImageCase<Wavefront> {
  WavefrontCase(DType type, bool is_small) : ImageCase(type, is_small) {
    // Around the rows of a band and the places of a tile.
    const int64_t sizes[] = {1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 40};
    p.height = chance(0.03) ? 0 : small ? pick(1, 3) : sizes[pick(0, 7)];
    p.width = chance(0.03) ? 0 : small ? pick(1, 3) : sizes[pick(0, 11)];
    size("i", p.height), size("j", p.width);
    draw("u", dtype, {p.batch, p.dim, p.length()});
    add("delta", dtype, {p.batch, 2, p.dim, p.length()}, [] { return std::abs(normal(0.3)); });
    draw_rates({2, p.dim, p.states});
    draw("b", dtype, {p.batch, 2, p.states, p.length()});
    draw("c", dtype, {p.batch, p.states, p.length()});
    if (option("d", 0.6)) draw("d", wide(dtype), {p.dim});
    p.u = in["u"], p.delta = in["delta"], p.a = in["a"], p.b = in["b"], p.c = in["c"];
    p.d = in["d"];
    name_sizes("wavefront", p.states * (p.height + p.width));
  }

  size_t stored_size() const {
    return p.batch * stored_bands(p.height) * p.width * p.states * p.dim;
  }
  static WavefrontGradients gradients_of(const Operand& d_out, const float* stored,
                                         const Arrays& to) {
    return {d_out, stored, to["du"], to["ddelta"], to["da"], to["db"], to["dc"], to["dd"]};
  }
};

}  // namespace pentad::scan::test
