#include "read_oracle.h"

#include <cmath>

namespace check {
namespace {

using pyeff::Cell;
using pyeff::Norm;
using pyeff::Reduce;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

struct Oracle {
  const ReadSizes& s;
  const ReadValues& v;
  const Rounding q, wide;
  ReadTruth t;
  std::vector<Values> x, xhat;           // [layers] of [tokens, width], after and before the norm's weight
  const int64_t G = s.gates() * s.rank;  // rows of the weights

  double& at(Values& a, int64_t layer, int64_t token, int64_t unit) const {
    return a[(layer * s.tokens + token) * s.rank + unit];
  }
  // The state before a layer.
  double before(Values& states, const Values& given, int64_t layer, int64_t token, int64_t unit) const {
    if (layer > 0) return at(states, layer - 1, token, unit);
    return given.empty() ? 0 : given[token * s.rank + unit];
  }
  double& gate(int64_t layer, int64_t token, int64_t gate, int64_t unit) {
    return t.gates[((layer * s.tokens + token) * s.saved_gates() + gate) * s.rank + unit];
  }
  double add(double& sum, double term) const { return sum = q(sum + term); }

  void normalize(int64_t layer, int64_t token) {
    Values phi(v.phi[layer].begin() + token * s.width, v.phi[layer].begin() + (token + 1) * s.width);
    for (double& value : phi) value = q(value);  // it may be stored in a larger type
    double mean = 0, square = 0;
    for (int64_t k = 0; k < s.width && s.norm == Norm::layer; ++k) mean += phi[k] / double(s.width);
    mean = wide(mean);
    for (int64_t k = 0; k < s.width; ++k) {
      const double centred = wide(phi[k] - mean);
      square += centred * centred / double(s.width);
    }
    const double rstd = s.norm == Norm::none ? 1 : wide(1 / std::sqrt(wide(square + s.eps)));
    t.mean[layer * s.tokens + token] = mean;
    t.rstd[layer * s.tokens + token] = rstd;
    for (int64_t k = 0; k < s.width; ++k) {
      double value = q(wide(phi[k] - mean) * rstd);
      xhat[layer][token * s.width + k] = value;
      if (!v.norm_weight.empty()) value = q(value * v.norm_weight[k]);
      if (!v.norm_bias.empty()) value = q(value + v.norm_bias[k]);
      x[layer][token * s.width + k] = value;
    }
  }

  void forward() {
    const int64_t r = s.rank, states = s.layers * s.tokens * r;
    t.h.assign(states, 0);
    t.c.assign(s.cell == Cell::lstm ? states : 0, 0);
    t.gates.assign(s.saved_gates() * states, 0);
    t.mean.assign(s.layers * s.tokens, 0);
    t.rstd = t.mean;
    x.assign(s.layers, Values(s.tokens * s.width));
    xhat = x;
    t.out.assign(s.tokens * r, 0);
    for (int64_t n = 0; n < s.tokens; ++n)
      for (int64_t i = 0; i < s.layers; ++i) {
        normalize(i, n);
        Values from_x(G), from_h(G);
        for (int64_t row = 0; row < G; ++row) {
          double sum_x = v.b_ih.empty() ? 0 : v.b_ih[row], sum_h = v.b_hh.empty() ? 0 : v.b_hh[row];
          const double *w = v.w_ih.data() + row * s.width, *token = x[i].data() + n * s.width;
          for (int64_t k = 0; k < s.width; ++k) sum_x += w[k] * token[k];
          for (int64_t k = 0; k < r; ++k) sum_h += v.w_hh[row * r + k] * before(t.h, v.h0, i, n, k);
          from_x[row] = q(sum_x);
          from_h[row] = q(sum_h);
        }
        for (int64_t u = 0; u < r; ++u) {
          step(i, n, u, from_x.data() + u, from_h.data() + u);
          double& out = t.out[n * r + u];
          out = s.reduce == Reduce::mean ? q(out + at(t.h, i, n, u)) : at(t.h, i, n, u);
        }
      }
    if (s.reduce == Reduce::mean)
      for (double& out : t.out) out = q(out / double(s.layers));
    if (s.cell == Cell::lstm) t.c_last.assign(t.c.end() - s.tokens * r, t.c.end());
  }

  void step(int64_t i, int64_t n, int64_t u, const double* a, const double* b) {
    const int64_t r = s.rank;
    double& h = at(t.h, i, n, u);
    if (s.cell == Cell::rnn) {
      h = q(std::tanh(q(a[0] + b[0])));
    } else if (s.cell == Cell::gru) {
      const double reset = q(sigmoid(q(a[0] + b[0]))), z = q(sigmoid(q(a[r] + b[r])));
      const double candidate = q(std::tanh(q(a[2 * r] + q(reset * b[2 * r]))));
      h = q(q(q(1 - z) * candidate) + q(z * before(t.h, v.h0, i, n, u)));
      gate(i, n, 0, u) = reset, gate(i, n, 1, u) = z, gate(i, n, 2, u) = candidate, gate(i, n, 3, u) = b[2 * r];
    } else {
      const double in = q(sigmoid(q(a[0] + b[0]))), forget = q(sigmoid(q(a[r] + b[r])));
      const double g = q(std::tanh(q(a[2 * r] + b[2 * r]))), o = q(sigmoid(q(a[3 * r] + b[3 * r])));
      double& c = at(t.c, i, n, u);
      c = q(q(forget * before(t.c, v.c0, i, n, u)) + q(in * g));
      h = q(o * q(std::tanh(c)));
      gate(i, n, 0, u) = in, gate(i, n, 1, u) = forget, gate(i, n, 2, u) = g, gate(i, n, 3, u) = o;
    }
  }

  // The gradients of one token's sums in one layer, from those of h and c, which become those of the state before.
  void reverse_step(int64_t i, int64_t n, double* dh, double* dc, Values& dx, Values& dy) {
    const int64_t r = s.rank;
    for (int64_t u = 0; u < r; ++u) {
      const double h = at(t.h, i, n, u);
      if (s.cell == Cell::rnn) {
        dx[u] = dy[u] = q(dh[u] * q(1 - h * h));
        dh[u] = 0;
      } else if (s.cell == Cell::gru) {
        const double reset = gate(i, n, 0, u), z = gate(i, n, 1, u), c = gate(i, n, 2, u), hn = gate(i, n, 3, u);
        const double dn = q(q(dh[u] * q(1 - z)) * q(1 - c * c));
        dx[u] = dy[u] = q(q(dn * hn) * q(reset * q(1 - reset)));
        dx[r + u] = dy[r + u] = q(q(dh[u] * (before(t.h, v.h0, i, n, u) - c)) * q(z * q(1 - z)));
        dx[2 * r + u] = dn;
        dy[2 * r + u] = q(dn * reset);
        dh[u] = q(dh[u] * z);
      } else {
        const double in = gate(i, n, 0, u), forget = gate(i, n, 1, u), g = gate(i, n, 2, u), o = gate(i, n, 3, u);
        const double tanh_c = q(std::tanh(at(t.c, i, n, u)));
        const double d = q(dc[u] + q(q(dh[u] * o) * q(1 - tanh_c * tanh_c)));
        dx[u] = q(q(d * g) * q(in * q(1 - in)));
        dx[r + u] = q(q(d * before(t.c, v.c0, i, n, u)) * q(forget * q(1 - forget)));
        dx[2 * r + u] = q(q(d * in) * q(1 - g * g));
        dx[3 * r + u] = q(q(dh[u] * tanh_c) * q(o * q(1 - o)));
        for (int gate = 0; gate < 4; ++gate) dy[gate * r + u] = dx[gate * r + u];
        dc[u] = q(d * forget);
        dh[u] = 0;
      }
    }
  }

  void backward() {
    const int64_t r = s.rank, d = s.width, state = s.tokens * r;
    Values dh(state), dc = v.grad_c;
    dc.resize(state);
    t.dw_ih.assign(G * d, 0), t.dw_hh.assign(G * r, 0), t.db_ih.assign(G, 0), t.db_hh.assign(G, 0);
    t.dnorm_weight.assign(d, 0), t.dnorm_bias.assign(d, 0);
    t.dphi.assign(s.layers, Values(s.tokens * d));
    t.dphi_terms.assign(s.layers, 0);
    for (int64_t i = s.layers - 1; i >= 0; --i) {
      // A layer's sums over the tokens are added as one.
      Values dw_ih(G * d), dw_hh(G * r), db_ih(G), db_hh(G), dgamma(d), dbeta(d);
      for (int64_t n = 0; n < s.tokens; ++n) {
        const double share = s.reduce == Reduce::mean ? double(s.layers) : i + 1 == s.layers ? 1 : INFINITY;
        for (int64_t u = 0; u < r && !v.grad_out.empty(); ++u) add(dh[n * r + u], q(v.grad_out[n * r + u] / share));
        Values dx(G), dy(G), into(d);
        reverse_step(i, n, dh.data() + n * r, dc.data() + n * r, dx, dy);
        for (int64_t row = 0; row < G; ++row) {
          for (int64_t k = 0; k < r; ++k) dw_hh[row * r + k] += dy[row] * before(t.h, v.h0, i, n, k);
          for (int64_t k = 0; k < d; ++k) dw_ih[row * d + k] += dx[row] * x[i][n * d + k];
          for (int64_t k = 0; k < d; ++k) into[k] += dx[row] * v.w_ih[row * d + k];
          db_ih[row] += dx[row];
          db_hh[row] += dy[row];
        }
        Values back(r);
        for (int64_t row = 0; row < G; ++row)
          for (int64_t k = 0; k < r; ++k) back[k] += dy[row] * v.w_hh[row * r + k];
        for (int64_t k = 0; k < r; ++k) add(dh[n * r + k], q(back[k]));
        reverse_norm(i, n, into, dgamma, dbeta);
      }
      auto total = [&](Values& sums, const Values& terms) {
        for (size_t k = 0; k < sums.size(); ++k) add(sums[k], q(terms[k]));
      };
      total(t.dw_ih, dw_ih), total(t.dw_hh, dw_hh), total(t.db_ih, db_ih), total(t.db_hh, db_hh);
      total(t.dnorm_weight, dgamma), total(t.dnorm_bias, dbeta);
    }
    t.dh0 = dh;
    t.dc0 = s.cell == Cell::lstm ? dc : Values{};
  }

  void reverse_norm(int64_t i, int64_t n, const Values& dx, Values& dgamma, Values& dbeta) {
    const int64_t d = s.width;
    const double *hat = xhat[i].data() + n * d, rstd = t.rstd[i * s.tokens + n];
    Values g(d);
    double mean_g = 0, mean_gx = 0;
    for (int64_t k = 0; k < d; ++k) {
      g[k] = q(dx[k]);
      dgamma[k] += g[k] * hat[k];
      dbeta[k] += g[k];
      if (!v.norm_weight.empty()) g[k] = q(g[k] * v.norm_weight[k]);
      mean_g += g[k] / double(d);
      mean_gx += g[k] * hat[k] / double(d);
    }
    for (int64_t k = 0; k < d; ++k) {
      double value = g[k];
      t.dphi_terms[i] = std::fmax(t.dphi_terms[i], std::fabs(rstd * value));
      if (s.norm == Norm::layer) value = wide(value - wide(mean_g));
      if (s.norm != Norm::none) value = rstd * wide(value - wide(hat[k] * wide(mean_gx)));
      t.dphi[i][n * d + k] = q(value);
    }
  }
};

}  // namespace

ReadTruth read_oracle(const ReadSizes& sizes, const ReadValues& values, Rounding round, Rounding round_wide) {
  Oracle oracle{sizes, values, round, round_wide, {}, {}, {}};
  oracle.forward();
  if (!values.grad_out.empty() || !values.grad_c.empty()) oracle.backward();
  return oracle.t;
}

}  // namespace check
