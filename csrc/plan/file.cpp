#include "plan/file.h"

#include "plan/steps.h"

#include <cstdio>
#include <stdexcept>

namespace fastgen::plan {
namespace {

constexpr int64_t kMostPixels = 1 << 14, kMostTaps = 1 << 8, kMostChannels = 1 << 24, kMostElements = 1 << 28;
constexpr size_t kChecksummed = offsetof(Header, size);

void check(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

// The checksum of zlib, eight bytes at a time: table[k] moves a byte k bytes on.
uint32_t crc32(const char* bytes, size_t size) {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 8> made{};
    for (uint32_t i = 0; i < 256; ++i) {
      made[0][i] = i;
      for (int bit = 0; bit < 8; ++bit) made[0][i] = made[0][i] >> 1 ^ (made[0][i] & 1 ? 0xedb88320u : 0);
    }
    for (size_t k = 1; k < 8; ++k)
      for (size_t i = 0; i < 256; ++i) made[k][i] = made[k - 1][i] >> 8 ^ made[0][made[k - 1][i] & 0xff];
    return made;
  }();
  uint32_t crc = ~0u;
  for (; size >= 8; size -= 8, bytes += 8) {
    uint8_t eight[8];
    memcpy(eight, bytes, 8);
    for (int k = 0; k < 4; ++k) eight[k] ^= static_cast<uint8_t>(crc >> 8 * k);
    crc = 0;
    for (int k = 0; k < 8; ++k) crc ^= table[7 - k][eight[k]];
  }
  for (; size; --size, ++bytes) crc = table[0][(crc ^ static_cast<uint8_t>(*bytes)) & 0xff] ^ crc >> 8;
  return ~crc;
}

bool within(int64_t value, int64_t least, int64_t most) { return least <= value && value <= most; }

// The elements of an image, whose sizes are in range; 0 otherwise.
int64_t elements(int64_t c, int64_t h, int64_t w) {
  const bool fits =
      within(c, 1, kMostChannels) && within(h, 1, kMostPixels) && within(w, 1, kMostPixels) && c * h <= kMostElements;
  return fits && c * h * w <= kMostElements ? c * h * w : 0;
}

bool has_rank(int64_t rank, int64_t c, int64_t h, int64_t w) {
  return rank == 3 || (rank == 1 && h == 1 && w == 1) || (rank == 0 && c == 1 && h == 1 && w == 1);
}

void check_ends(const Header& header) {
  check(within(header.bfloat16, 0, 1), "the plan has an unknown precision");
  for (const auto& [rank, size] :
       {std::pair{header.input_rank, header.input}, std::pair{header.output_rank, header.output}}) {
    check(has_rank(rank, size[0], size[1], size[2]) && elements(size[0], size[1], size[2]),
          "the plan's input or output has an impossible size");
  }
}

bool convolution_fits(const Step& s) {
  if (!within(s.kh, 1, kMostTaps) || !within(s.kw, 1, kMostTaps) || !within(s.groups, 1, s.ic) || s.ic % s.groups ||
      s.c % s.groups)
    return false;
  const int64_t in[2] = {s.ih, s.iw}, out[2] = {s.oh, s.ow}, kernel[2] = {s.kh, s.kw};
  for (int i = 0; i < 2; ++i) {
    if (!within(s.stride[i], 1, kMostPixels) || !within(s.padding[i], 0, kMostPixels) ||
        !within(s.dilation[i], 1, kMostPixels))
      return false;
    const int64_t reach = s.dilation[i] * (kernel[i] - 1) + 1;
    if (s.reflect && (s.kind == Kind::conv_transpose || s.padding[i] >= in[i])) return false;
    if (s.kind == Kind::conv) {
      if (in[i] + 2 * s.padding[i] < reach || out[i] != (in[i] + 2 * s.padding[i] - reach) / s.stride[i] + 1)
        return false;
    } else {
      const int64_t least = (in[i] - 1) * s.stride[i] - 2 * s.padding[i] + reach;
      if (!within(out[i] - least, 0, std::max(s.stride[i], s.dilation[i]) - 1)) return false;
    }
  }
  return true;
}

constexpr int64_t kLabels = -1;  // the size of a value that is labels; 0 is that of one that nothing may read

// What a step leaves for the next ones.
int64_t size_of(const Step& s) {
  if (s.kind == Kind::output) return 0;
  return s.kind == Kind::input && s.kh == 0 ? kLabels : elements(s.c, s.oh, s.ow);
}

void check_other(const Step& s, const std::string& name, int64_t y, int64_t values) {
  check(other_fits(s, y), name + "has a size that it cannot compute");
  check(s.kind != Kind::input || has_rank(s.kh, s.c, s.oh, s.ow), name + "is no possible input");
  check(s.kind != Kind::output || s.kh == 1 || has_rank(s.kh, s.c, s.oh, s.ow), name + "is no possible output");
  int64_t weights = s.kh;
  check(s.kind != Kind::embedding || (s.kh > 0 && !__builtin_mul_overflow(weights, s.c, &weights) && s.weight >= 0 &&
                                      weights <= values && s.weight <= values - weights),
        name + "has weights beyond the file's end");
}

void check_step(const Step& s, int64_t at, const std::vector<int64_t>& sizes, const Header& header) {
  const int64_t values = header.values;
  const std::string name = "step " + std::to_string(at) + " of the plan ";
  const int64_t in = elements(s.ic, s.ih, s.iw), out = elements(s.c, s.oh, s.ow);
  check(within(static_cast<int64_t>(s.kind), 0, static_cast<int64_t>(Kind::pixel_shuffle)),
        name + "is of an unknown kind");
  check(in && out, name + "has an impossible size");
  const bool labels = s.kind == Kind::embedding;
  check(within(s.x, 0, at) && (s.kind == Kind::input || sizes[s.x] == (labels ? kLabels : in)),
        name + "reads what is not there");
  check(within(s.residual, -1, at), name + "reads what is not there");
  check(within(s.activation, 0, static_cast<int64_t>(Activation::silu)) &&
            within(static_cast<int64_t>(s.norm), 0, static_cast<int64_t>(Norm::group)),
        name + "has an unknown activation or norm");
  if (s.kind == Kind::concat) {
    check(s.residual >= 0 && s.ih == s.oh && s.iw == s.ow && s.ic < s.c && sizes[s.residual] == out - in,
          name + "joins what does not fit");
    return;
  }
  if (s.kind > Kind::concat) return check_other(s, name, s.residual < 0 ? 0 : sizes[s.residual], values);
  check(s.residual < 0 || sizes[s.residual] == out, name + "adds what does not fit");
  check(s.norm != Norm::group || (within(s.num_groups, 1, s.c) && s.c % s.num_groups == 0),
        name + "has channels that its groups do not divide");
  const auto there = [&](int64_t offset, int64_t count, bool needed) {
    check(offset >= 0 || !needed, name + "lacks its weights");
    check(offset == -1 || (offset >= 0 && count <= values && offset <= values - count),
          name + "has weights beyond the file's end");
  };
  there(s.norm_weight, s.c, false);
  there(s.norm_bias, s.c, false);
  there(s.mean, s.c, s.norm == Norm::affine);
  there(s.var, s.c, s.norm == Norm::affine);
  if (s.kind == Kind::pointwise)
    return check(s.ic == s.c && s.ih == s.oh && s.iw == s.ow, name + "changes a size that it cannot");
  check(convolution_fits(s), name + "is no possible convolution");
  int64_t weights = s.kh * s.kw;
  check(!__builtin_mul_overflow(weights, s.ic / s.groups, &weights) && !__builtin_mul_overflow(weights, s.c, &weights),
        name + "is too large");
  there(s.weight, weights, true);
  there(s.bias, s.c, false);
  for (const int64_t algorithm : s.algorithm) {
    const bool known = within(algorithm, -1, cpu::kAlgorithms - 1);
    check(known && (algorithm < 0 || runs(static_cast<cpu::Algorithm>(algorithm), s, header.bfloat16)),
          name + "asks for an algorithm that cannot run");
  }
}

}  // namespace

Header check_header(const char* bytes, size_t size) {
  check(size >= sizeof(Header), "it is too short for a plan");
  Header header;
  memcpy(&header, bytes, sizeof(header));
  check(!memcmp(header.magic, kMagic, sizeof(kMagic)), "it is not a plan");
  check(header.version == kVersion, "it is a plan of version " + std::to_string(header.version) +
                                        ", and this fastgen reads version " + std::to_string(kVersion) +
                                        ": export the model again");
  check(header.size == static_cast<int64_t>(size),
        "it is cut short or damaged: " + std::to_string(size) + " bytes of " + std::to_string(header.size));
  const int64_t rest = header.size - static_cast<int64_t>(sizeof(Header));
  check(within(header.steps, 1, rest / static_cast<int64_t>(sizeof(Step))), "it is damaged: it cannot hold its steps");
  check(header.values >= 0 && header.values <= rest / 4 &&
            header.steps * static_cast<int64_t>(sizeof(Step)) + header.values * 4 == rest,
        "it is damaged: it cannot hold its weights");
  return header;
}

std::vector<Step> check_file(const char* bytes, size_t size) {
  const Header header = check_header(bytes, size);
  check(crc32(bytes + kChecksummed, size - kChecksummed) == header.checksum, "it is damaged: its checksum is wrong");
  check_ends(header);
  std::vector<Step> steps(static_cast<size_t>(header.steps));
  memcpy(steps.data(), bytes + sizeof(Header), steps.size() * sizeof(Step));
  std::vector<int64_t> sizes{header.input_rank ? elements(header.input[0], header.input[1], header.input[2]) : kLabels};
  for (const Step& step : steps) {
    check_step(step, static_cast<int64_t>(sizes.size()) - 1, sizes, header);
    sizes.push_back(size_of(step));
  }
  const Step& last = steps.back();
  check(last.kind != Kind::input && (last.kind != Kind::output || last.kh == header.output_rank),
        "the plan's output is not its last step's");
  check(header.output_rank == 1
            ? header.output[0] == elements(last.c, last.oh, last.ow)
            : header.output[0] == last.c && header.output[1] == last.oh && header.output[2] == last.ow,
        "the plan's output is not its last step's");
  return steps;
}

void seal(std::string& bytes) {
  const uint32_t checksum = crc32(bytes.data() + kChecksummed, bytes.size() - kChecksummed);
  memcpy(bytes.data() + offsetof(Header, checksum), &checksum, sizeof(checksum));
}

bool runs(cpu::Algorithm algorithm, const Step& step, bool bfloat16) {
  using cpu::Algorithm;
  const bool statistics = step.norm != Norm::none && step.norm != Norm::affine;
  if (statistics && (algorithm == Algorithm::rows || algorithm == Algorithm::rows_bf16)) return false;
  if (!bfloat16 && (algorithm == Algorithm::direct_bf16 || algorithm == Algorithm::rows_bf16)) return false;
  return cpu::can_run(algorithm, geometry(step));
}

Geometry geometry(const Step& s) {
  Geometry conv{};
  conv.ic = s.ic;
  conv.ih = s.ih;
  conv.iw = s.iw;
  conv.oc = s.c;
  conv.oh = s.oh;
  conv.ow = s.ow;
  conv.kh = s.kh;
  conv.kw = s.kw;
  const int64_t inner = s.kind == Kind::conv ? s.ic / s.groups : s.c / s.groups;
  conv.weight_strides[0] = inner * s.kh * s.kw;
  conv.weight_strides[1] = s.kh * s.kw;
  conv.weight_strides[2] = s.kw;
  conv.weight_strides[3] = 1;
  for (int i = 0; i < 2; ++i) {
    conv.stride[i] = s.stride[i];
    conv.padding[i] = s.padding[i];
    conv.dilation[i] = s.dilation[i];
  }
  conv.groups = s.groups;
  conv.transposed = s.kind == Kind::conv_transpose;
  conv.reflect = s.reflect != 0;
  conv.x_channels_last = true;
  return conv;
}

Epilogue describe(const Step& s, DType dtype, int64_t n, bool channels_last) {
  Epilogue op{};
  op.dtype = dtype;
  op.n = n;
  op.c = s.c;
  op.s = s.oh * s.ow;
  op.channels_last = channels_last;
  op.normalize = s.norm != Norm::none;
  op.batch_stats = op.normalize && s.norm != Norm::affine;
  op.per_sample = op.batch_stats && s.norm != Norm::batch;
  op.stats_groups = s.norm == Norm::group ? s.num_groups : s.c;
  op.eps = s.eps;
  op.activation = static_cast<Activation>(s.activation);
  op.negative_slope = s.negative_slope;
  return op;
}

}  // namespace fastgen::plan
