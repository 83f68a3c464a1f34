#include "cuda/convolution.cuh"

namespace fastgen::cuda {

namespace convolution {
FASTGEN_CONVOLVE(BFloat16)
FASTGEN_CONVOLVE(Float16)
}  // namespace convolution

}  // namespace fastgen::cuda
