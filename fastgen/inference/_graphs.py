"""A model on a GPU as CUDA graphs: what Engine is there."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastgen.inference._record import tensors
from fastgen.inference.fuse import fuse
from fastgen.ops import use_impl

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST = 16  # numbers of images whose graphs are kept
_switching = threading.RLock()  # PyTorch's switches are the process's: what a thread puts back is what it found


class Recorded(NamedTuple):
    """A call that was recorded: it reads `given`, replay() computes it anew, and it leaves its result in `result`."""

    given: Tensor
    result: Any
    replay: Callable[[], None]


def record(call: Callable[[Tensor], Any], x: Tensor) -> Recorded:
    """call(x) as a CUDA graph on x's device."""
    with torch.cuda.device(x.device):
        given, graph, stream = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled, libraries allocate their work space
            for _ in range(3):
                call(given)
        torch.cuda.current_stream().wait_stream(stream)
        # PyTorch's own stream for it lies on the GPU of the process's first graph. What other threads do is their
        # affair.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = call(given)
    return Recorded(given, result, graph.replay)


class Graphs:
    """A module made for inference on its GPU: fused, weights in channels_last and without parametrizations; recorded
    once for each number of images, then replayed with no Python between its layers.

    Several threads may call it, on any streams: their calls take turns on the GPU.
    """

    def __init__(
        self,
        module: nn.Module,
        precision: str,
        impl: str,
        record: Callable[[Callable[[Tensor], Any], Tensor], Recorded] = record,
    ) -> None:
        self._dtype, self._precision, self._impl, self._record = DTYPES[precision], precision, impl, record
        self._module = _prepared(module, self._dtype)
        self._recorded: OrderedDict[tuple[int, ...], Recorded] = OrderedDict()
        self._lock = threading.Lock()
        self._idle: torch.cuda.Event | None = None  # when the last call has left the buffers

    def __call__(self, x: Tensor) -> Any:
        """The module's output for a float32 x: a new float32 tensor, or a tuple of such where the module returns
        several."""
        # Buffers that inference_mode made could not be written outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._idle is not None:
                torch.cuda.current_stream(x.device).wait_event(self._idle)
            key = tuple(x.shape)
            if key not in self._recorded:
                while len(self._recorded) >= MOST:
                    self._recorded.popitem(last=False)
                exact = torch.autocast(x.device.type, enabled=False)  # the caller's is no precision of this engine's
                with multiplying(self._precision), use_impl(self._impl), exact:
                    self._recorded[key] = self._record(self._call, x)
            self._recorded.move_to_end(key)
            recorded = self._recorded[key]
            recorded.given.copy_(x)
            recorded.replay()
            out = tuple(t.to(torch.float32, copy=True) for t in tensors(recorded.result))
            if x.is_cuda:
                self._idle = torch.cuda.current_stream(x.device).record_event()
            return out if len(out) > 1 else out[0]

    def __getstate__(self) -> dict[str, Any]:
        """A copy, also a pickled one, records anew."""
        return {**vars(self), "_recorded": OrderedDict(), "_lock": None, "_idle": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def _call(self, x: Tensor) -> Any:
        x = x.to(self._dtype)
        return self._module(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)


def _prepared(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    module = module.eval().requires_grad_(False)
    for part in module.modules():
        if parametrize.is_parametrized(part):
            for name in list(part.parametrizations):  # type: ignore[arg-type,union-attr]
                parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    module = fuse(module, inplace=True).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for part in module.modules():
        # A norm's parameters and statistics stay float32: PyTorch's batch norm and fastgen's ops take them so.
        if not isinstance(part, nn.modules.batchnorm._BatchNorm):
            for value in (*part._parameters.values(), *part._buffers.values()):
                if value is not None and value.is_floating_point():
                    value.data = value.data.to(dtype)
    return module


@contextlib.contextmanager
def multiplying(precision: str) -> Iterator[None]:
    """float32 is multiplied as "tf32" or, for other precisions and on a CPU, exactly, by PyTorch's kernels and
    fastgen's."""
    cudnn, matmul, mkldnn = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn
    # That of cudnn.rnn too: PyTorch raises an error where it asks for both and they differ.
    on_gpu: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, matmul)  # type: ignore[attr-defined]
    on_cpu: tuple[Any, ...] = (mkldnn.conv, mkldnn.matmul)  # type: ignore[attr-defined]
    with _switching:
        before = [(switch, switch.fp32_precision) for switch in (*on_gpu, *on_cpu)]
        for switch, _ in before:
            switch.fp32_precision = "tf32" if precision == "tf32" and switch in on_gpu else "ieee"
        try:
            yield
        finally:
            for switch, value in before:
                switch.fp32_precision = value
