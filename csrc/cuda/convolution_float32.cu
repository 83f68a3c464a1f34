#include "cuda/convolution.cuh"

namespace fastgen::cuda::convolution {

FASTGEN_CONVOLUTION(float)

}  // namespace fastgen::cuda::convolution
