#include "linear.h"

#include "gemm.h"

namespace pyeff {
namespace PYEFF_ISA {
namespace {

constexpr int kVectors = 4;

template <class T>
constexpr int kWidth = kVectors * kLanes<Compute<T>>;

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

}  // namespace

int64_t linear_packed_bytes(Number number, int64_t out, int64_t in) {
  return with_number(number, [=](auto type) {
    using Op = Operand<decltype(type)>;
    return ceil_div(out, kWidth<decltype(type)>) * steps<Op>(in) * kWidth<decltype(type)> *
           int64_t(sizeof(typename Op::Element));
  });
}

void linear_pack(Number number, int64_t out, int64_t in, const void* weight, void* packed, const Parallel& parallel) {
  with_number(number, [&](auto type) {
    using T = decltype(type);
    using Op = Operand<T>;
    const T* w = static_cast<const T*>(weight);
    auto* to = static_cast<typename Op::Element*>(packed);
    for_each_task(parallel, ceil_div(out, kWidth<T>), [&](int64_t panel) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t row = panel * kWidth<T> + v * kLanes<Compute<T>>;
        pack_columns_nk<T>(to + panel * steps<Op>(in) * kWidth<T> + v * kLanes<Compute<T>>, kWidth<T>, w + row * in, in,
                           out - row, in, static_cast<const T*>(nullptr));
      }
    });
    return 0;
  });
}

bool linear(const LinearProblem& p, const Parallel& parallel) {
  return with_number(p.number, [&](auto type) {
    using T = decltype(type);
    expect_writes(p.y, p.rows * p.out * int64_t(sizeof(T)));
    const Term<T> term{{static_cast<const T*>(p.x), p.x_stride, 1, p.in},
                       static_cast<const typename Operand<T>::Element*>(p.packed)};
    const StoreEpilogue<T, Identity> store{static_cast<T*>(p.y), p.out, static_cast<const T*>(p.bias), 1, 0, {}};
    return multiply<T, kVectors>(parallel, p.rows, p.out, &term, 1, store);
  });
}

}  // namespace PYEFF_ISA
}  // namespace pyeff
