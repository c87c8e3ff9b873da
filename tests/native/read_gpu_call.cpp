#include "read_gpu_call.h"

#include "cuda/emulate/emulate.h"

namespace check {
namespace {

using pyeff::gpu::Machine;
using pyeff::gpu::emulate::Buffers;

void expect_no(const char* error) {
  if (error == nullptr) return;
  std::fprintf(stderr, "%s\n", error);
  std::exit(1);
}

void may_read(Buffers& buffers, const Input& input, const char* name) {
  buffers.reads(input.data(), static_cast<size_t>(input.bytes()), name);
}
void may_read(Buffers& buffers, const Output& output, const char* name) {
  buffers.reads(output.data(), static_cast<size_t>(output.bytes()), name);
}
void may_write(Buffers& buffers, const Output& output, const char* name) {
  buffers.writes(output.data(), static_cast<size_t>(output.bytes()), name);
}

}  // namespace

pyeff::gpu::Number gpu_number(Number number) {
  return number == Number::f32    ? pyeff::gpu::Number::f32
         : number == Number::bf16 ? pyeff::gpu::Number::bf16
                                  : pyeff::gpu::Number::f16;
}

GpuScratch::GpuScratch(int64_t bytes)
    : bytes_(static_cast<size_t>(bytes)), block_(std::aligned_alloc(256, (bytes_ + 255) / 256 * 256)) {
  CHECK(block_ != nullptr);
  std::memset(block_.get(), 0xff, bytes_);
}

pyeff::gpu::ReadLayer gpu_layer(Number number, const pyeff::ReadRows& rows) {
  CHECK(rows.inner == 1 && rows.dims <= 2);
  pyeff::gpu::ReadLayer layer{};
  layer.data = rows.data;
  layer.outer = rows.dims == 2 ? rows.stride[0] : 0;
  layer.inner = rows.stride[rows.dims - 1];
  layer.columns = rows.size[rows.dims - 1];
  const int64_t size = size_of(number);
  layer.aligned =
      reinterpret_cast<uintptr_t>(layer.data) % 16 == 0 && layer.outer * size % 16 == 0 && layer.inner * size % 16 == 0;
  return layer;
}

ReadGpuCall::ReadGpuCall(Number number, const ReadSizes& sizes, const ReadOptions& options, uint64_t seed)
    : ReadInputs(number, sizes, options, seed) {
  for (const pyeff::ReadRows& rows : rows_) layers_.push_back(gpu_layer(phi_number, rows));
}

pyeff::gpu::ReadProblem ReadGpuCall::problem() const {
  return {gpu_number(number),   gpu_number(phi_number), sizes.cell,
          sizes.norm,           sizes.reduce,           static_cast<float>(sizes.eps),
          sizes.layers,         sizes.tokens,           sizes.width,
          sizes.rank,           layers_.data(),         w_ih_.data(),
          w_hh_.data(),         b_ih_.maybe(),          b_hh_.maybe(),
          norm_weight_.maybe(), norm_bias_.maybe(),     h0_.maybe(),
          c0_.maybe()};
}

// What both directions read.
static void may_read_all(Buffers& buffers, const std::vector<Input>& phi, std::initializer_list<const Input*> others) {
  for (const Input& layer : phi) may_read(buffers, layer, "phi");
  const char* names[] = {"w_ih", "w_hh", "b_ih", "b_hh", "norm_weight", "norm_bias", "h0", "c0", "grad_out", "grad_c"};
  const char** name = names;
  for (const Input* input : others) may_read(buffers, *input, *name++);
}

ForwardOutputs ReadGpuCall::forward(const Machine& machine, bool save, bool save_gates, Wanted kept) const {
  ForwardOutputs o = forward_outputs(save, save_gates, true);
  int64_t next = 0;
  for (Output* output : {&o.h, &o.c, &o.gates, &o.stats})
    if (!kept(next++)) *output = Output();
  const pyeff::gpu::ReadForward f{o.out.data(), o.c_last.maybe(), o.h.maybe(),
                                  o.c.maybe(),  o.gates.maybe(),  static_cast<float*>(o.stats.maybe())};
  const pyeff::gpu::ReadProblem p = problem();
  const GpuScratch scratch(read_forward_scratch(p, f, machine));
  Buffers buffers;
  may_read_all(buffers, phi_, {&w_ih_, &w_hh_, &b_ih_, &b_hh_, &norm_weight_, &norm_bias_, &h0_, &c0_});
  const char* names[] = {"out", "c_last", "h", "c", "gates", "stats"};
  const char** name = names;
  for (const Output* output : o.all()) may_write(buffers, *output, *name++);
  buffers.writes(scratch.data(), scratch.bytes(), "scratch");
  expect_no(read_forward(p, f, scratch.data(), machine, nullptr));
  for (const Output* output : o.all()) CHECK(output->guarded());
  return o;
}

BackwardOutputs ReadGpuCall::backward(const Machine& machine, const ForwardOutputs& saved, Wanted wanted) const {
  BackwardOutputs o = backward_outputs(wanted, true);
  std::vector<void*> dphi;
  for (const Output& output : o.dphi) dphi.push_back(output.maybe());
  const pyeff::gpu::ReadBackward b{
      grad_out_.maybe(),    grad_c_.maybe(),     saved.h.maybe(),
      saved.c.maybe(),      saved.gates.maybe(), static_cast<const float*>(saved.stats.maybe()),
      dphi.data(),          o.dw_ih.maybe(),     o.dw_hh.maybe(),
      o.db_ih.maybe(),      o.db_hh.maybe(),     o.dnorm_weight.maybe(),
      o.dnorm_bias.maybe(), o.dh0.maybe(),       o.dc0.maybe()};
  const pyeff::gpu::ReadProblem p = problem();
  const GpuScratch scratch(read_backward_scratch(p, b, machine));
  Buffers buffers;
  may_read_all(buffers, phi_,
               {&w_ih_, &w_hh_, &b_ih_, &b_hh_, &norm_weight_, &norm_bias_, &h0_, &c0_, &grad_out_, &grad_c_});
  const char* names[] = {"h", "c", "gates", "stats"};
  const char** name = names;
  for (const Output* output : {&saved.h, &saved.c, &saved.gates, &saved.stats}) may_read(buffers, *output, *name++);
  const char* written[] = {"dw_ih", "dw_hh", "db_ih", "db_hh", "dnorm_weight", "dnorm_bias", "dh0", "dc0"};
  const auto all = o.all();
  for (size_t i = 0; i < all.size(); ++i)
    may_write(buffers, *all[i], i < o.dphi.size() ? "dphi" : written[i - o.dphi.size()]);
  buffers.writes(scratch.data(), scratch.bytes(), "scratch");
  expect_no(read_backward(p, b, scratch.data(), machine, nullptr));
  for (const Output* output : o.all()) CHECK(output->guarded());
  return o;
}

}  // namespace check
