#include "plan/step.h"

namespace fastgen::plan {
namespace {

std::map<std::string, MakeStep>& kinds() {
  static std::map<std::string, MakeStep> all;
  return all;
}

}  // namespace

Registered::Registered(const char* name, MakeStep make) { kinds().emplace(name, make); }

std::unique_ptr<Step> make_step(const std::string& kind) {
  const auto entry = kinds().find(kind);
  return entry == kinds().end() ? nullptr : entry->second();
}

void Check::weight(const Weight& weight, int64_t count, bool needed) const {
  (*this)(weight.offset >= 0 || !needed, "lacks its weights");
  (*this)(within(static_cast<int64_t>(weight.type), 0, kPrecisions - 1), "has weights of an unknown type");
  (*this)(weight.type == Precision::float32,
          std::string("has weights of ") + name(weight.type) + ", and this version of fastgen reads float32");
  (*this)(weight.scales == -1, "has weights with scales, which this version of fastgen does not read");
  if (weight.offset == -1) return;
  (*this)(weight.offset >= 0 && weight.offset % static_cast<int64_t>(sizeof(float)) == 0 &&
              count <= header_.weights / 4 && weight.offset <= header_.weights - 4 * count,
          "has weights beyond the file's end");
}

}  // namespace fastgen::plan
