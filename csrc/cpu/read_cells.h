// The three cells, for one token and one vector of units: what the gates' sums become.
#pragma once

#include "math.h"
#include "read.h"

namespace pyeff {
namespace PYEFF_ISA {

// A panel of the packed weights holds kVectors vectors. For GRU and LSTM they are the gates of one vector of units, so
// that a register tile sees a whole cell; for the RNN, which has one gate, they are kVectors vectors of units.
struct Rnn {
  static constexpr Cell kCell = Cell::rnn;
  static constexpr int kGates = 1, kVectors = 4, kUnitVectors = 4, kSaved = 0;
};
struct Gru {
  static constexpr Cell kCell = Cell::gru;
  static constexpr int kGates = 3, kVectors = 3, kUnitVectors = 1, kSaved = 4;
};
struct Lstm {
  static constexpr Cell kCell = Cell::lstm;
  static constexpr int kGates = 4, kVectors = 4, kUnitVectors = 1, kSaved = 4;
};

template <class T>
struct GruStep {
  Vec<T> r, z, n, hn, h;

  // x_n and h_n are kept apart because r multiplies the second alone.
  PYEFF_INLINE GruStep(Vec<T> sum_r, Vec<T> sum_z, Vec<T> x_n, Vec<T> h_n, Vec<T> previous) {
    r = sigmoid<T>(sum_r);
    z = sigmoid<T>(sum_z);
    hn = h_n;
    n = tanh<T>(x_n + r * h_n);
    h = n + z * (previous - n);
  }
};

template <class T>
struct LstmStep {
  Vec<T> i, f, g, o, c, h;

  PYEFF_INLINE LstmStep(Vec<T> sum_i, Vec<T> sum_f, Vec<T> sum_g, Vec<T> sum_o, Vec<T> previous) {
    i = sigmoid<T>(sum_i);
    f = sigmoid<T>(sum_f);
    g = tanh<T>(sum_g);
    o = sigmoid<T>(sum_o);
    c = f * previous + i * g;
    h = o * tanh<T>(c);
  }
};

}  // namespace PYEFF_ISA
}  // namespace pyeff
