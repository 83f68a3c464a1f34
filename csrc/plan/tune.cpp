// Choosing the algorithms of a plan's convolutions by measuring them.
#include "plan/clock.h"
#include "plan/plan.h"

namespace fastgen::plan {
namespace {

constexpr double kBandwidth = 1e10;  // bytes per second, at least, at which packed weights are read from memory

// Memory for the inputs and outputs of a network.
struct EndBuffers {
  EndBuffers(const Plan& plan, int64_t n) {
    const auto add = [&](const End& end) {
      const int64_t bytes = n * end.bytes();
      std::fill_n(buffers.emplace_back(cpu::scratch<char>(bytes)).get(), bytes, 0);
      return buffers.back().get();
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
  n = std::min(n, images_at_once());
  const EndBuffers ends(*this, n);
  auto workspace = lease(n);
  std::vector<double> fastest(steps_.size(), std::numeric_limits<double>::infinity());
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    std::vector<double> seconds(steps_.size());
    run_images(n, ends.in, ends.out, *workspace, seconds.data());
    for (size_t i = 0; i < seconds.size(); ++i) fastest[i] = std::min(fastest[i], seconds[i]);
  }
  give_back(std::move(workspace));
  return fastest;
}

std::vector<Convolution*> Plan::convolutions() const {
  std::vector<Convolution*> result;
  for (const auto& step : steps_) result.push_back(dynamic_cast<Convolution*>(step.get()));
  return result;
}

void Plan::use(size_t step, int64_t algorithm, int64_t n) {
  const std::vector<Convolution*> all = convolutions();
  for (Convolution* const convolution : all)
    if (convolution && all[step]->is_alike(*convolution)) convolution->use(algorithm, n);
}

std::vector<int64_t> Plan::tune(int64_t n, bool split) {
  n = std::min(n, images_at_once());
  const std::vector<Convolution*> all = convolutions();
  std::vector<std::vector<Convolution::Timed>> alone(all.size());  // for the first of the convolutions that are alike
  for (size_t i = 0; i < all.size(); ++i) {
    const auto is_same = [&](const Convolution* other) { return other && all[i]->is_alike(*other); };
    if (!all[i] || std::any_of(all.begin(), all.begin() + i, is_same)) continue;
    alone[i] = all[i]->time_algorithms(n, dtype_, weights_, parallel_, split);
    use(i, alone[i][0].algorithm, n);
  }

  const EndBuffers ends(*this, n);
  const auto time_whole = [&](size_t i, int64_t algorithm) {
    use(i, algorithm, n);
    const auto body = [&] { run(n, ends.in, ends.out); };
    body();  // packs
    const double first = least_seconds(1, body);
    return std::min(first, least_seconds(std::clamp<int64_t>(static_cast<int64_t>(0.01 / first), 1, 20), body));
  };
  for (size_t i = 0; i < all.size(); ++i) {
    const auto from_memory = [&](const Convolution::Timed& timed) {
      return timed.seconds + static_cast<double>(all[i]->packed_bytes(timed.algorithm)) / kBandwidth;
    };
    for (size_t k = 1; k < alone[i].size(); ++k) {
      const int64_t best = all[i]->algorithm_for(n), other = alone[i][k].algorithm;
      if (from_memory(alone[i][k]) >= from_memory(alone[i][0])) continue;
      double best_seconds = std::numeric_limits<double>::infinity(), other_seconds = best_seconds;
      for (int round = 0; round < 3; ++round) {
        best_seconds = std::min(best_seconds, time_whole(i, best));
        other_seconds = std::min(other_seconds, time_whole(i, other));
      }
      if (best_seconds <= other_seconds) use(i, best, n);
    }
  }

  std::vector<int64_t> chosen;
  for (const Convolution* const convolution : all) chosen.push_back(convolution ? convolution->algorithm_for(n) : -1);
  return chosen;
}

}  // namespace fastgen::plan
