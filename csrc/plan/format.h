// The bytes of a plan file, as docs/plan-format.md describes them and fastgen/runtime/_file.py writes them: a Header,
// the records of the steps, the weights. All numbers are little-endian. The fields of each kind of step are in
// csrc/plan/steps.
#pragma once

#include <cstdint>

namespace fastgen::plan {

constexpr char kMagic[8] = {'f', 'g', 'p', 'l', 'a', 'n', '\r', '\n'};
constexpr uint32_t kVersion = 2;

// Of a plan: the type of the values between its steps. Of a weight: the type that it is stored in.
enum class Precision : int64_t { float32, bfloat16, float16, int8, float8_e4m3 };
constexpr int64_t kPrecisions = 5;

inline const char* name(Precision precision) {
  constexpr const char* names[kPrecisions] = {"float32", "bfloat16", "float16", "int8", "float8_e4m3"};
  return names[static_cast<int64_t>(precision)];
}

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t checksum;  // CRC-32 of all bytes after it
  int64_t size;       // of the file in bytes
  int64_t steps;
  int64_t records, weights;  // bytes of each part
  Precision precision;       // bfloat16: float32 on processors without bfloat16 products
  double error;              // relative L2 error that was measured when the plan was made; NaN: none was
};

// An image in memory, in the order (h, w, c).
struct Shape {
  int64_t c, h, w;

  int64_t pixels() const { return h * w; }
  int64_t elements() const { return c * h * w; }
  bool operator==(const Shape& other) const { return c == other.c && h == other.h && w == other.w; }
};

// A value that a step reads, as an image of `shape`, which may differ from the value's own shape but has as many
// elements. Step i computes value i.
struct Read {
  int64_t value;
  Shape shape;
};

// The beginning of a step's record; its `inputs` Reads and the fields of its kind follow.
struct Record {
  char kind[24];  // its name, then zeros
  int64_t size;   // of the whole record in bytes
  int64_t inputs;
  Shape shape;  // of the value that it computes
};

// An array among the weights.
struct Weight {
  int64_t offset;  // in bytes from the first weight; -1: there is none
  Precision type;
  int64_t scales;  // offset of the factors of the stored numbers; -1: there are none
};

}  // namespace fastgen::plan
