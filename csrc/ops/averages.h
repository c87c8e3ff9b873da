// What can be wrong with the tensors of a moving average, before anything is written. It is looked at here, since in
// Python a thousand tensors take longer to check than to update; who is refused is told why by pyeff/ops/ema.py.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace pyeff {

// Memory in pieces; what is written may overlap nothing, or threads would see each other's results.
class Apart {
 public:
  void reads(const void* data, int64_t bytes) { add(data, bytes, false); }
  void writes(const void* data, int64_t bytes) { add(data, bytes, true); }

  void check() {
    std::sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
    Piece last{};  // of all before, the one that ends last
    for (const Piece& piece : pieces_) {
      STD_TORCH_CHECK(piece.begin >= last.end || !(piece.written || last.written),
                      "what is written shares memory with another tensor");
      if (piece.end > last.end) last = piece;
    }
  }

 private:
  struct Piece {
    uintptr_t begin, end;
    bool written;
  };
  void add(const void* data, int64_t bytes, bool written) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (bytes > 0) pieces_.push_back({begin, begin + static_cast<uintptr_t>(bytes), written});
  }
  std::vector<Piece> pieces_;
};

// The three lists are as long as each other, but copies may be none; what stands at one place has one shape, and what
// is written is apart. That they are contiguous and where they should be is for who takes their pointers.
inline void check_averages(const std::vector<torch::stable::Tensor>& ema,
                           const std::vector<torch::stable::Tensor>& params,
                           const std::vector<torch::stable::Tensor>& copies) {
  using torch::stable::Tensor;
  STD_TORCH_CHECK(params.size() == ema.size() && (copies.empty() || copies.size() == ema.size()), "there are ",
                  ema.size(), " averages, ", params.size(), " parameters and ", copies.size(), " copies");
  const auto bytes = [](const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); };
  const auto alike = [&](const Tensor& t, size_t i, const char* name) {
    const auto found = t.sizes(), expected = ema[i].sizes();
    STD_TORCH_CHECK(found.size() == expected.size() && std::equal(found.begin(), found.end(), expected.begin()), name,
                    " has another shape than its average");
  };
  Apart apart;
  for (size_t i = 0; i < ema.size(); ++i) {
    alike(params[i], i, "a parameter");
    apart.writes(ema[i].const_data_ptr(), bytes(ema[i]));
    apart.reads(params[i].const_data_ptr(), bytes(params[i]));
    if (copies.empty()) continue;
    alike(copies[i], i, "a copy");
    apart.writes(copies[i].const_data_ptr(), bytes(copies[i]));
  }
  apart.check();
}

}  // namespace pyeff
