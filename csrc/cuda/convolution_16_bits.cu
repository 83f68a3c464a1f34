#include "cuda/convolution.cuh"

namespace fastgen::cuda::convolution {

FASTGEN_CONVOLUTION(BFloat16)
FASTGEN_CONVOLUTION(Float16)

}  // namespace fastgen::cuda::convolution
