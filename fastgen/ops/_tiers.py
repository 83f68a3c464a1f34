"""The tiers (reference, cpp, cuda, triton): where each can run, and why it cannot run elsewhere."""

from __future__ import annotations

import functools
import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from fastgen import __version__
from fastgen._build import cuda, native
from fastgen._build.native import CUDA_ON_CPU, INTERPRETED
from fastgen.errors import FastgenError

OLDEST_GPU = (8, 0)  # compute capability
_KERNELS: dict[str, tuple[str, ...]] = {}  # op -> the tiers that have a kernel for it
_defining = threading.Lock()  # held by a thread that defines an op of fastgen_cuda: no op can be defined twice


def register(op: str, *tiers: str) -> None:
    """Declares which tiers implement an op."""
    _KERNELS[op] = tiers


def ops() -> dict[str, tuple[str, ...]]:
    """op -> the tiers that implement it."""
    return _KERNELS


class Tier:
    """The reference tier (plain PyTorch), and the base class of the others. A tier tells what keeps it from running for
    a device ("cpu", "cuda:0") and a dtype."""

    name = "reference"

    def why_absent(self, device: str, dtype: torch.dtype | None) -> str | None:
        """The reason it cannot run, or None; builds nothing."""
        return None

    def why_not(self, device: str, dtype: torch.dtype | None) -> str | None:
        """The same, after building or loading what it needs."""
        return self.why_absent(device, dtype)

    def obstacle(self) -> str | None:
        """What keeps it from running at all on this machine, as far as can be told without building anything."""
        return None


class Cpp(Tier):
    name = "cpp"

    def why_absent(self, device: str, dtype: torch.dtype | None) -> str | None:
        return None if device == "cpu" else f"cpp kernels run on the CPU, but the input is on {device}"

    def why_not(self, device: str, dtype: torch.dtype | None) -> str | None:
        return self.why_absent(device, dtype) or native.load()

    def obstacle(self) -> str | None:
        status = native.status()
        return None if status.path else status.reason


class GPUTier(Tier):
    """A tier for GPUs. on_cpu: this process runs its kernels on the CPU instead of the C++ kernels."""

    on_cpu = False

    def why_absent(self, device: str, dtype: torch.dtype | None) -> str | None:
        if dtype == torch.float64:
            return f"{self.name} kernels compute float32, bfloat16 and float16, not float64"
        if self.on_cpu:
            if device == "cpu":
                return None
            return f"{self.name} kernels run on the CPU in this process, but the input is on {device}"
        if not device.startswith("cuda"):
            hint = " (TRITON_INTERPRET=1 runs them on the CPU, slowly)" if self.name == "triton" else ""
            return f"{self.name} kernels run on a GPU, but the input is on {device}{hint}"
        if not torch.backends.cuda.is_built():
            return "this PyTorch is built without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device or driver: see nvidia-smi"
        if torch.version.hip is not None:
            return "the kernels are written for NVIDIA GPUs"
        if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
            chip = "{}.{}".format(*capability)
            return f"{device} has compute capability {chip}, but the kernels need 8.0 (Ampere) or newer"
        return None

    def obstacle(self) -> str | None:
        return self.why_absent("cpu" if self.on_cpu else "cuda", None)


class Triton(GPUTier):
    name, on_cpu = "triton", INTERPRETED

    def why_absent(self, device: str, dtype: torch.dtype | None) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: pip install triton"
        return super().why_absent(device, dtype)

    def why_not(self, device: str, dtype: torch.dtype | None) -> str | None:
        if reason := self.why_absent(device, dtype):
            return reason
        return self._why_no_driver() if device.startswith("cuda") else None

    def _why_no_driver(self) -> str | None:
        """Why Triton cannot use the GPU's driver: at its first use on a machine it compiles a C file for that."""
        try:
            from triton.runtime import driver

            driver.active.get_current_target()
        except Exception as error:  # no compiler, no Python.h, a library or a driver that does not fit
            return f"triton cannot use the GPU's driver: {' '.join(str(error).split())}"
        return None

    def kernels(self, name: str) -> ModuleType:
        """A module of fastgen.kernels, taken from the repository's folder if fastgen runs from a checkout that is not
        installed."""
        if "fastgen.kernels" not in sys.modules and importlib.util.find_spec("fastgen.kernels") is None:
            folder = Path(__file__).parents[2] / "kernels"
            spec = importlib.util.spec_from_file_location(
                "fastgen.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
            )
            if spec is None or spec.loader is None:
                raise FastgenError("fastgen.kernels is not installed: install fastgen again")
            module = sys.modules["fastgen.kernels"] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return importlib.import_module(f"fastgen.kernels.{name}")


# Ops that only the CUDA library has.
_SCHEMAS = {"allow_tf32": "(bool allowed) -> ()", "has_code": "(int device) -> bool"}


@functools.cache
def _cuda_op(op: str) -> Callable:
    schema = _SCHEMAS.get(op) or str(getattr(torch.ops.fastgen, op).default._schema)
    torch.library.define(f"fastgen_cuda::{op}", schema[schema.index("(") :])
    return getattr(torch.ops.fastgen_cuda, op).default


class Cuda(GPUTier):
    name, on_cpu = "cuda", bool(CUDA_ON_CPU)

    def why_not(self, device: str, dtype: torch.dtype | None) -> str | None:
        if reason := self.why_absent(device, dtype) or cuda.load():
            return reason
        return self._why_no_code(device) if device.startswith("cuda") else None

    def obstacle(self) -> str | None:
        status = cuda.status()
        return super().obstacle() or (None if self.on_cpu or status.path else status.reason)

    def _why_no_code(self, device: str) -> str | None:
        """Why the CUDA kernels, which may have been built on another machine, cannot run on this GPU."""
        index = torch.device(device).index
        with _defining:
            has_code = _cuda_op("has_code")
        if has_code(torch.cuda.current_device() if index is None else index):
            return None
        chip = "{}.{}".format(*torch.cuda.get_device_capability(device))
        return (
            f"the CUDA kernels were not built for {device}, whose compute capability is {chip}: "
            f"build them with TORCH_CUDA_ARCH_LIST={chip}, or without that variable on this machine"
        )

    def kernel(self, op: str) -> Callable:
        """fastgen_cuda::<op>, which has the schema of fastgen::<op>. It uses TF32 where PyTorch's convolutions do."""
        with _defining:
            allow_tf32, kernel = _cuda_op("allow_tf32"), _cuda_op(op)
        allow_tf32(float32_is_tf32())
        return kernel


def float32_is_tf32() -> bool:
    """Whether PyTorch lets convolutions on a GPU round float32 to TF32."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]


triton, nvcc = Triton(), Cuda()
TIERS: dict[str, Tier] = {tier.name: tier for tier in (Tier(), Cpp(), nvcc, triton)}
GPU_TIERS = ("triton", "cuda")  # in auto's order where nothing was measured
# Whether this process runs a GPU tier's kernels on the CPU instead of the C++ kernels.
ON_CPU = triton.on_cpu or nvcc.on_cpu


def why_not(op: str, tier: str, device: str, dtype: torch.dtype | None = None) -> str | None:
    """Why a tier cannot run an op on a device and a dtype; None if it can."""
    if tier not in _KERNELS[op]:
        return f"fastgen {__version__} has no {tier} kernel for it"
    return unavailable(tier, device, dtype)


def unavailable(tier: str, device: str, dtype: torch.dtype | None) -> str | None:
    """Why a tier cannot run any op on a device and a dtype, after building what it needs; None if it can."""
    return _gpu_unavailable(tier, device, dtype) if tier in GPU_TIERS else TIERS[tier].why_not(device, dtype)


@functools.cache
def _gpu_unavailable(tier: str, device: str, dtype: torch.dtype | None) -> str | None:
    return TIERS[tier].why_not(device, dtype)
