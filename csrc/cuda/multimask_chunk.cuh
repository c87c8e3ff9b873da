// What the kernels of the multimask family share: chunks of a row, by vectors of 16 bytes or number by number.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/multimask.h"
#include "cuda/tile.cuh"

namespace pyeff::gpu {

// What one thread takes of a row at once. Without vectors (rows that are not aligned, or not whole vectors) still
// several numbers, so that noise is made by fours.
template <class T, bool Vector>
constexpr int kMaskChunk = Vector ? kChunk<T> : 4;

// Up to N numbers as they are in memory: what is only moved keeps its bits. Vectors may be of 8 bytes, too.
template <class T, bool Vector, int N = kMaskChunk<T, Vector>>
struct Piece {
  static constexpr int kNumbers = N, kWords = N * static_cast<int>(sizeof(T)) / 4;
  struct Single {
    T x[N];
  };
  struct Pair {
    uint32_t x[2];
  };
  std::conditional_t<!Vector, Single, std::conditional_t<kWords == 2, Pair, Vec16>> bits = {};

  // The first `count` of a row's chunk.
  PYEFF_DEVICE void read(const T* from, int count) {
    if constexpr (!Vector) {
      PYEFF_UNROLL
      for (int i = 0; i < N; ++i)
        if (i < count) bits.x[i] = load(from + i);
    } else if constexpr (kWords == 2) {
      const uint64_t both = load(reinterpret_cast<const uint64_t*>(from));
      bits = {{static_cast<uint32_t>(both), static_cast<uint32_t>(both >> 32)}};
    } else {
      bits = load16(from);
    }
  }
  PYEFF_DEVICE void write(T* to, int count) const {
    if constexpr (!Vector) {
      PYEFF_UNROLL
      for (int i = 0; i < N; ++i)
        if (i < count) store(to + i, bits.x[i]);
    } else if constexpr (kWords == 2) {
      store(reinterpret_cast<uint64_t*>(to), bits.x[0] | uint64_t{bits.x[1]} << 32);
    } else {
      store16(to, bits);
    }
  }
  PYEFF_DEVICE void numbers(float (&x)[kNumbers]) const {
    PYEFF_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      if constexpr (!Vector) {
        x[i] = to_float(bits.x[i]);
      } else if constexpr (sizeof(T) == 4) {
        x[i] = float_of(bits.x[i]);
      } else {
        x[i] = i % 2 ? high_of<T>(bits.x[i / 2]) : low_of<T>(bits.x[i / 2]);
      }
    }
  }
  PYEFF_DEVICE void set(const float (&x)[kNumbers]) {
    PYEFF_UNROLL
    for (int i = 0; i < kNumbers; ++i) {
      if constexpr (!Vector) {
        bits.x[i] = from_float<T>(x[i]);
      } else if constexpr (sizeof(T) == 4) {
        bits.x[i] = bits_of(x[i]);
      } else if (i % 2 == 0) {
        bits.x[i / 2] = pack2<T>(x[i], x[i + 1]);
      }
    }
  }
};

// As many floats of a row of float as a chunk of another type has.
template <int N, bool Vector>
PYEFF_DEVICE void read_floats(float (&x)[N], const float* from, int count) {
  PYEFF_UNROLL
  for (int i = 0; i < N; i += Vector ? 4 : 1) {
    if constexpr (Vector) {
      const Vec16 four = load16(from + i);
      PYEFF_UNROLL
      for (int j = 0; j < 4; ++j) x[i + j] = float_of(four.x[j]);
    } else {
      x[i] = i < count ? load(from + i) : 0.0f;
    }
  }
}
template <int N, bool Vector>
PYEFF_DEVICE void write_floats(float* to, const float (&x)[N], int count) {
  PYEFF_UNROLL
  for (int i = 0; i < N; i += Vector ? 4 : 1) {
    if constexpr (Vector) {
      store16(to + i, {{bits_of(x[i]), bits_of(x[i + 1]), bits_of(x[i + 2]), bits_of(x[i + 3])}});
    } else if (i < count) {
      store(to + i, x[i]);
    }
  }
}

PYEFF_DEVICE int clamped_length(const int32_t* lengths, int64_t sample, int64_t tokens) {
  const int length = load(lengths + sample);
  return length < 0 ? 0 : length > tokens ? static_cast<int>(tokens) : length;
}

// Whether all rows of `numbers` of `size` bytes are whole vectors at multiples of 16 bytes.
inline bool vectors(const MultimaskRows& rows, int64_t width, int64_t size) {
  return aligned_to(rows.data, 16) && rows.outer * size % 16 == 0 && rows.inner * size % 16 == 0 &&
         width * size % 16 == 0;
}
inline bool vectors(const void* contiguous, int64_t width, int64_t size) {
  return vectors(MultimaskRows{contiguous, 0, 0}, width, size);
}

// call(number type, whether by vectors)
template <class Call>
void with_chunks(Number number, bool vector, const Call& call) {
  with_number(number, [&](auto type) {
    if (vector) {
      call(type, std::true_type{});
    } else {
      call(type, std::false_type{});
    }
  });
}

inline int64_t size_of(Number number) { return number == Number::f32 ? 4 : 2; }

}  // namespace pyeff::gpu
