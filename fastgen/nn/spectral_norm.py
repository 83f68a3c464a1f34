from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as _Hook

from fastgen import ops
from fastgen.ops import _autograd

M = TypeVar("M", bound=nn.Module)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def spectral_norm(
    module: M, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> M:
    """torch.nn.utils.parametrizations.spectral_norm in one op: module.weight becomes weight / sigma.

    Semantics, random initial vectors and state_dict are PyTorch's: 15 power iterations at first, n_power_iterations
    more at each access in training, none in eval; gradients of any order flow through sigma. A state_dict of
    torch.nn.utils.spectral_norm (weight_orig, weight_u, weight_v) can be loaded too. Each access returns new tensors u
    and v, so that one graph may contain several accesses.

    A fused convolution without a norm (fastgen.nn.Sequential, fastgen.fuse) that runs on fastgen's kernel divides the
    kernel's sums by sigma; weight / sigma is then never written.

    Args:
        module: any module with a parameter of this name: Linear, Embedding, a convolution, transposed or not. A
            one-dimensional parameter is divided by its Euclidean norm.
        eps: lower bound of the norms in the iterations.
        dim: the dimension of the outputs; None: 1 for transposed convolutions, else 0.

    Returns the module. Raises ValueError if there is no parameter of this name or n_power_iterations is below 1;
    IndexError for an invalid dim.

    Miyato et al., Spectral Normalization for Generative Adversarial Networks, 2018.
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"name must be the name of a parameter of {type(module).__name__}, got {name!r}")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    parametrize.register_parametrization(module, name, SpectralNorm(weight, n_power_iterations, dim, eps))
    _load_old_names(module, name)
    return module


class SpectralNorm(nn.Module):
    """The parametrization that spectral_norm registers. It has the same buffers _u and _v as PyTorch's."""

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12):
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            raise IndexError(f"dim must be a dimension of the weight, whose shape is {tuple(weight.shape)}, got {dim}")
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations must be positive, got {n_power_iterations}")
        self.dim, self.n_power_iterations, self.eps = dim % weight.dim(), n_power_iterations, eps
        self._group: SpectralNormGroup | None = None
        if weight.dim() > 1:
            with torch.no_grad():
                size = weight.shape[dim]
                u, v = (weight.new_empty(n).normal_() for n in (size, weight.numel() // max(1, size)))
                u, v = F.normalize(u, dim=0, eps=eps), F.normalize(v, dim=0, eps=eps)
                *_, u, v = ops.spectral_norm(weight, u, v, dim=dim, n_power_iterations=15, eps=eps)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        if self._group is not None and not (torch.compiler.is_compiling() or _autograd.transforms()):
            step = self._group.step(self, weight)
            if step is not None and step.out is not None:
                needs_grad = torch.is_grad_enabled() and weight.requires_grad
                return _Normalized.apply(weight, step.out, step, self.dim) if needs_grad else step.out
        return self._computed(weight)[0]

    def parts(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(weight standing for weight / sigma, sigma), for a kernel that divides its sums by sigma.

        The first shares weight's memory, so that no quotient is written. The gradient it gets is that of weight /
        sigma; the backward pass carries it on to weight, through sigma too.
        """
        step = self._group.step(self, weight, divide=False) if self._group is not None else None
        if step is None:
            with torch.no_grad():
                step = _Step((), (), None, *self._computed(weight, divide=False)[1:])
        if torch.is_grad_enabled() and weight.requires_grad:
            return _Normalized.apply(weight, None, step, self.dim), step.sigma
        return weight, step.sigma

    def _computed(self, weight: Tensor, divide: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The op's results; in training the buffers are updated with the new u and v."""
        results = ops.spectral_norm(
            weight, self._u, self._v, dim=self.dim, n_power_iterations=self.n_power_iterations, eps=self.eps,
            training=self.training, divide=divide,
        )  # fmt: skip
        if self.training:
            with torch.no_grad():
                for buffer, new in zip((self._u, self._v), results[2:], strict=True):
                    _keep(buffer, new)
        return results

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def extra_repr(self) -> str:
        return f"n_power_iterations={self.n_power_iterations}, dim={self.dim}, eps={self.eps}"


def _load_old_names(module: nn.Module, name: str) -> None:
    """Makes load_state_dict accept the names of torch.nn.utils.spectral_norm."""
    parametrization = f"parametrizations.{name}"

    def rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        weight = state.get(f"{prefix}{name}_orig")
        if weight is None:
            return
        state.pop(prefix + name, None)  # very old checkpoints also contain the normalized weight
        u, v = state.get(f"{prefix}{name}_u"), state.get(f"{prefix}{name}_v")
        norm = module.get_submodule(parametrization)[0]  # type: ignore[index]
        if v is None and u is not None:
            v = F.normalize(weight.movedim(norm.dim, 0).flatten(1).mT.mv(u), dim=0, eps=norm.eps)
        for old, new, value in (("_orig", "original", weight), ("_u", "0._u", u), ("_v", "0._v", v)):
            state.pop(f"{prefix}{name}{old}", None)
            if value is not None:
                state[f"{prefix}{parametrization}.{new}"] = value

    module.register_load_state_dict_pre_hook(rename)


def _keep(buffer: Tensor, value: Tensor) -> None:
    """buffer.copy_(value) in a form that torch.func allows. In place, since DataParallel's replicas share the
    buffers."""
    torch.ops.aten.clone.out(value.detach(), out=buffer)


class _Step(NamedTuple):
    """The results for one weight, and the tensors that they were computed from."""

    read: tuple[Tensor, ...]  # kept alive, or other tensors might reuse their memory and match the stamp
    stamp: tuple
    out: Tensor | None  # weight / sigma; None until it is needed
    sigma: Tensor
    u: Tensor
    v: Tensor


class _Normalized(torch.autograd.Function):
    """Makes the precomputed out (or weight, standing for it) the result of weight / sigma(weight) for autograd: each
    access has its own graph."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, out: Tensor | None, step: _Step, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(weight, step.sigma, step.u, step.v)
        return (weight if out is None else out).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        weight, sigma, u, v = ctx.saved_tensors
        arguments = ([grads[0]], [torch.zeros_like(sigma)], [weight], [sigma], [u], [v], [ctx.dim])
        return torch.ops.fastgen.spectral_norm_backward(*arguments)[0], None, None, None


class SpectralNormGroup:
    """All spectrally normalized weights of a model, computed in one op per step however often the model is called.

    Once the group exists, the first access to a weight after its parameter changed computes all weights, and later
    accesses reuse the results until the next change. This makes one power iteration per optimizer step, as in the
    paper's Algorithm 1, while PyTorch makes one per call. Each access still has its own graph, so the backward passes
    of D(real) and D(fake) may run together or one by one.

    Changes are detected by the parameters' version counters, which optimizers, load_state_dict and code under
    torch.no_grad() increment; after writing through `.data` or replaying a CUDA graph, call update(). Within
    torch.compile and torch.func, and for tensors made in inference mode, which have no counter, each weight is computed
    separately at each access.

    Args:
        model: any module with weights under fastgen.nn.spectral_norm or torch.nn.utils.parametrizations.spectral_norm;
            the latter is replaced by the former, and the state_dict stays the same. The model may be moved, copied and
            cast.

    Raises ValueError if there are no such weights.
    """

    def __init__(self, model: nn.Module):
        self._members: list[tuple[SpectralNorm, parametrize.ParametrizationList]] = []
        self._steps: dict[SpectralNorm, _Step] = {}
        self._undivided: set[SpectralNorm] = set()  # members whose convolutions divide by sigma
        for module in model.modules():
            for name, form in list(forms(module)):
                if isinstance(form, _Hook):
                    continue  # the hook computes the weight when its module is called
                adopt(module, name, form)
                parametrized: Any = module.parametrizations[name]  # type: ignore[index]
                if parametrized.original.dim() > 1:
                    self._members.append((parametrized[0], parametrized))
        if not self._members:
            raise ValueError("model has no weight of 2 or more dimensions whose only parametrization is spectral_norm")
        for norm, _ in self._members:
            norm._group = self

    def __len__(self) -> int:
        return len(self._members)

    @torch.no_grad()
    def update(self) -> None:
        """Computes all weights now, with power iterations for those in training mode."""
        groups: dict[tuple, list] = defaultdict(list)
        for norm, parametrized in self._members:
            weight, divided = parametrized.original, norm not in self._undivided
            groups[norm.n_power_iterations, norm.eps, norm.training, divided, weight.device].append((norm, weight))
        for (iterations, eps, training, divided, _), members in groups.items():
            norms, weights = zip(*members, strict=True)
            results = ops.spectral_norm_group(
                weights, [norm._u for norm in norms], [norm._v for norm in norms], dims=[norm.dim for norm in norms],
                n_power_iterations=iterations, eps=eps, training=training, divide=divided,
            )  # fmt: skip
            if training:  # in place, since DataParallel's replicas share the buffers, and in one launch
                vectors = [t for norm in norms for t in (norm._u, norm._v)]
                torch._foreach_copy_(vectors, [t for pair in zip(*results[2:], strict=True) for t in pair])
            for norm, weight, out, *rest in zip(norms, weights, *results, strict=True):
                read = (weight, norm._u, norm._v)
                self._steps[norm] = _Step(read, _stamp(norm, *read), out if divided else None, *rest)

    def step(self, norm: SpectralNorm, weight: Tensor, divide: bool = True) -> _Step | None:
        """The current results of this parametrization, with weight / sigma if `divide`; None if the parametrization is
        not a member of the group, as in a replica."""
        if not any(norm is member and weight is parametrized.original for member, parametrized in self._members):
            return None
        if weight.is_inference() or norm._u.is_inference():
            return None
        (self._undivided.discard if divide else self._undivided.add)(norm)  # whether the next update divides
        while not self._is_current(step := self._steps.get(norm), norm, weight):
            self.update()  # repeated if another thread changed something meanwhile
        assert step is not None
        if divide and step.out is None:
            with torch.no_grad():
                step = self._steps[norm] = step._replace(out=(weight / step.sigma).to(weight.dtype))
        return step

    def _is_current(self, step: _Step | None, norm: SpectralNorm, weight: Tensor) -> bool:
        now = (weight, norm._u, norm._v)
        if step is None or any(old is not new for old, new in zip(step.read, now, strict=True)):
            return False
        return step.stamp == _stamp(norm, *now)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: without the results, which belong to this model's tensors."""
        return self.__dict__ | {"_steps": {}}

    def sigmas(self) -> list[Tensor]:
        """The largest singular value of each weight, as of the last computation."""
        return [self._steps[norm].sigma for norm, _ in self._members if norm in self._steps]

    def remove(self) -> None:
        """Dissolves the group: each weight is computed separately again."""
        for norm, _ in self._members:
            norm._group = None


def _stamp(norm: SpectralNorm, *read: Tensor) -> tuple:
    # A result made in inference mode cannot serve a backward pass.
    mode = norm.training, torch.is_inference_mode_enabled()
    return *mode, *((t._version, t.data_ptr(), t.dtype) for t in read)


class OldSpectralNorm(_Hook):
    """The hook of torch.nn.utils.spectral_norm in one op: the same buffers, steps and state_dict."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight, u, v = (getattr(module, self.name + suffix) for suffix in ("_orig", "_u", "_v"))
        if weight.dim() < 2:
            return super().compute_weight(module, do_power_iteration)
        out, _, *new = ops.spectral_norm(
            weight, u, v, dim=self.dim, n_power_iterations=self.n_power_iterations, eps=self.eps,
            training=do_power_iteration, v_first=True,
        )  # fmt: skip
        if do_power_iteration:
            with torch.no_grad():
                for buffer, value in zip((u, v), new, strict=True):
                    _keep(buffer, value)
        return out


def forms(module: Any) -> Iterator[tuple[str, Any]]:
    """(name, parametrization or hook) of each parameter whose only parametrization is a spectral norm, PyTorch's or
    fastgen's."""
    classes = (SpectralNorm, getattr(parametrizations, "_SpectralNorm", None))
    for name, parametrized in getattr(module, "parametrizations", {}).items():
        if len(parametrized) == 1 and type(parametrized[0]) in classes:
            yield name, parametrized[0]
    for hook in module._forward_pre_hooks.values():
        if type(hook) in (_Hook, OldSpectralNorm):
            yield hook.name, hook


def undivided(module: Any) -> tuple[SpectralNorm, Tensor] | None:
    """(SpectralNorm, parameter) of a module's weight if that is its only parametrization and parts() may be used
    instead of the weight."""
    parametrized = getattr(module, "parametrizations", {})
    if "weight" not in parametrized or parametrize._cache_enabled:
        return None
    norms, weight = parametrized["weight"], parametrized["weight"].original
    return (norms[0], weight) if len(norms) == 1 and type(norms[0]) is SpectralNorm and weight.dim() > 1 else None


def adopt(module: Any, name: str, form: Any) -> None:
    """Makes a parametrization or hook that `forms` found use the op. It keeps its options, vectors and names."""
    if isinstance(form, _Hook):
        form.__class__ = OldSpectralNorm
    if isinstance(form, (_Hook, SpectralNorm)):
        return
    norm: Any = SpectralNorm.__new__(SpectralNorm)
    nn.Module.__init__(norm)
    norm.dim, norm.eps, norm._group = form.dim, form.eps, None
    norm.n_power_iterations = getattr(form, "n_power_iterations", 1)  # missing for a one-dimensional weight
    for buffer, value in form.named_buffers():
        norm.register_buffer(buffer, value)
    module.parametrizations[name][0] = norm.train(form.training)
    _load_old_names(module, name)
