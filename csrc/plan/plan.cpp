#include "plan/plan.h"

#include "plan/clock.h"
#include "plan/steps/ends.h"
#include "plan/thread_pool.h"

namespace fastgen::plan {
namespace {

constexpr int64_t kInFlight = (16 << 20) / 4;  // floats: what a step reads and writes should stay in the cache

}  // namespace

Plan::Plan(File file, int threads)
    : file_(std::move(file)), threads_(threads > 0 ? std::min(threads, thread_count()) : thread_count()) {
  Contents contents = parse(file_);
  header_ = contents.header;
  steps_ = std::move(contents.steps);
  weights_ = contents.weights;
  const bool bfloat16 =
      header_.precision == Precision::bfloat16 && (cpu::can_dot_bf16() || cpu::amx() != cpu::Amx::none);
  dtype_ = bfloat16 ? DType::bfloat16 : DType::float32;
  element_ = bfloat16 ? 2 : 4;
  parallel_ = {threads_, [this](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
                 run_parallel(threads_, count, body);
               }};
  find_ends();
  place_ends();
  place_values();
}

void Plan::find_ends() {
  std::vector<size_t> input_of(steps_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = *steps_[i];
    places_.push_back({Place::slot, 0});
    if (const auto* const input = dynamic_cast<const Input*>(&step)) {
      input_of[i] = inputs_.size();
      places_[i] = {Place::input, inputs_.size()};
      places_[i].gives = static_cast<int64_t>(inputs_.size());
      inputs_.push_back({input->fields.rank, input->shape});
    } else if (const auto* const output = dynamic_cast<const Output*>(&step)) {
      places_[i] = {Place::output, outputs_.size()};
      outputs_.push_back({output->fields.rank, output->shape});
    } else if (step.reads() == ValueType::labels) {
      for (const Read& read : step.inputs) {
        int64_t& labels = inputs_[input_of[read.value]].label_count;
        labels = std::min(labels, step.label_count());
      }
    }
  }
  if (inputs_.empty() || outputs_.empty()) throw std::runtime_error("the plan has no input or no output");
}

// Neither an input that is already in the plan's order is copied, nor a value that only an output reads and that its
// step can write in the caller's order.
void Plan::place_ends() {
  const auto is_plain = [](const Shape& shape) { return shape.c == 1 || shape.pixels() == 1; };
  std::vector<int> uses(steps_.size());
  for (const auto& step : steps_)
    for (const Read& read : step->inputs) ++uses[read.value];
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = *steps_[i];
    Place& place = places_[i];
    if (place.where == Place::input) {
      const bool as_is = inputs_[place.index].rank == 0 || (dtype_ == DType::float32 && is_plain(step.shape));
      place.is_computed = !as_is;
      if (!as_is) place.where = Place::slot;
    } else if (place.where == Place::output && dtype_ == DType::float32) {
      const size_t value = step.inputs[0].value;
      const Step& writer = *steps_[value];
      const bool in_order = is_plain(step.shape);
      if (places_[value].where != Place::slot || places_[value].gives >= 0 || uses[value] > 1 ||
          (!in_order && !(writer.shape == step.shape && writer.can_write_channels_first())))
        continue;
      places_[value] = {Place::output, place.index, -1, in_order};
      place.is_computed = false;
    }
  }
}

void Plan::check_labels(int64_t n, const std::vector<const void*>& in) const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].rank) continue;
    const int64_t count = inputs_[i].label_count;
    const int64_t* const labels = static_cast<const int64_t*>(in[i]);
    const int64_t* const wrong =
        std::find_if(labels, labels + n, [&](int64_t label) { return label < 0 || label >= count; });
    if (wrong == labels + n) continue;
    throw std::out_of_range("inputs[" + std::to_string(i) + "] must be labels from 0 to " + std::to_string(count - 1) +
                            ", got " + std::to_string(*wrong) + " for image " + std::to_string(wrong - labels));
  }
}

// Each value has a slot of memory from the step that computes it to the last one that reads it.
void Plan::place_values() {
  std::vector<size_t> last_use(steps_.size());
  int64_t largest = 1;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = *steps_[i];
    last_use[i] = i;
    for (const Read& read : step.inputs) last_use[read.value] = i;
    if (!step.inputs.empty() && step.computes() != ValueType::nothing)
      largest = std::max(largest, step.inputs[0].shape.elements() + step.shape.elements());
    whole_batch_ |= step.needs_whole_batch();
  }
  images_at_once_ = std::max<int64_t>(1, kInFlight / largest);
  std::vector<size_t> free;
  const auto find_slot = [&](int64_t size) {
    const auto better = [&](size_t a, size_t b) {  // the smallest that is large enough, else the largest
      const bool fits_a = slot_sizes_[a] >= size, fits_b = slot_sizes_[b] >= size;
      return fits_a != fits_b ? fits_a : (slot_sizes_[a] < slot_sizes_[b]) == fits_a;
    };
    const auto found = std::min_element(free.begin(), free.end(), better);
    if (found == free.end()) {
      slot_sizes_.push_back(size);
      return slot_sizes_.size() - 1;
    }
    const size_t slot = *found;
    slot_sizes_[slot] = std::max(slot_sizes_[slot], size);
    free.erase(found);
    return slot;
  };
  for (size_t i = 0; i < steps_.size(); ++i) {
    if (places_[i].where == Place::slot) places_[i].index = find_slot(steps_[i]->shape.elements());
    for (size_t value = 0; value <= i; ++value)
      if (last_use[value] == i && places_[value].where == Place::slot) free.push_back(places_[value].index);
  }
}

std::unique_ptr<Plan::Workspace> Plan::lease(int64_t images) const {
  std::unique_ptr<Workspace> workspace;
  {
    const std::lock_guard<std::mutex> lock(sharing());
    if (!idle_.empty()) {
      workspace = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!workspace) workspace = std::make_unique<Workspace>();
  int64_t size = 0;
  for (const int64_t elements : slot_sizes_) size += slot_bytes(elements, images);
  if (workspace->size < size) {
    workspace->size = 0;
    workspace->memory = cpu::scratch<char>(size);
    workspace->size = size;
  }
  return workspace;
}

void Plan::give_back(std::unique_ptr<Workspace> workspace) const {
  const std::lock_guard<std::mutex> lock(sharing());
  idle_.push_back(std::move(workspace));
}

void Plan::run(int64_t n, const std::vector<const void*>& in, const std::vector<float*>& out) const {
  check_labels(n, in);
  const int64_t parts = whole_batch_ ? 1 : ceil_div(n, images_at_once_), at_once = parts ? ceil_div(n, parts) : 0;
  auto workspace = lease(at_once);
  for (int64_t first = 0; first < n; first += at_once) {
    auto from = in;
    auto to = out;
    for (size_t i = 0; i < in.size(); ++i) from[i] = static_cast<const char*>(in[i]) + first * inputs_[i].bytes();
    for (size_t i = 0; i < out.size(); ++i) to[i] += first * outputs_[i].shape.elements();
    run_images(std::min(at_once, n - first), from, to, *workspace);
  }
  give_back(std::move(workspace));
}

void Plan::run_images(int64_t n, const std::vector<const void*>& in, const std::vector<float*>& out,
                      Workspace& workspace, double* seconds) const {
  std::vector<void*> slots;
  char* next = workspace.memory.get();
  for (const int64_t elements : slot_sizes_) {
    slots.push_back(next);
    next += slot_bytes(elements, n);
  }
  std::vector<const void*> values(steps_.size()), inputs;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = *steps_[i];
    const Place& place = places_[i];
    inputs.clear();
    if (place.gives >= 0) inputs.push_back(in[place.gives]);
    for (const Read& read : step.inputs) inputs.push_back(values[read.value]);
    if (place.where == Place::input) values[i] = inputs[0];
    if (!place.is_computed) continue;
    void* const to = place.where == Place::slot ? slots[place.index] : out[place.index];
    values[i] = to;
    const auto start = seconds ? Clock::now() : Clock::time_point();
    step.run({n, dtype_, weights_, inputs.data(), to, place.channels_last, parallel_});
    if (seconds) seconds[i] = seconds_since(start);
  }
}

std::string Plan::file() const {
  std::string bytes(file_.bytes.get(), file_.size);
  memcpy(bytes.data(), &header_, sizeof(header_));
  for (const auto& step : steps_) step->write_fields(bytes.data() + step->fields_at);
  seal(bytes);
  return bytes;
}

}  // namespace fastgen::plan
