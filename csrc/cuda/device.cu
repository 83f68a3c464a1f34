#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace fastgen::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

bool has_code() {
  cudaFuncAttributes attributes;
  const bool has = cudaFuncGetAttributes(&attributes, nothing) == cudaSuccess;
  cudaGetLastError();  // clears the error, or the next launch would report it
  return has;
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace fastgen::cuda
