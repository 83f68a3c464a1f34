// Dispatcher registrations of the native kernels, on the libtorch stable ABI. Schemas, fake kernels and gradients:
// fastgen/ops.
//
// The C++ kernels become fastgen::<op> for the CPU. Compiled with FASTGEN_CUDA, the same file registers the CUDA
// kernels as fastgen_cuda::<op> for the dispatch key that it names; fastgen/ops/_dispatch.py chooses between them and
// Triton's.
#if !defined(FASTGEN_CUDA)
#include "ops/allocator.h"
#endif
#include "ops/convolution.h"
#include "ops/norm_act.h"
#include "ops/reparameterize.h"
#include "ops/spectral_norm.h"

namespace fastgen {

#if defined(FASTGEN_CUDA)
STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, CompositeExplicitAutograd, m) {
  m.impl("allow_tf32", TORCH_BOX(&allow_tf32));
  m.impl("has_code", TORCH_BOX(&has_code));
}

STABLE_TORCH_LIBRARY_IMPL(fastgen_cuda, FASTGEN_CUDA, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fastgen, CompositeExplicitAutograd, m) {
  m.impl("algorithm", TORCH_BOX(&algorithm));
  m.impl("multiplies_bf16", TORCH_BOX(&cpu::can_dot_bf16));
  m.impl("amx", TORCH_BOX(&amx));
  m.impl("keep_freed_memory", TORCH_BOX(&keep_freed_memory));
}

STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {
  m.impl("convolution_weight_grad", TORCH_BOX(&convolution_weight_grad));
#endif
  m.impl("norm_act", TORCH_BOX(&norm_act));
  m.impl("norm_act_backward", TORCH_BOX(&norm_act_backward));
  m.impl("conv2d_norm_act", TORCH_BOX(&conv2d_norm_act));
  m.impl("conv_transpose2d_norm_act", TORCH_BOX(&conv_transpose2d_norm_act));
  m.impl("philox_normal", TORCH_BOX(&philox_normal));
  m.impl("reparameterize", TORCH_BOX(&reparameterize));
  m.impl("reparameterize_backward", TORCH_BOX(&reparameterize_backward));
  m.impl("spectral_norm", TORCH_BOX(&spectral_norm));
  m.impl("spectral_norm_backward", TORCH_BOX(&spectral_norm_backward));
}

}  // namespace fastgen
