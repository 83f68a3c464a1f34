"""A model on a GPU as CUDA graphs: one per batch size."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgen.inference._fuse import fuse
from fastgen.inference._record import tensors
from fastgen.ops import use_impl

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_GRAPHS = 16  # the number of graphs to keep; each has its own buffers
# PyTorch's precision switches are global to the process: only one thread at a time may change and restore them.
_switch_lock = threading.RLock()


class Recorded(NamedTuple):
    """A recorded call: replay() repeats it with the contents of `input` and writes `result`."""

    input: Tensor
    result: Any
    replay: Callable[[], None]


Recorder: TypeAlias = Callable[[Callable[[Tensor], Any], Tensor], Recorded]


def record(call: Callable[[Tensor], Any], x: Tensor) -> Recorded:
    """call(x) as a CUDA graph on x's device."""
    with torch.cuda.device(x.device):
        input, graph, stream = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # warm up: kernels are compiled, libraries allocate their work space
            for _ in range(3):
                call(input)
        torch.cuda.current_stream().wait_stream(stream)
        # Without stream=, PyTorch would use a stream on the GPU of the process's first graph. "thread_local" lets other
        # threads use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = call(input)
    return Recorded(input, result, graph.replay)


class Graphs:
    """A module prepared for inference on its GPU: fused, with its weights in channels_last and without
    parametrizations. Each batch size is recorded once, then replayed with no Python between the layers.

    Several threads may call it, on any streams: their calls take turns on the GPU.
    """

    def __init__(self, module: nn.Module, precision: str, impl: str, record: Recorder = record) -> None:
        self._dtype, self._precision, self._impl, self._record = DTYPES[precision], precision, impl, record
        self._module = _prepare(module, self._dtype)
        self._recorded: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()
        self._lock = threading.Lock()
        self._finished: torch.cuda.Event | None = None  # when the last call no longer uses the buffers

    def __call__(self, x: Tensor) -> Any:
        """The module's output for a float32 x: a new float32 tensor, or a tuple of them if the module returns
        several."""
        # Buffers created in inference mode could not be written outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._finished is not None:
                torch.cuda.current_stream(x.device).wait_event(self._finished)
            key = tuple(x.shape)
            if key not in self._recorded:
                while len(self._recorded) >= MAX_GRAPHS:
                    self._recorded.popitem(last=False)
                without_autocast = torch.autocast(x.device.type, enabled=False)  # the precision is the engine's
                with multiplying(self._precision), use_impl(self._impl), without_autocast:
                    self._recorded[key] = self._record(self._call, x)
            self._recorded.move_to_end(key)
            recorded = self._recorded[key]
            recorded.input.copy_(x)
            recorded.replay()
            outputs = tuple(t.to(torch.float32, copy=True) for t in tensors(recorded.result))
            if x.is_cuda:
                self._finished = torch.cuda.current_stream(x.device).record_event()
            return outputs if len(outputs) > 1 else outputs[0]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and unpickled objects record again."""
        return {**vars(self), "_recorded": OrderedDict(), "_lock": None, "_finished": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _call(self, x: Tensor) -> Any:
        x = x.to(self._dtype)
        return self._module(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)


def _prepare(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    module = module.eval().requires_grad_(False)
    for part in module.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type,union-attr]
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    module = fuse(module, inplace=True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.modules():
        # A batch norm's parameters and statistics stay float32, as PyTorch's batch norm and fastgen's ops take them.
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for value in (*part._parameters.values(), *part._buffers.values()):
                if value is not None and value.is_floating_point():
                    value.data = value.data.to(dtype)
    return module


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """A context in which PyTorch's and fastgen's kernels use TF32 on a GPU if the precision is "tf32", and do not
    otherwise."""
    cudnn, matmul, mkldnn = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn
    # cudnn.rnn too: PyTorch raises an error where it reads both switches and they differ.
    on_gpu: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, matmul)  # type: ignore[attr-defined]
    on_cpu: tuple[Any, ...] = (mkldnn.conv, mkldnn.matmul)  # type: ignore[attr-defined]
    with _switch_lock:
        before = [(switch, switch.fp32_precision) for switch in (*on_gpu, *on_cpu)]
        for switch, _ in before:
            switch.fp32_precision = "tf32" if precision == "tf32" and switch in on_gpu else "ieee"
        try:
            yield
        finally:
            for switch, value in before:
                switch.fp32_precision = value
