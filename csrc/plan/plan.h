// A network as a list of steps whose weights are packed once: what fastgen.Engine and fastgen.runtime.Plan run. No
// torch.
#pragma once

#include <limits>
#include <mutex>
#include <string>

#include "cpu/convolution.h"

namespace fastgen::plan {

// The file: Header, `steps` records of Step, `values` floats; little-endian. fastgen/runtime/_file.py writes it.
constexpr char kMagic[8] = {'f', 'g', 'p', 'l', 'a', 'n', '\r', '\n'};
constexpr uint32_t kVersion = 1;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t checksum;  // CRC-32 of everything behind it
  int64_t size;       // of the file in bytes
  int64_t steps, values;
  int64_t bfloat16;  // 1: values between steps are bfloat16, on a processor that multiplies them; else float32
  int64_t input_rank, input[3];    // c, h, w of an image; rank 1: (c), rank 3: (c, h, w); rank 0: a label, int64
  int64_t output_rank, output[3];  // rank 0: a number
};

// input: another input behind the header's. output: what x is, is an output before the header's, or as the last step
// that one itself.
enum class Kind : int64_t {
  conv,
  conv_transpose,
  pointwise,
  concat,
  input,
  output,
  embedding,
  add,
  mul,
  narrow,
  reshape,
  avg_pool,
  max_pool,
  upsample_nearest,
  upsample_bilinear,
  pixel_shuffle
};
enum class Norm : int64_t {
  none,
  affine,
  batch,
  instance,
  group
};  // affine: by mean and var; the others by statistics of x

// Value 0 is the input, value i + 1 what step i computes. Offsets are in floats, -1 where there is nothing.
struct Step {
  Kind kind;
  int64_t x, residual;  // residual: added before the activation; of concat the second part
  int64_t ic, ih, iw;   // how it reads x, the same elements in the order (h, w, c)
  int64_t c, oh, ow;
  // Also, kh: the rank of an input or output; the rows of an embedding, whose weight is (kh, c). (groups, kh, kw): the
  // size of what is added or multiplied, in which 1 stands for all. padding[0]: the first channel of narrow. reflect:
  // count_include_pad of avg_pool, align_corners of upsample_bilinear, and for upsample_nearest whether it is PyTorch's
  // nearest-exact, for pixel_shuffle whether its channels come as (dy, dx, c) and not as PyTorch's (c, dy, dx).
  int64_t kh, kw, stride[2], padding[2], dilation[2], groups, reflect;
  Norm norm;
  int64_t num_groups, activation;
  int64_t weight, bias, norm_weight, norm_bias, mean, var;
  int64_t algorithm[2];  // of cpu::Algorithm, for few images and for many; -1: chosen by the sizes
  double eps, negative_slope;
};

// An input or output of the network.
struct End {
  int64_t rank, size[3];
  int64_t rows = std::numeric_limits<int64_t>::max();  // labels lie below
};

// The bytes of a file.
struct File {
  cpu::Buffer<char> bytes;
  size_t size;

  static File read(const std::string& path);  // checks the header first
};

class Plan {
 public:
  // Throws std::runtime_error unless all in the file is consistent; nothing is allocated before that.
  Plan(File file, int threads);

  // One pointer an input and output, (n, c, h, w) of float or (n) of int64, contiguous. Several threads may call it.
  // Throws std::out_of_range for a label that no embedding has.
  void run(int64_t n, const std::vector<const void*>& in, const std::vector<float*>& out) const;

  // Measures the algorithms of every convolution for `n` images, or as many as run at once, uses the best ones from now
  // on and returns them, one a step (-1: none). Each is timed alone, and those with fewer bytes of packed weights than
  // the fastest, if that might make up for it, again in the whole network, where all weights share the caches. Not
  // while another thread runs the plan.
  std::vector<int64_t> tune(int64_t n);

  // Seconds that each step takes in the network for `n` images, or as many as run at once, the least of `repeats`.
  std::vector<double> profile(int64_t n, int64_t repeats) const;

  // The bytes of a file of this plan, with the algorithms that it uses.
  std::string file() const;

  const Header& header() const { return header_; }
  const std::vector<Step>& steps() const { return steps_; }
  const std::vector<End>& inputs() const { return inputs_; }
  const std::vector<End>& outputs() const { return outputs_; }
  int threads() const { return threads_; }
  int64_t images_at_once() const { return whole_batch_ ? std::numeric_limits<int64_t>::max() : images_at_once_; }

 private:
  struct Workspace {
    cpu::Buffer<char> memory;
    int64_t size = 0;
  };
  struct Convolution {  // one a step and choice of algorithm, packed when it first runs
    std::once_flag once;
    std::unique_ptr<cpu::PackedConvolution> packed;
  };
  struct Timed {
    int64_t algorithm;
    double seconds;
  };

  File file_;
  std::vector<Step> steps_;
  Header header_;
  std::vector<End> inputs_, outputs_;
  const float* values_;                        // in the file
  std::vector<int64_t> slot_of_, slot_sizes_;  // where each value lies; elements an image
  int64_t images_at_once_;
  bool whole_batch_ = false;  // a norm looks at all images
  DType dtype_;
  int64_t element_;  // bytes
  int threads_;
  cpu::ParallelFor parallel_;
  std::vector<std::unique_ptr<Convolution>> convolutions_;  // for few images and for many
  mutable std::vector<std::unique_ptr<Workspace>> idle_;

  void find_ends();
  void check_labels(int64_t n, const std::vector<const void*>& in) const;
  void place_values();
  std::unique_ptr<Workspace> lease(int64_t images) const;
  void give_back(std::unique_ptr<Workspace> workspace) const;
  void run_images(int64_t n, const std::vector<const void*>& in, const std::vector<float*>& out, Workspace& workspace,
                  double* took = nullptr) const;  // seconds of each step
  void read(const void* in, int64_t n, int64_t c, int64_t pixels, void* to) const;
  void write(const void* from, int64_t n, int64_t c, int64_t pixels, float* out) const;
  void run_step(size_t i, int64_t n, const void* x, const void* residual, void* out, bool channels_last) const;
  void run_with(const cpu::PackedConvolution* convolution, const Step& step, int64_t n, const void* x,
                const void* residual, void* out, bool channels_last) const;
  int64_t slot_bytes(int64_t slot, int64_t images) const {
    return ceil_div(slot_sizes_[slot] * images * element_, 64) * 64;
  }
  cpu::Algorithm algorithm(size_t i, int64_t n) const;
  const cpu::PackedConvolution& packed(size_t i, int64_t n) const;
  std::vector<Timed> time_alone(const Step& step, int64_t n) const;  // fastest first
  void use(size_t i, int64_t algorithm, int64_t n);                  // for this step and those alike
  const float* value(int64_t offset) const { return offset < 0 ? nullptr : values_ + offset; }
};

}  // namespace fastgen::plan
