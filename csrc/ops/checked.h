// Pointers out of tensors whose dtype, size and device are what a kernel was told.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#ifdef PYEFF_EMULATED
#include "cuda/emulate/emulate.h"
#endif

namespace pyeff {

using MaybeTensor = std::optional<torch::stable::Tensor>;

// Pointers to contiguous tensors of one dtype and a known size; null for what is absent (None, or no elements).
struct Checked {
  using Tensor = torch::stable::Tensor;
  using ScalarType = torch::headeronly::ScalarType;

  ScalarType type;
  int device = -1;  // the index of a CUDA device, or the CPU

  const void* read(const Tensor& t, int64_t numel, const char* name) const { return read(t, numel, type, name); }
  const void* read(const Tensor& t, int64_t numel, ScalarType of, const char* name) const {
    check(t, numel, of, name);
    may_read(t.const_data_ptr(), numel * static_cast<int64_t>(t.element_size()), name);
    return t.const_data_ptr();
  }
  const void* read(const MaybeTensor& t, int64_t numel, const char* name) const {
    return t ? read(*t, numel, name) : nullptr;
  }
  const void* read_saved(const Tensor& t, int64_t numel, const char* name) const {
    return t.numel() ? read(t, numel, name) : nullptr;
  }
  void* write(const Tensor& t, int64_t numel, const char* name) const { return write(t, numel, type, name); }
  void* write(const Tensor& t, int64_t numel, ScalarType of, const char* name) const {
    if (t.numel() == 0) return nullptr;
    check(t, numel, of, name);
    may_write(t.mutable_data_ptr(), numel * static_cast<int64_t>(t.element_size()), name);
    return t.mutable_data_ptr();
  }
  void check(const Tensor& t, int64_t numel, ScalarType of, const char* name) const {
    STD_TORCH_CHECK(here(t), name, " is not on the device of the kernels");
    STD_TORCH_CHECK(t.scalar_type() == of, name, " has another dtype than expected");
    STD_TORCH_CHECK(t.is_contiguous(), name, " is not contiguous");
    STD_TORCH_CHECK(t.numel() == numel, name, " has ", t.numel(), " elements, expected ", numel);
  }
  // Emulated kernels may touch nothing but what has been said here.
#ifdef PYEFF_EMULATED
  mutable gpu::emulate::Buffers buffers;
  void may_read(const void* data, int64_t bytes, const char* name) const {
    buffers.reads(data, static_cast<size_t>(bytes), name);
  }
  void may_write(void* data, int64_t bytes, const char* name) const {
    buffers.writes(data, static_cast<size_t>(bytes), name);
  }
#else
  void may_read(const void*, int64_t, const char*) const {}
  void may_write(void*, int64_t, const char*) const {}
#endif
  bool here(const Tensor& t) const { return device < 0 ? t.is_cpu() : t.is_cuda() && t.get_device_index() == device; }
};

}  // namespace pyeff
