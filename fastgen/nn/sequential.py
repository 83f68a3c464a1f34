from torch import Tensor, nn

from fastgen.nn import _patterns, _run


class Sequential(nn.Sequential):
    """nn.Sequential with the same children and state_dict, which runs layers that can be fused as one op.

    It fuses Conv2d or ConvTranspose2d -> [BatchNorm2d, SyncBatchNorm, InstanceNorm2d or GroupNorm] -> [activation] and
    norm -> activation; activations are the layers of those that fastgen.ops.norm_act has, such as ReLU for "relu". All
    other children, including subclasses and modules with hooks, are called as usual; hooks that compute a convolution's
    weight (torch.nn.utils.spectral_norm, weight_norm, prune) are called before the op.
    The children of a plain nn.Sequential count as children of this one. An in-place activation of a fused run does not
    overwrite its input, which nothing else can see.
    """

    def forward(self, input: Tensor) -> Tensor:
        modules, at = [module for _, module in _patterns.steps(self)], 0
        while at < len(modules):
            convolution, norm, activation, end = _patterns.fusable(modules, at)
            if end > at and isinstance(input, Tensor):
                _patterns.before_forward(convolution, input)
                input, at = _run.run(input, convolution, norm, activation), end
            else:
                input, at = modules[at](input), at + 1
        return input
