// A norm, a residual and an activation that no convolution takes in.
#include "cpu/norm_act.h"

#include "plan/epilogue.h"

namespace fastgen::plan {
namespace {

class NormActStep final : public Typed<NormActStep, Epilogue> {
 public:
  void check(const Check& check) const override {
    check(!inputs.empty() && inputs[0].shape == shape, "changes a size that it cannot");
    fields.check(check, *this);
  }

  void run(const Run& run) const override {
    const NormAct op = fields.describe(shape, run.dtype, run.n, true);
    const EpilogueArrays arrays(fields, op, run, inputs.size() > 1 ? run.inputs[1] : nullptr);
    const NormActTensors& given = arrays.tensors;
    if (op.batch_stats)
      cpu::norm_act_moments(op, run.inputs[0], const_cast<void*>(given.mean), const_cast<void*>(given.var),
                            run.parallel);
    cpu::norm_act_apply(op, run.inputs[0], given, run.out, run.parallel);
  }

  bool needs_whole_batch() const override { return fields.norm == Norm::batch; }
};

const Registered registered("norm_act", NormActStep::make);

}  // namespace
}  // namespace fastgen::plan
