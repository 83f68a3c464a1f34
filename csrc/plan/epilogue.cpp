#include "plan/epilogue.h"

namespace fastgen::plan {

void EpilogueFields::check(const Check& check, const Step& step) const {
  const int64_t c = step.shape.c;
  check(step.inputs.size() == 1 || (step.inputs.size() == 2 && step.inputs[1].shape == step.shape),
        "has a residual of another size than its output");
  check(within(static_cast<int64_t>(norm), 0, static_cast<int64_t>(Norm::group)), "has an unknown norm");
  check(within(activation, 0, kActivations - 1), "has an unknown activation");
  check(norm != Norm::group || (within(num_groups, 1, c) && c % num_groups == 0),
        "has channels that its groups do not divide");
  check.weight(mean, c, norm == Norm::affine);
  check.weight(var, c, norm == Norm::affine);
  check.weight(weight, c, false);
  check.weight(bias, c, false);
}

Epilogue EpilogueFields::describe(const Shape& shape, DType dtype, int64_t n, bool channels_last) const {
  Epilogue op{};
  op.dtype = dtype;
  op.n = n;
  op.c = shape.c;
  op.s = shape.pixels();
  op.channels_last = channels_last;
  op.normalize = norm != Norm::none;
  op.batch_stats = has_statistics();
  op.per_sample = op.batch_stats && norm != Norm::batch;
  op.stats_groups = norm == Norm::group ? num_groups : shape.c;
  op.eps = eps;
  op.activation = static_cast<Activation>(activation);
  op.negative_slope = negative_slope;
  return op;
}

EpilogueOfRun::EpilogueOfRun(const EpilogueFields& fields, const Step& step, const Run& run, const float* bias)
    : epilogue_(fields.describe(step.shape, run.dtype, run.n, run.channels_last)) {
  Epilogue& op = epilogue_;
  op.bias = bias;
  if (op.batch_stats) {
    const auto count = static_cast<size_t>(op.per_sample ? op.n * op.stats_groups : op.c);
    statistics_.resize(2 * count);
    op.mean = statistics_.data();
    op.var = statistics_.data() + count;
  } else {  // read only
    op.mean = const_cast<float*>(run.weight(fields.mean));
    op.var = const_cast<float*>(run.weight(fields.var));
  }
  op.norm_weight = run.weight(fields.weight);
  op.norm_bias = run.weight(fields.bias);
  op.residual = step.inputs.size() > 1 ? run.inputs[1] : nullptr;
}

}  // namespace fastgen::plan
