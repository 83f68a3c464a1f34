// A step of a plan: the base class of all kinds, the arguments of their check and run, and the registry of kinds. A
// kind is one class in csrc/plan/steps, which holds its fields, its check and its computation.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "cpu/kernel.h"
#include "plan/format.h"

namespace fastgen::plan {

inline bool within(int64_t value, int64_t min, int64_t max) { return min <= value && value <= max; }

enum class ValueType { image, labels, nothing };  // labels are int64 (n)

// The argument of Step::check. A failed check throws std::runtime_error with the step's name.
class Check {
 public:
  Check(int64_t step, const std::string& kind, const Header& header)
      : name_("step " + std::to_string(step) + " of the plan (" + kind + ") "), header_(header) {}

  void operator()(bool holds, const std::string& what) const {
    if (!holds) throw std::runtime_error(name_ + what);
  }
  void flag(int64_t value) const { (*this)(within(value, 0, 1), "has a flag that is neither 0 nor 1"); }
  void weight(const Weight& weight, int64_t count, bool needed) const;
  bool is_bfloat16() const { return header_.precision == Precision::bfloat16; }

 private:
  std::string name_;
  const Header& header_;
};

// The argument of Step::run: `n` images of each value that the step reads, float or bfloat16 in the order (n, h, w, c).
struct Run {
  int64_t n;
  DType dtype;
  const char* weights;  // those of the file
  const void* const* inputs;
  void* out;
  bool channels_last;  // false: `out` is in the order (n, c, h, w), if Step::can_write_channels_first
  const cpu::ParallelFor& parallel;

  template <class T>
  const T* input(size_t i) const {
    return static_cast<const T*>(inputs[i]);
  }
  template <class T>
  T* output() const {
    return static_cast<T*>(out);
  }
  const float* weight(const Weight& weight) const {
    return weight.offset < 0 ? nullptr : reinterpret_cast<const float*>(weights + weight.offset);
  }
};

class Step {
 public:
  virtual ~Step() = default;

  std::vector<Read> inputs;
  Shape shape;         // of the value that it computes
  size_t fields_at{};  // the position of its fields in the file

  // Throws unless the step stays within its memory whatever its inputs hold. Already checked: the sizes of `inputs` and
  // `shape`, and that the values exist with these numbers of elements.
  virtual void check(const Check& check) const = 0;
  virtual void run(const Run& run) const = 0;

  virtual ValueType reads() const { return ValueType::image; }
  virtual ValueType computes() const { return ValueType::image; }
  virtual bool needs_whole_batch() const { return false; }  // it computes statistics of all images
  virtual bool can_write_channels_first() const { return false; }
  virtual int64_t label_count() const { return std::numeric_limits<int64_t>::max(); }  // labels must be below

  virtual size_t fields_size() const = 0;
  virtual void read_fields(const char* from) = 0;
  virtual void write_fields(char* to) const = 0;
};

struct NoFields {};

// A step of the kind `Kind` with the fields that its record in the file holds: int64_t, double and Weight.
template <class Kind, class Fields>
class Typed : public Step {
  static_assert(std::is_trivially_copyable_v<Fields> && (std::is_empty_v<Fields> || sizeof(Fields) % 8 == 0));

 public:
  Fields fields{};

  static std::unique_ptr<Step> make() { return std::make_unique<Kind>(); }
  size_t fields_size() const override { return std::is_empty_v<Fields> ? 0 : sizeof(Fields); }
  void read_fields(const char* from) override { memcpy(static_cast<void*>(&fields), from, fields_size()); }
  void write_fields(char* to) const override { memcpy(to, &fields, fields_size()); }
};

// The same for a kind that computes values of type T in Kind::compute<T>(run).
template <class Kind, class Fields>
class Computed : public Typed<Kind, Fields> {
 public:
  void run(const Run& run) const override {
    if (run.dtype == DType::bfloat16) static_cast<const Kind*>(this)->template compute<cpu::BFloat16>(run);
    else static_cast<const Kind*>(this)->template compute<float>(run);
  }
};

using MakeStep = std::unique_ptr<Step> (*)();

// A variable of this type registers a kind under its name in files.
struct Registered {
  Registered(const char* name, MakeStep make);
};

// A step of the kind of this name, without its inputs, shape and fields; null if there is no such kind.
std::unique_ptr<Step> make_step(const std::string& kind);

}  // namespace fastgen::plan

// Registers a class that cpu/isa.h compiles once per instruction set; must be inside #ifdef FASTGEN_ONCE.
#define FASTGEN_REGISTER_STEP(name, Class)                                             \
  [[maybe_unused]] const Registered name##_step(#name, []() -> std::unique_ptr<Step> { \
    using cpu::Isa;                                                                    \
    using cpu::isa;                                                                    \
    FASTGEN_DISPATCH(Class::make, )                                                    \
  });
