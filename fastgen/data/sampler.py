import torch
from torch import Tensor


class BatchSampler:
    """Endless shuffled batches of indices into `size` items.

    Epochs follow one another without a gap, so every batch is full. An epoch's order depends only on the seed and the
    epoch's number, so `position`, the number of items drawn so far, is the whole state.

    Example:
        >>> sampler = BatchSampler(size=1797, batch_size=64, seed=0)
        >>> images = dataset.images[sampler.next()]
    """

    def __init__(self, size: int, batch_size: int, seed: int, position: int = 0) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")

    def next(self) -> Tensor:
        """The next batch's indices: (batch_size,), int64."""
        parts: list[Tensor] = []
        missing = self.batch_size
        while missing:
            epoch, start = divmod(self.position, self.size)
            part = self._epoch_order(epoch)[start : start + missing]
            parts.append(part)
            missing -= len(part)
            self.position += len(part)
        return torch.cat(parts)

    def peek(self) -> Tensor:
        """The batch that `next` will return."""
        position = self.position
        indices = self.next()
        self.position = position
        return indices

    def _epoch_order(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            key = (self.seed * 1_000_003 + epoch) % 2**63
            draw = torch.Generator("cpu").manual_seed(key)
            self._order = torch.randperm(self.size, generator=draw, device="cpu")
            self._epoch = epoch
        return self._order
