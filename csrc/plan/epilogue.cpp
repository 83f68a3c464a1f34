#include "plan/epilogue.h"

namespace fastgen::plan {

void Epilogue::check(const Check& check, const Step& step) const {
  const int64_t c = step.shape.c;
  check(step.inputs.size() == 1 || (step.inputs.size() == 2 && step.inputs[1].shape == step.shape),
        "adds what does not fit");
  check(within(static_cast<int64_t>(norm), 0, static_cast<int64_t>(Norm::group)), "has an unknown norm");
  check(within(activation, 0, static_cast<int64_t>(Activation::silu)), "has an unknown activation");
  check(norm != Norm::group || (within(num_groups, 1, c) && c % num_groups == 0),
        "has channels that its groups do not divide");
  check.weight(mean, c, norm == Norm::affine);
  check.weight(var, c, norm == Norm::affine);
  check.weight(weight, c, false);
  check.weight(bias, c, false);
}

NormAct Epilogue::describe(const Shape& shape, DType dtype, int64_t n, bool channels_last) const {
  NormAct op{};
  op.dtype = dtype;
  op.n = n;
  op.c = shape.c;
  op.s = shape.pixels();
  op.channels_last = channels_last;
  op.normalize = norm != Norm::none;
  op.batch_stats = has_statistics();
  op.per_sample = op.batch_stats && norm != Norm::batch;
  op.sets = norm == Norm::group ? num_groups : shape.c;
  op.eps = eps;
  op.activation = static_cast<Activation>(activation);
  op.negative_slope = negative_slope;
  return op;
}

EpilogueArrays::EpilogueArrays(const Epilogue& epilogue, const NormAct& op, const Run& run, const void* residual)
    : statistics(static_cast<size_t>(op.batch_stats ? 2 * (op.per_sample ? op.n * op.sets : op.c) : 0)),
      tensors{op.batch_stats ? statistics.data() : run.weight(epilogue.mean),
              op.batch_stats ? statistics.data() + statistics.size() / 2 : run.weight(epilogue.var),
              run.weight(epilogue.weight), run.weight(epilogue.bias), residual} {}

}  // namespace fastgen::plan
