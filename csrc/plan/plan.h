// A network as a list of steps whose weights are packed once: what fastgen.Engine and fastgen.runtime.Plan run. No
// torch.
#pragma once

#include "plan/file.h"
#include "plan/steps/convolution.h"

namespace fastgen::plan {

// An input or output of the network.
struct End {
  int64_t rank;
  Shape shape;
  int64_t label_count = std::numeric_limits<int64_t>::max();  // labels are below

  int64_t bytes() const { return rank ? shape.elements() * 4 : 8; }  // per image, of an input
};

class Plan {
 public:
  // Throws std::runtime_error unless the whole file is consistent; until that is checked, nothing is allocated for its
  // contents.
  Plan(File file, int threads);

  // One pointer per input and output, (n, c, h, w) of float or (n) of int64, contiguous. Several threads may call it.
  // Throws std::out_of_range for a label that no embedding has.
  void run(int64_t n, const std::vector<const void*>& in, const std::vector<float*>& out) const;

  // Measures the algorithms of every convolution for `n` images, or as many as run at once, uses the best ones from now
  // on and returns them, one per step (-1: none). Each algorithm is timed alone. An algorithm with fewer bytes of
  // packed weights than the fastest one, if the difference could make up for its time, is timed again in the whole
  // network, where all weights share the caches. No other thread may run the plan meanwhile.
  // split: amx_bf16x3 may be chosen too.
  std::vector<int64_t> tune(int64_t n, bool split);

  // The batch sizes to tune for: a small one, and a large one if that many images run at once.
  std::vector<int64_t> batches_to_tune() const {
    return images_at_once() >= kFew ? std::vector<int64_t>{1, 2 * kFew} : std::vector<int64_t>{1};
  }

  // Seconds per step in the whole network for `n` images, or as many as run at once: the least of `repeats` runs.
  std::vector<double> profile(int64_t n, int64_t repeats) const;

  // This plan as the bytes of a file, with the algorithms that it uses.
  std::string file() const;

  const Header& header() const { return header_; }
  void set_error(double error) { header_.error = error; }
  const std::vector<End>& inputs() const { return inputs_; }
  const std::vector<End>& outputs() const { return outputs_; }
  // The precision on this processor; header().precision is the one that the file asks for.
  Precision runs_as() const { return dtype_ == DType::bfloat16 ? Precision::bfloat16 : Precision::float32; }
  int threads() const { return threads_; }
  int64_t images_at_once() const { return whole_batch_ ? std::numeric_limits<int64_t>::max() : images_at_once_; }

 private:
  struct Workspace {
    cpu::Buffer<char> memory;
    int64_t size = 0;
  };
  // The memory of a step's value: a slot of the workspace, or an input or output of the caller.
  struct Place {
    enum { slot, input, output } where;
    size_t index;
    int64_t gives = -1;  // the input of the caller that the step gives
    bool channels_last = true;
    bool is_computed =
        true;  // false: the caller's input is read in place, or the step of the value already wrote the output
  };

  File file_;
  Header header_;
  std::vector<std::unique_ptr<Step>> steps_;
  const char* weights_;  // in the file
  std::vector<End> inputs_, outputs_;
  std::vector<Place> places_;        // of each step's value
  std::vector<int64_t> slot_sizes_;  // elements per image
  int64_t images_at_once_;
  bool whole_batch_ = false;
  DType dtype_;
  int64_t element_;  // bytes
  int threads_;
  cpu::ParallelFor parallel_;
  mutable std::vector<std::unique_ptr<Workspace>> idle_;

  void find_ends();
  void check_labels(int64_t n, const std::vector<const void*>& in) const;
  void place_ends();
  void place_values();
  std::unique_ptr<Workspace> lease(int64_t images) const;
  void give_back(std::unique_ptr<Workspace> workspace) const;
  void run_images(int64_t n, const std::vector<const void*>& in, const std::vector<float*>& out, Workspace& workspace,
                  double* seconds = nullptr) const;  // of each step
  int64_t slot_bytes(int64_t elements, int64_t images) const { return ceil_div(elements * images * element_, 64) * 64; }

  // Tuning (tune.cpp)
  std::vector<Convolution*> convolutions() const;       // of each step; null where it is none
  void use(size_t step, int64_t algorithm, int64_t n);  // for this step and all that are alike
};

}  // namespace fastgen::plan
