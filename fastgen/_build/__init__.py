"""The native code: three libraries, each with one list of sources and flags, built in one of two ways.

| module | library | ahead of time, by setup.py |
|---|---|---|
| `native` | the C++ kernels, torch.ops.fastgen | `fastgen/_native_<digest>.abi3.so` |
| `cuda` | the CUDA kernels, torch.ops.fastgen_cuda | `fastgen/_cuda_<digest>.abi3.so` where there is a CUDA toolkit |
| `runtime` | the inference plan, which links no torch | `fastgen/_runtime_<digest>.*.so` |

If that file is missing or was built from other sources, `load()` builds the same list just in time into a folder of
`cache`, with `toolchain`. torch is imported only when something is loaded, and shutil and subprocess only for a build,
since a plan needs none of them to start.
"""
