#include "plan/steps/convolution.h"

#include "plan/clock.h"

namespace fastgen::plan {
namespace {

constexpr int64_t kMaxTaps = 1 << 8, kMaxDistance = 1 << 14;

// Whether this process may use an algorithm: FASTGEN_WINOGRAD=0 turns off all that are less exact than float32.
bool is_available(cpu::Algorithm algorithm) {
  using cpu::Algorithm;
  if (cpu::is_amx(algorithm) && cpu::amx() == cpu::Amx::none) return false;
  if (cpu::is_bf16_dot(algorithm) && !cpu::can_dot_bf16()) return false;
  const bool less_exact =
      cpu::is_winograd(algorithm) || algorithm == Algorithm::amx_bf16x3 || algorithm == Algorithm::amx_bf16x6;
  return !less_exact || !cpu::winograd_is("0");
}

bool sizes_fit(const ConvolutionFields& f, const Shape& x, const Shape& shape) {
  if (!within(f.groups, 1, x.c) || x.c % f.groups || shape.c % f.groups) return false;
  const int64_t in[2] = {x.h, x.w}, out[2] = {shape.h, shape.w};
  for (int i = 0; i < 2; ++i) {
    if (!within(f.kernel[i], 1, kMaxTaps) || !within(f.stride[i], 1, kMaxDistance) ||
        !within(f.padding[i], 0, kMaxDistance) || !within(f.dilation[i], 1, kMaxDistance))
      return false;
    if (f.reflect && (f.transposed || f.padding[i] >= in[i])) return false;
    const int64_t reach = f.dilation[i] * (f.kernel[i] - 1) + 1;
    if (f.transposed) {
      const int64_t least = (in[i] - 1) * f.stride[i] - 2 * f.padding[i] + reach;
      if (!within(out[i] - least, 0, std::max(f.stride[i], f.dilation[i]) - 1)) return false;
    } else if (in[i] + 2 * f.padding[i] < reach || out[i] != (in[i] + 2 * f.padding[i] - reach) / f.stride[i] + 1) {
      return false;
    }
  }
  return true;
}

cpu::Buffer<char> zeros(int64_t bytes) {  // zeros take as long as other numbers
  auto made = cpu::scratch<char>(bytes);
  std::fill_n(made.get(), bytes, 0);
  return made;
}

const Registered registered("convolution", Convolution::make);

}  // namespace

void Convolution::check(const Check& check) const {
  check(!inputs.empty(), "has no input");
  fields.epilogue.check(check, *this);
  check.flag(fields.reflect);
  check.flag(fields.transposed);
  check(sizes_fit(fields, inputs[0].shape, shape), "has sizes that do not fit each other");
  int64_t weights = fields.kernel[0] * fields.kernel[1];
  check(!__builtin_mul_overflow(weights, inputs[0].shape.c / fields.groups, &weights) &&
            !__builtin_mul_overflow(weights, shape.c, &weights),
        "is too large");
  check.weight(fields.weight, weights, true);
  check.weight(fields.bias, shape.c, false);
  for (const int64_t algorithm : fields.algorithm) {
    const bool is_known = within(algorithm, -1, cpu::kAlgorithms - 1);
    check(is_known && (algorithm < 0 || can_run(static_cast<cpu::Algorithm>(algorithm), check.is_bfloat16())),
          "asks for an algorithm that cannot run");
  }
}

void Convolution::run(const Run& run) const {
  Packed& packed = choose(run.n, run.dtype) == choose(kFew, run.dtype) ? *many_ : *few_;
  std::call_once(packed.once, [&] { packed.weights = pack(choose(run.n, run.dtype), run); });
  run_packed(*packed.weights, run);
}

void Convolution::run_packed(const cpu::PackedConvolution& packed, const Run& run) const {
  const EpilogueOfRun epilogue(fields.epilogue, *this, run, run.weight(fields.bias));
  packed.run(*epilogue, run.inputs[0], run.out, run.parallel);
}

std::unique_ptr<cpu::PackedConvolution> Convolution::pack(cpu::Algorithm algorithm, const Run& run) const {
  return cpu::pack_convolution(geometry(), algorithm, run.weight(fields.weight), run.parallel);
}

Geometry Convolution::geometry() const {
  const Shape& x = inputs[0].shape;
  Geometry conv{};
  conv.ic = x.c;
  conv.ih = x.h;
  conv.iw = x.w;
  conv.oc = shape.c;
  conv.oh = shape.h;
  conv.ow = shape.w;
  conv.kh = fields.kernel[0];
  conv.kw = fields.kernel[1];
  conv.weight_strides[0] = (fields.transposed ? shape.c : x.c) / fields.groups * conv.kh * conv.kw;
  conv.weight_strides[1] = conv.kh * conv.kw;
  conv.weight_strides[2] = conv.kw;
  conv.weight_strides[3] = 1;
  for (int i = 0; i < 2; ++i) {
    conv.stride[i] = fields.stride[i];
    conv.padding[i] = fields.padding[i];
    conv.dilation[i] = fields.dilation[i];
  }
  conv.groups = fields.groups;
  conv.transposed = fields.transposed;
  conv.reflect = fields.reflect;
  conv.x_channels_last = true;
  return conv;
}

// Whether the algorithm can compute the step, on some processor.
bool Convolution::can_run(cpu::Algorithm algorithm, bool bfloat16) const {
  using cpu::Algorithm;
  const bool by_rows = algorithm == Algorithm::rows || algorithm == Algorithm::rows_bf16;
  if (by_rows && fields.epilogue.has_statistics()) return false;
  if (!bfloat16 && cpu::needs_bf16(algorithm)) return false;
  if (bfloat16 && (algorithm == Algorithm::amx_bf16x3 || algorithm == Algorithm::amx_bf16x6)) return false;
  return cpu::can_run(algorithm, geometry());
}

cpu::Algorithm Convolution::choose(int64_t n, DType dtype) const {
  const bool bfloat16 = dtype == DType::bfloat16;
  const auto measured = static_cast<cpu::Algorithm>(algorithm_for(n));
  if (algorithm_for(n) >= 0 && can_run(measured, bfloat16) && is_available(measured)) return measured;
  for (const auto found : {cpu::Algorithm::amx_bf16, cpu::Algorithm::rows_bf16, cpu::Algorithm::direct_bf16})
    if (can_run(found, bfloat16) && is_available(found)) return found;
  return cpu::choose(geometry(), fields.epilogue.describe(shape, dtype, n >= kFew ? kFew : 1, true));
}

bool Convolution::is_alike(const Convolution& other) const {
  return !memcmp(&fields, &other.fields, offsetof(ConvolutionFields, weight)) &&
         fields.epilogue.norm == other.fields.epilogue.norm && inputs[0].shape == other.inputs[0].shape &&
         shape == other.shape;
}

std::vector<Convolution::Timed> Convolution::time_algorithms(int64_t n, DType dtype, const char* weights,
                                                             const cpu::ParallelFor& parallel, bool split) const {
  const int64_t element = dtype == DType::bfloat16 ? 2 : 4;
  const auto x = zeros(n * inputs[0].shape.elements() * element), out = zeros(n * shape.elements() * element);
  const void* const read[2] = {x.get(), nullptr};  // without the residual, if there is one
  const Run run{n, dtype, weights, read, out.get(), true, parallel};
  struct Candidate {
    Timed timed;
    std::unique_ptr<cpu::PackedConvolution> packed;
  };
  std::vector<Candidate> candidates;
  const auto measure = [&](Candidate& candidate) {
    const double took = least_seconds(1, [&] { run_packed(*candidate.packed, run); });
    candidate.timed.seconds = std::min(candidate.timed.seconds, took);
  };
  for (int64_t a = 0; a < cpu::kAlgorithms; ++a) {
    const auto algorithm = static_cast<cpu::Algorithm>(a);
    if (!can_run(algorithm, dtype == DType::bfloat16) || !is_available(algorithm)) continue;
    if (algorithm == cpu::Algorithm::amx_bf16x3 && !split) continue;
    candidates.push_back({{a, std::numeric_limits<double>::infinity()}, pack(algorithm, run)});
    measure(candidates.back());
  }
  const auto faster = [](const auto& one, const auto& other) { return one.timed.seconds < other.timed.seconds; };
  const double first = std::min_element(candidates.begin(), candidates.end(), faster)->timed.seconds;
  const int64_t rounds = std::clamp<int64_t>(static_cast<int64_t>(0.02 / first), 5, 40);
  for (int64_t round = 0; round < rounds && candidates.size() > 1;
       ++round)  // in turns, so that a disturbance affects all of them
    for (Candidate& candidate : candidates) measure(candidate);
  std::sort(candidates.begin(), candidates.end(), faster);
  std::vector<Timed> found;
  for (const Candidate& candidate : candidates) found.push_back(candidate.timed);
  return found;
}

void Convolution::use(int64_t algorithm, int64_t n) {
  fields.algorithm[n >= kFew] = algorithm;
  few_ = std::make_unique<Packed>();
  many_ = std::make_unique<Packed>();
}

int64_t Convolution::packed_bytes(int64_t algorithm) const {
  return cpu::packed_bytes(static_cast<cpu::Algorithm>(algorithm), geometry());
}

}  // namespace fastgen::plan
