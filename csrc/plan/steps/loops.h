// Loops over an image that threads share. Included after cpu/isa.h, once per instruction set.

namespace fastgen::plan::FASTGEN_ISA {

constexpr int64_t kBlock = 64;  // channels that one thread sums at a time

// body(image, output row, first channel, channels)
template <class Body>
void over_blocks(const Shape& shape, const Run& run, const Body& body) {
  const int64_t blocks = ceil_div(shape.c, kBlock);
  run.parallel(run.n * shape.h * blocks, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / blocks, first = item % blocks * kBlock;
      body(row / shape.h, row % shape.h, first, std::min(kBlock, shape.c - first));
    }
  });
}

// body(image, output row)
template <class Body>
void over_rows(const Shape& shape, const Run& run, const Body& body) {
  run.parallel(run.n * shape.h, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row / shape.h, row % shape.h);
  });
}

}  // namespace fastgen::plan::FASTGEN_ISA
