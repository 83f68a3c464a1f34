"""Where the native code comes from: three libraries, each of one list of sources and flags, made in one of two ways.

| module | library | ahead of time, by setup.py |
|---|---|---|
| `native` | the C++ kernels, torch.ops.fastgen | `fastgen/_native_<digest>.abi3.so` |
| `cuda` | the CUDA kernels, torch.ops.fastgen_cuda | `fastgen/_cuda_<digest>.abi3.so` where there is a CUDA toolkit |
| `runtime` | the inference plan, which links no torch | `fastgen/_runtime_<digest>.*.so` |

Where that is missing or was made from other sources, `load()` builds the same list just in time into a folder of
`cache`, with `toolchain`. torch is imported when something is loaded, not before; nor shutil and subprocess: a plan
that starts needs neither.
"""
