#include "plan/steps/ends.h"

namespace fastgen::plan {
namespace {

// to (n, columns, rows) = from (n, rows, columns), in squares that are copied to the stack first: their lines, often a
// power of two apart, would evict each other from the cache.
template <class From, class To>
void transpose(const From* from, int64_t n, int64_t rows, int64_t columns, To* to, const cpu::ParallelFor& parallel) {
  constexpr int64_t side = 16, task_columns = 64 * side;  // columns per task
  const int64_t square_rows = ceil_div(rows, side), tasks_per_row = ceil_div(columns, task_columns);
  parallel(n * square_rows * tasks_per_row, [&](int64_t begin, int64_t end) {
    From square[side][side];
    for (int64_t item = begin; item < end; ++item)
      for (int64_t first = item % tasks_per_row * task_columns, column = first;
           column < std::min(columns, first + task_columns); column += side) {
        const int64_t base = item / tasks_per_row / square_rows * rows * columns,
                      row = item / tasks_per_row % square_rows * side;
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

bool has_rank(int64_t rank, const Shape& shape) {
  return rank == 3 || (rank == 1 && shape.pixels() == 1) || (rank == 0 && shape.elements() == 1);
}

const Registered input("input", Input::make), output("output", Output::make);

}  // namespace

void Input::check(const Check& check) const {
  check(inputs.empty() && has_rank(fields.rank, shape), "is not a valid input");
}

template <class T>
void Input::compute(const Run& run) const {
  transpose(run.input<float>(0), run.n, shape.c, shape.pixels(), run.output<T>(), run.parallel);
}

void Output::check(const Check& check) const {
  check(inputs.size() == 1 && inputs[0].shape == shape && (fields.rank == 1 || has_rank(fields.rank, shape)),
        "is not a valid output");
}

template <class T>
void Output::compute(const Run& run) const {
  transpose(run.input<T>(0), run.n, shape.pixels(), shape.c, run.output<float>(), run.parallel);
}

}  // namespace fastgen::plan
