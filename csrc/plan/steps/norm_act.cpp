// A norm, a residual and an activation that are not part of a convolution.
#include "cpu/norm_act.h"

#include "plan/epilogue.h"

namespace fastgen::plan {
namespace {

class NormAct final : public Typed<NormAct, EpilogueFields> {
 public:
  void check(const Check& check) const override {
    check(!inputs.empty() && inputs[0].shape == shape, "has an output of another size than its input");
    fields.check(check, *this);
  }

  void run(const Run& run) const override {
    const EpilogueOfRun epilogue(fields, *this, run, nullptr);
    if (fields.has_statistics())
      cpu::norm_act_moments(*epilogue, run.inputs[0], (*epilogue).mean, (*epilogue).var, run.parallel);
    cpu::norm_act_apply(*epilogue, run.inputs[0], run.out, run.parallel);
  }

  bool needs_whole_batch() const override { return fields.norm == Norm::batch; }
};

const Registered registered("norm_act", NormAct::make);

}  // namespace
}  // namespace fastgen::plan
