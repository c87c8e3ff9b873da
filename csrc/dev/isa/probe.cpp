#include "dev/probe.h"

#include "cpu/dot.h"
#include "cpu/gemm.h"
#include "cpu/math.h"
#include "cpu/philox.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

template <class T>
constexpr int64_t kColumns = kLanes<Compute<T>>;

template <class Function>
auto with_number(Number number, const Function& run) {
  switch (number) {
    case Number::f64:
      return run(double{});
    case Number::f32:
      return run(float{});
    default:
      return run(bf16{});
  }
}

template <class T>
void apply(MathFunction function, const T* x, T* y, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> v = load_first(x + i, count - i);
    const Vec<T> result = function == MathFunction::tanh      ? tanh<T>(v)
                          : function == MathFunction::sigmoid ? sigmoid<T>(v)
                          : function == MathFunction::gelu    ? gelu<T>(v)
                                                              : gelu_derivative<T>(v);
    store_first(y + i, result, count - i);
  }
}

// What float32 is converted to and from.
template <class T>
struct OtherOf {
  using type = float;
};
template <>
struct OtherOf<float> {
  using type = bf16;
};

template <class T, int NV, class P, class Activation>
bool run_product(const Product& p, const Parallel& parallel) {
  constexpr int kMost = 8;
  if (p.count > kMost) return false;
  Term<T, P> terms[kMost];
  for (int t = 0; t < p.count; ++t) {
    const ProductTerm& from = p.terms[t];
    terms[t] = {{static_cast<const P*>(from.base), from.row_stride, from.inner_stride, from.k, from.index,
                 reinterpret_cast<const P* const*>(from.pointers), static_cast<const Compute<T>*>(from.scale)},
                static_cast<const typename Operand<T>::Element*>(from.panels)};
  }
  const StoreEpilogue<T, Activation> store{static_cast<T*>(p.out), p.row_stride,       static_cast<const T*>(p.bias),
                                           Compute<T>(p.alpha),    Compute<T>(p.beta), {}};
  return multiply<T, NV>(parallel, p.m, p.n, terms, p.count, store);
}

template <class T, class P>
bool choose_product(const Product& p, const Parallel& parallel) {
  if (p.vectors == 1) return p.relu ? false : run_product<T, 1, P, Identity>(p, parallel);
  return p.relu ? run_product<T, 4, P, Relu>(p, parallel) : run_product<T, 4, P, Identity>(p, parallel);
}

}  // namespace

void apply_math(MathFunction function, Number number, const void* x, void* y, int64_t count) {
  if (number == Number::f64)
    apply(function, static_cast<const double*>(x), static_cast<double*>(y), count);
  else
    apply(function, static_cast<const float*>(x), static_cast<float*>(y), count);
}

void to_bf16(ToBf16 way, const float* x, uint16_t* y, int64_t count) {
  constexpr int lanes = kLanes<float>;
  for (int64_t i = 0; i < count; i += lanes) {
    const FloatV v = load_first(x + i, count - i);
    bf16 rounded[lanes];
    if (way == ToBf16::vector) {
      store(rounded, v);
    } else {
      const UInt32V bits = rounded_bits(v);
      for (int l = 0; l < lanes; ++l)
        rounded[l] = way == ToBf16::scalar ? narrow<bf16>(float(v[l])) : bf16{uint16_t(bits[l])};
    }
    for (int l = 0; l < lanes && i + l < count; ++l) y[i + l] = rounded[l].bits;
  }
}

void copy_first(Number number, const void* from, void* to, int64_t count) {
  with_number(number, [=](auto type) {
    using T = decltype(type);
    store_first(static_cast<T*>(to), load_first(static_cast<const T*>(from), count), count);
  });
}

void philox_words(int rounds, uint64_t key, uint32_t first, uint32_t second, uint64_t last, int64_t count,
                  uint32_t* out) {
  const auto run = [=](const auto& philox) {
    for (int64_t at = 0; at < count; at += kPhiloxStep)
      philox_step(philox, first + uint32_t(at / 4), {second, last}, out + at);
  };
  rounds == 7 ? run(Philox<7>(key)) : run(Philox<10>(key));
}

int lanes_of(Number number) {
  return with_number(number, [](auto type) { return int(kColumns<decltype(type)>); });
}

int64_t panels_bytes(Number number, int vectors, int64_t n, int64_t k) {
  return with_number(number, [=](auto type) {
    using Op = Operand<decltype(type)>;
    const int64_t width = vectors * kColumns<decltype(type)>;
    return ceil_div(n, width) * width * steps<Op>(k) * int64_t(sizeof(typename Op::Element));
  });
}

void pack_panels_nk(Number number, int vectors, int64_t n, int64_t k, const void* source, int64_t row_stride,
                    const void* scale, void* panels) {
  with_number(number, [=](auto type) {
    using T = decltype(type);
    auto* to = static_cast<typename Operand<T>::Element*>(panels);
    const int64_t width = vectors * kColumns<T>, total = steps<Operand<T>>(k);
    for (int64_t j = 0; j < ceil_div(n, width) * width; j += kColumns<T>)
      pack_columns_nk<T>(to + j / width * total * width + j % width, width,
                         static_cast<const T*>(source) + smaller(j, n) * row_stride, row_stride, n - j, k,
                         static_cast<const T*>(scale));
  });
}

void pack_panels_kn(Number number, int vectors, int64_t n, int64_t k, const void* const* rows, int64_t stride,
                    const void* shift, const void* scale, void* panels) {
  with_number(number, [=](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    auto* to = static_cast<typename Operand<T>::Element*>(panels);
    const int64_t width = vectors * kColumns<T>, total = steps<Operand<T>>(k);
    for (int64_t j = 0; j < n; j += kColumns<T>)
      pack_columns_kn<T, T>(
          to + j / width * total * width + j % width, width,
          [=](int64_t p) { return static_cast<const T*>(rows[p]) + j * stride; }, stride, n - j, k,
          static_cast<const C*>(shift), static_cast<const C*>(scale));
  });
}

bool product(const Product& p, const Parallel& parallel) {
  return with_number(p.number, [&](auto type) {
    using T = decltype(type);
    return p.stored == p.number ? choose_product<T, T>(p, parallel)
                                : choose_product<T, typename OtherOf<T>::type>(p, parallel);
  });
}

int tile_rows() { return kTileRows<4>; }

int64_t left_panel_bytes(Number number, int64_t k) {
  return with_number(number, [=](auto type) {
    using Op = Operand<decltype(type)>;
    return kTileRows<4> * steps<Op>(k) * int64_t(sizeof(typename Op::Element));
  });
}

void outer_tile(Number number, int64_t rows, int64_t k, const void* const* left, const void* panels, void* scratch,
                void* out) {
  with_number(number, [=](auto type) {
    using T = decltype(type);
    using Op = Operand<T>;
    using Element = typename Op::Element;
    constexpr int MR = kTileRows<4>;
    Element* panel = static_cast<Element*>(scratch);
    pack_left_kn<T, MR>(panel, [=](int64_t p) { return static_cast<const T*>(left[p]); }, rows, k);
    Tile<Op, MR, 4> tile;
    tile.zero();
    tile.multiply(LeftPanel<Element, MR>{panel}, static_cast<const Element*>(panels), steps<Op>(k));
    for (int64_t i = 0; i < rows; ++i)
      for (int v = 0; v < 4; ++v) store(static_cast<Compute<T>*>(out) + (i * 4 + v) * kColumns<T>, tile.acc[i][v]);
  });
}

int64_t dot_step(Number number) {
  return with_number(number, [](auto type) { return int64_t(DotStep<decltype(type)>::kLength); });
}

void dot_products(Number number, const void* const* left, int64_t m, const void* right, int64_t stride, int64_t n,
                  int64_t k, void* const* out, void** pointers) {
  with_number(number, [=](auto type) {
    using T = decltype(type);
    using C = Compute<T>;
    dot_rows<T>(reinterpret_cast<const T* const*>(left), m, static_cast<const T*>(right), stride, n, k,
                reinterpret_cast<C* const*>(out), reinterpret_cast<C**>(pointers));
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
