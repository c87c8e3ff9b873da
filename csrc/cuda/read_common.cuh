// What READ's kernels share: constants, rows of the layer outputs, the cells.
#pragma once

#include "cuda/common.cuh"
#include "cuda/math.cuh"
#include "cuda/read.h"

namespace pyeff::gpu {

// Layers whose addresses fit into one kernel's parameters; deeper networks take one more launch for each.
constexpr int kMaxLayers = 64;

constexpr int gates_of(Cell cell) { return cell == Cell::rnn ? 1 : cell == Cell::gru ? 3 : 4; }
// Columns of da for a token: the gates, and for the GRU n's derivative once more, times r, as the recurrent product
// takes it.
constexpr int derivatives_of(Cell cell) { return cell == Cell::rnn ? 1 : 4; }

struct Layers {
  ReadLayer layer[kMaxLayers];
};

PYEFF_DEVICE int64_t row_offset(const ReadLayer& layer, int64_t n) {
  // Token numbers fit into 32 bits; their products with a stride may not.
  const uint32_t row = static_cast<uint32_t>(n), columns = static_cast<uint32_t>(layer.columns);
  const uint32_t outer = row / columns;
  return outer * layer.outer + (row - outer * columns) * layer.inner;
}

// A cell for one unit of one token. `x` are the gates' sums from the input, `a` those from the state with its bias.
template <class T, Cell C>
struct CellStep {
  float h, c, saved[4];

  PYEFF_DEVICE CellStep(const float (&x)[gates_of(C)], const float (&a)[gates_of(C)], float h_previous,
                        float c_previous) {
    if constexpr (C == Cell::rnn) {
      h = tanh_of<T>(x[0] + a[0]);
    } else if constexpr (C == Cell::gru) {
      const float r = sigmoid<T>(x[0] + a[0]), z = sigmoid<T>(x[1] + a[1]), n = tanh_of<T>(x[2] + r * a[2]);
      h = n + z * (h_previous - n);
      saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = a[2];
    } else {
      const float i = sigmoid<T>(x[0] + a[0]), f = sigmoid<T>(x[1] + a[1]), g = tanh_of<T>(x[2] + a[2]);
      const float o = sigmoid<T>(x[3] + a[3]);
      c = f * c_previous + i * g;
      h = o * tanh_of<T>(c);
      saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    }
  }
};

// The cell's derivative for one unit of one token: `da` for the gates' sums (GRU: r, z, n, and n times r), and what
// goes to the layer before beside the recurrent product. `h` and `c` are this layer's, `dc` comes from the layer after.
template <class T, Cell C>
struct CellBackward {
  float da[derivatives_of(C)], dh_previous, dc_previous;

  PYEFF_DEVICE CellBackward(float dh, float dc, const float (&saved)[4], float h, float h_previous, float c,
                            float c_previous) {
    dh_previous = 0.0f, dc_previous = 0.0f;
    if constexpr (C == Cell::rnn) {
      da[0] = dh * (1.0f - h * h);
    } else if constexpr (C == Cell::gru) {
      const float r = saved[0], z = saved[1], n = saved[2];
      da[2] = dh * (1.0f - z) * (1.0f - n * n);
      da[1] = dh * (h_previous - n) * z * (1.0f - z);
      da[0] = da[2] * saved[3] * r * (1.0f - r);
      da[3] = da[2] * r;
      dh_previous = dh * z;
    } else {
      const float i = saved[0], f = saved[1], g = saved[2], o = saved[3], t = tanh_of<T>(c);
      const float all = dc + dh * o * (1.0f - t * t);
      da[0] = all * g * i * (1.0f - i);
      da[1] = all * c_previous * f * (1.0f - f);
      da[2] = all * i * (1.0f - g * g);
      da[3] = dh * t * o * (1.0f - o);
      dc_previous = all * f;
    }
  }
};

}  // namespace pyeff::gpu
