#include "plan/plan.h"

#include <chrono>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <tuple>

#include "plan/file.h"
#include "plan/pool.h"
#include "plan/steps.h"

namespace fastgen::plan {
namespace {

constexpr int64_t kFew = 8;                    // from so many images on, a step runs its algorithm for many
constexpr int64_t kInFlight = (16 << 20) / 4;  // floats: what a step reads and writes should stay in the cache
constexpr double kFetched = 1e10;              // bytes a second of packed weights that come from memory, at least

using Clock = std::chrono::steady_clock;

bool is_convolution(const Step& step) { return step.kind == Kind::conv || step.kind == Kind::conv_transpose; }

bool is_turned_off(cpu::Algorithm algorithm) {
  return cpu::winograd_is("0") &&
         (algorithm == cpu::Algorithm::winograd_4x2 || algorithm == cpu::Algorithm::winograd_4x3);
}

// Whether two convolutions take the same time.
bool is_alike(const Step& a, const Step& b) {
  const auto facts = [](const Step& s) {
    return std::tuple(s.kind, s.ic, s.ih, s.iw, s.c, s.oh, s.ow, s.kh, s.kw, s.stride[0], s.stride[1], s.padding[0],
                      s.padding[1], s.dilation[0], s.dilation[1], s.groups, s.reflect, s.norm);
  };
  return facts(a) == facts(b);
}

int64_t elements(const int64_t* size) { return size[0] * size[1] * size[2]; }

// to (n, columns, rows) = from (n, rows, columns), in squares that are copied first: their lines, often a power of two
// apart, would drive each other out of the cache.
template <class From, class To>
void transpose(const From* from, int64_t n, int64_t rows, int64_t columns, To* to, const cpu::ParallelFor& parallel) {
  constexpr int64_t side = 16, most = 64 * side;  // columns that one task moves
  const int64_t down = ceil_div(rows, side), beside = ceil_div(columns, most);
  parallel(n * down * beside, [&](int64_t begin, int64_t end) {
    From square[side][side];
    for (int64_t item = begin; item < end; ++item)
      for (int64_t first = item % beside * most, column = first; column < std::min(columns, first + most);
           column += side) {
        const int64_t base = item / beside / down * rows * columns, row = item / beside % down * side;
        const int64_t height = std::min(side, rows - row), width = std::min(side, columns - column);
        const From* const x = from + base + row * columns + column;
        To* const y = to + base + column * rows + row;
        if (height == side && width == side) {
          for (int64_t i = 0; i < side; ++i) memcpy(square[i], x + i * columns, sizeof(square[i]));
          for (int64_t j = 0; j < side; ++j)
            for (int64_t i = 0; i < side; ++i) cpu::store(y + j * rows + i, cpu::load(&square[i][j]));
        } else {
          for (int64_t j = 0; j < width; ++j)
            for (int64_t i = 0; i < height; ++i) cpu::store(y + j * rows + i, cpu::load(x + i * columns + j));
        }
      }
  });
}

void concat(const Step& s, int64_t n, int64_t element, const void* x, const void* y, void* out,
            const cpu::ParallelFor& parallel) {
  const size_t first = static_cast<size_t>(s.ic * element), second = static_cast<size_t>((s.c - s.ic) * element);
  parallel(n * s.oh, [&](int64_t begin, int64_t end) {
    for (int64_t pixel = begin * s.ow; pixel < end * s.ow; ++pixel) {
      char* const to = static_cast<char*>(out) + pixel * (first + second);
      memcpy(to, static_cast<const char*>(x) + pixel * first, first);
      memcpy(to + first, static_cast<const char*>(y) + pixel * second, second);
    }
  });
}

}  // namespace

File File::read(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error("it cannot be opened");
  const auto size = static_cast<int64_t>(file.tellg());
  file.seekg(0);
  char start[sizeof(Header)] = {};
  file.read(start, static_cast<std::streamsize>(std::min<int64_t>(size, sizeof(start))));
  check_header(start, static_cast<size_t>(std::max<int64_t>(size, 0)));
  File whole{cpu::scratch<char>(size), static_cast<size_t>(size)};
  file.seekg(0);
  if (!file.read(whole.bytes.get(), size)) throw std::runtime_error("it cannot be read to its end");
  return whole;
}

Plan::Plan(File file, int threads)
    : file_(std::move(file)),
      steps_(check_file(file_.bytes.get(), file_.size)),
      threads_(threads > 0 ? std::min(threads, thread_count()) : thread_count()) {
  memcpy(&header_, file_.bytes.get(), sizeof(header_));
  values_ = reinterpret_cast<const float*>(file_.bytes.get() + file_.size) - header_.values;
  const bool bfloat16 = header_.bfloat16 && cpu::can_dot_bf16();
  dtype_ = bfloat16 ? DType::bfloat16 : DType::float32;
  element_ = bfloat16 ? 2 : 4;
  for (size_t i = 0; i < 2 * steps_.size(); ++i) convolutions_.push_back(std::make_unique<Convolution>());
  parallel_ = {threads_, [this](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
                 run_parallel(threads_, count, body);
               }};
  find_ends();
  place_values();
}

void Plan::find_ends() {
  std::vector<int64_t> input_of(steps_.size() + 1, 0);  // value -> input
  inputs_ = {End{header_.input_rank, {header_.input[0], header_.input[1], header_.input[2]}}};
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    if (s.kind == Kind::input) {
      input_of[i + 1] = static_cast<int64_t>(inputs_.size());
      inputs_.push_back({s.kh, {s.c, s.oh, s.ow}});
    } else if (s.kind == Kind::output && i + 1 < steps_.size()) {
      outputs_.push_back({s.kh, {s.kh == 1 ? s.c * s.oh * s.ow : s.c, s.oh, s.ow}});
    } else if (s.kind == Kind::embedding) {
      int64_t& rows = inputs_[input_of[s.x]].rows;
      rows = std::min(rows, s.kh);
    }
  }
  outputs_.push_back({header_.output_rank, {header_.output[0], header_.output[1], header_.output[2]}});
}

void Plan::check_labels(int64_t n, const std::vector<const void*>& in) const {
  for (size_t i = 0; i < inputs_.size(); ++i) {
    if (inputs_[i].rank) continue;
    const int64_t* const labels = static_cast<const int64_t*>(in[i]);
    const int64_t* const wrong =
        std::find_if(labels, labels + n, [&](int64_t label) { return label < 0 || label >= inputs_[i].rows; });
    if (wrong == labels + n) continue;
    throw std::out_of_range("inputs[" + std::to_string(i) + "] must be labels from 0 to " +
                            std::to_string(inputs_[i].rows - 1) + ", got " + std::to_string(*wrong) + " for image " +
                            std::to_string(wrong - labels));
  }
}

// Each value has a slot of memory from the step that computes it to the last one that reads it.
void Plan::place_values() {
  const size_t last = steps_.size();
  std::vector<size_t> last_use(last + 1, 0);
  int64_t largest = 1;
  for (size_t i = 0; i < last; ++i) {
    last_use[steps_[i].x] = i;
    if (steps_[i].residual >= 0) last_use[steps_[i].residual] = i;
    largest = std::max(largest, steps_[i].ic * steps_[i].ih * steps_[i].iw + steps_[i].c * steps_[i].oh * steps_[i].ow);
    whole_batch_ |= steps_[i].norm == Norm::batch;
  }
  images_at_once_ = std::max<int64_t>(1, kInFlight / largest);
  std::vector<int64_t> free;
  const auto place = [&](int64_t size) {
    const auto better = [&](int64_t a, int64_t b) {  // the smallest that is large enough, else the largest
      const bool fits_a = slot_sizes_[a] >= size, fits_b = slot_sizes_[b] >= size;
      return fits_a != fits_b ? fits_a : (slot_sizes_[a] < slot_sizes_[b]) == fits_a;
    };
    const auto found = std::min_element(free.begin(), free.end(), better);
    if (found == free.end()) {
      slot_of_.push_back(static_cast<int64_t>(slot_sizes_.size()));
      slot_sizes_.push_back(size);
      return;
    }
    slot_of_.push_back(*found);
    slot_sizes_[*found] = std::max(slot_sizes_[*found], size);
    free.erase(found);
  };
  place(elements(header_.input));
  for (size_t i = 0; i < last; ++i) {
    place(steps_[i].kind == Kind::output ? 0 : steps_[i].c * steps_[i].oh * steps_[i].ow);
    for (size_t value = 0; value <= i; ++value)
      if (last_use[value] == i && (value == 0 || last_use[value] >= value)) free.push_back(slot_of_[value]);
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
  for (size_t slot = 0; slot < slot_sizes_.size(); ++slot) size += slot_bytes(static_cast<int64_t>(slot), images);
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
    for (size_t i = 0; i < in.size(); ++i)
      from[i] = static_cast<const char*>(in[i]) + first * (inputs_[i].rank ? elements(inputs_[i].size) * 4 : 8);
    for (size_t i = 0; i < out.size(); ++i) to[i] += first * elements(outputs_[i].size);
    run_images(std::min(at_once, n - first), from, to, *workspace);
  }
  give_back(std::move(workspace));
}

// From the order (c, pixels) of the caller to (pixels, c), and back.
void Plan::read(const void* in, int64_t n, int64_t c, int64_t pixels, void* to) const {
  if (dtype_ == DType::float32)
    transpose(static_cast<const float*>(in), n, c, pixels, static_cast<float*>(to), parallel_);
  else transpose(static_cast<const float*>(in), n, c, pixels, static_cast<cpu::BFloat16*>(to), parallel_);
}

void Plan::write(const void* from, int64_t n, int64_t c, int64_t pixels, float* out) const {
  if (dtype_ == DType::float32) transpose(static_cast<const float*>(from), n, pixels, c, out, parallel_);
  else transpose(static_cast<const cpu::BFloat16*>(from), n, pixels, c, out, parallel_);
}

void Plan::run_images(int64_t n, const std::vector<const void*>& in, const std::vector<float*>& out,
                      Workspace& workspace, double* took) const {
  const auto run_step = [&](size_t i, const void* x, const void* residual, void* to, bool channels_last) {
    const auto start = took ? Clock::now() : Clock::time_point();
    this->run_step(i, n, x, residual, to, channels_last);
    if (took) took[i] = std::chrono::duration<double>(Clock::now() - start).count();
  };
  std::vector<void*> slots;
  char* next = workspace.memory.get();
  for (size_t slot = 0; slot < slot_sizes_.size(); ++slot) {
    slots.push_back(next);
    next += slot_bytes(static_cast<int64_t>(slot), n);
  }
  const int64_t* size = header_.input;
  const bool float32 = dtype_ == DType::float32,
             as_is = header_.input_rank == 0 || (float32 && (size[0] == 1 || size[1] * size[2] == 1));
  if (!as_is) read(in[0], n, size[0], size[1] * size[2], slots[slot_of_[0]]);
  std::vector<const void*> values{as_is ? in[0] : slots[slot_of_[0]]};
  const auto value = [&](int64_t i) -> const void* { return i < 0 ? nullptr : values[i]; };
  auto given = in.begin() + 1;
  auto wanted = out.begin();
  for (size_t i = 0; i + 1 < steps_.size(); ++i) {
    const Step& s = steps_[i];
    values.push_back(s.kind == Kind::input && s.kh == 0 ? *given
                                                        : slots[slot_of_[i + 1]]);  // labels are read where they lie
    if (s.kind == Kind::output) write(value(s.x), n, s.c, s.oh * s.ow, *wanted++);
    else if (s.kind != Kind::input) run_step(i, value(s.x), value(s.residual), slots[slot_of_[i + 1]], true);
    else if (const void* const from = *given++; s.kh) read(from, n, s.c, s.oh * s.ow, slots[slot_of_[i + 1]]);
  }

  const size_t i = steps_.size() - 1;
  const Step& last = steps_[i];
  if (last.kind == Kind::output) return write(value(last.x), n, last.c, last.oh * last.ow, out.back());
  const bool plain = last.c == 1 || last.oh * last.ow == 1;
  const bool can_transpose =
      is_convolution(last) && last.residual < 0 && (last.norm == Norm::none || last.norm == Norm::affine);
  const bool direct = float32 && (plain || can_transpose);
  void* const to = direct ? out.back() : slots[slot_of_[i + 1]];
  run_step(i, value(last.x), value(last.residual), to, plain || !direct);
  if (!direct) write(to, n, last.c, last.oh * last.ow, out.back());
}

void Plan::run_step(size_t i, int64_t n, const void* x, const void* residual, void* out, bool channels_last) const {
  const Step& s = steps_[i];
  if (s.kind == Kind::concat) return concat(s, n, element_, x, residual, out, parallel_);
  if (s.kind > Kind::concat) return run_other(s, dtype_, n, x, residual, value(s.weight), out, parallel_);
  run_with(is_convolution(s) ? &packed(i, n) : nullptr, s, n, x, residual, out, channels_last);
}

void Plan::run_with(const cpu::PackedConvolution* convolution, const Step& s, int64_t n, const void* x,
                    const void* residual, void* out, bool channels_last) const {
  Epilogue op = describe(s, dtype_, n, channels_last);
  std::vector<float> stats(static_cast<size_t>(op.batch_stats ? 2 * op.rows_of_stats() * op.stats_groups : 0));
  op.bias = value(s.bias);
  op.mean = op.batch_stats ? stats.data() : const_cast<float*>(value(s.mean));
  op.var = op.batch_stats ? stats.data() + stats.size() / 2 : const_cast<float*>(value(s.var));
  op.norm_weight = value(s.norm_weight);
  op.norm_bias = value(s.norm_bias);
  op.residual = residual;
  if (convolution) return convolution->run(op, x, out, parallel_);
  if (op.batch_stats) cpu::norm_act_moments(op, x, op.mean, op.var, parallel_);
  cpu::norm_act_apply(op, x, out, parallel_);
}

cpu::Algorithm Plan::algorithm(size_t i, int64_t n) const {
  const Step& s = steps_[i];
  const int64_t asked = s.algorithm[n >= kFew];
  const bool bfloat16 = dtype_ == DType::bfloat16;
  const auto measured = static_cast<cpu::Algorithm>(asked);
  if (asked >= 0 && runs(measured, s, bfloat16) && !is_turned_off(measured)) return measured;
  for (const auto pairs : {cpu::Algorithm::rows_bf16, cpu::Algorithm::direct_bf16})
    if (runs(pairs, s, bfloat16)) return pairs;
  return cpu::choose(geometry(s), describe(s, dtype_, n >= kFew ? kFew : 1, true));
}

const cpu::PackedConvolution& Plan::packed(size_t i, int64_t n) const {
  Convolution& many = *convolutions_[2 * i + 1];
  Convolution& mine = algorithm(i, n) == algorithm(i, kFew) ? many : *convolutions_[2 * i];
  std::call_once(mine.once, [&] {
    const Step& s = steps_[i];
    mine.packed = cpu::pack_convolution(geometry(s), algorithm(i, n), value(s.weight), parallel_);
  });
  return *mine.packed;
}

std::string Plan::file() const {
  std::string bytes(file_.bytes.get(), file_.size);
  memcpy(bytes.data() + sizeof(Header), steps_.data(), steps_.size() * sizeof(Step));
  seal(bytes);
  return bytes;
}

namespace {
double seconds(int64_t repeats, const std::function<void()>& body) {
  double best = std::numeric_limits<double>::infinity();
  for (int64_t i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    body();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

cpu::Buffer<char> zeros(int64_t bytes) {  // they take as long as other numbers
  auto made = cpu::scratch<char>(bytes);
  std::fill_n(made.get(), bytes, 0);
  return made;
}

// Inputs and outputs of the network.
struct Ends {
  Ends(const Plan& plan, int64_t n) {
    const auto add = [&](const End& end) {
      return buffers.emplace_back(zeros(n * elements(end.size) * (end.rank ? 4 : 8))).get();
    };
    for (const End& end : plan.inputs()) in.push_back(add(end));
    for (const End& end : plan.outputs()) out.push_back(reinterpret_cast<float*>(add(end)));
  }

  std::vector<cpu::Buffer<char>> buffers;
  std::vector<const void*> in;
  std::vector<float*> out;
};
}  // namespace

std::vector<double> Plan::profile(int64_t n, int64_t repeats) const {
  n = whole_batch_ ? n : std::min(n, images_at_once_);
  const Ends ends(*this, n);
  auto workspace = lease(n);
  std::vector<double> least(steps_.size(), std::numeric_limits<double>::infinity());
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    std::vector<double> took(steps_.size());
    run_images(n, ends.in, ends.out, *workspace, took.data());
    for (size_t i = 0; i < took.size(); ++i) least[i] = std::min(least[i], took[i]);
  }
  give_back(std::move(workspace));
  return least;
}

std::vector<Plan::Timed> Plan::time_alone(const Step& s, int64_t n) const {
  const auto x = zeros(n * s.ic * s.ih * s.iw * element_), out = zeros(n * s.c * s.oh * s.ow * element_);
  struct Candidate {
    Timed timed;
    std::unique_ptr<cpu::PackedConvolution> packed;
  };
  std::vector<Candidate> candidates;
  const auto measure = [&](Candidate& candidate) {
    const double took = seconds(1, [&] { run_with(candidate.packed.get(), s, n, x.get(), nullptr, out.get(), true); });
    candidate.timed.seconds = std::min(candidate.timed.seconds, took);
  };
  for (int64_t a = 0; a < cpu::kAlgorithms; ++a) {
    const auto algorithm = static_cast<cpu::Algorithm>(a);
    if (!runs(algorithm, s, dtype_ == DType::bfloat16) || is_turned_off(algorithm)) continue;
    candidates.push_back({{a, std::numeric_limits<double>::infinity()},
                          cpu::pack_convolution(geometry(s), algorithm, value(s.weight), parallel_)});
    measure(candidates.back());
  }
  const auto faster = [](const auto& one, const auto& other) { return one.timed.seconds < other.timed.seconds; };
  const double first = std::min_element(candidates.begin(), candidates.end(), faster)->timed.seconds;
  const int64_t rounds = std::clamp<int64_t>(static_cast<int64_t>(0.02 / first), 5, 40);
  for (int64_t round = 0; round < rounds && candidates.size() > 1; ++round)  // in turns: what disturbs one disturbs all
    for (Candidate& candidate : candidates) measure(candidate);
  std::sort(candidates.begin(), candidates.end(), faster);
  std::vector<Timed> found;
  for (const Candidate& candidate : candidates) found.push_back(candidate.timed);
  return found;
}

void Plan::use(size_t i, int64_t algorithm, int64_t n) {
  const Step like = steps_[i];
  for (size_t k = i; k < steps_.size(); ++k) {
    if (!is_convolution(steps_[k]) || !is_alike(like, steps_[k])) continue;
    steps_[k].algorithm[n >= kFew] = algorithm;
    convolutions_[2 * k] = std::make_unique<Convolution>();
    convolutions_[2 * k + 1] = std::make_unique<Convolution>();
  }
}

std::vector<int64_t> Plan::tune(int64_t n) {
  n = whole_batch_ ? n : std::min(n, images_at_once_);
  std::vector<std::vector<Timed>> alone(steps_.size());  // of the first of steps that are alike
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto same = [&](const Step& other) { return is_alike(steps_[i], other); };
    if (!is_convolution(steps_[i]) || std::any_of(steps_.begin(), steps_.begin() + i, same)) continue;
    alone[i] = time_alone(steps_[i], n);
    use(i, alone[i][0].algorithm, n);
  }

  const Ends ends(*this, n);
  const auto whole = [&](size_t i, int64_t algorithm) {
    use(i, algorithm, n);
    const auto body = [&] { run(n, ends.in, ends.out); };
    body();  // packs
    const double first = seconds(1, body);
    return std::min(first, seconds(std::clamp<int64_t>(static_cast<int64_t>(0.01 / first), 1, 20), body));
  };
  for (size_t i = 0; i < steps_.size(); ++i) {
    const auto from_memory = [&](const Timed& timed) {
      return timed.seconds +
             cpu::packed_bytes(static_cast<cpu::Algorithm>(timed.algorithm), geometry(steps_[i])) / kFetched;
    };
    for (size_t k = 1; k < alone[i].size(); ++k) {
      const int64_t best = steps_[i].algorithm[n >= kFew], other = alone[i][k].algorithm;
      if (from_memory(alone[i][k]) >= from_memory(alone[i][0])) continue;
      double of_best = std::numeric_limits<double>::infinity(), of_other = of_best;
      for (int turn = 0; turn < 3; ++turn) {
        of_best = std::min(of_best, whole(i, best));
        of_other = std::min(of_other, whole(i, other));
      }
      if (of_best <= of_other) use(i, best, n);
    }
  }

  std::vector<int64_t> chosen;
  for (const Step& s : steps_) chosen.push_back(is_convolution(s) ? s.algorithm[n >= kFew] : -1);
  return chosen;
}

}  // namespace fastgen::plan
