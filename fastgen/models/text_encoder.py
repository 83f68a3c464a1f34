"""Captions -> vectors: a small Transformer that is trained with the model, or a Hugging Face encoder that is used as it
is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import FastgenError, UsageError

MAX_WORDS = 64  # per caption; the rest is cut off
_MAX_VOCABULARY = 8192


def words_of(caption: str) -> list[str]:
    """The caption's words and punctuation marks, in lower case."""
    return re.findall(r"\w+|[^\w\s]", caption.lower())


def make_vocabulary(captions: Sequence[str]) -> tuple[str, ...]:
    """The words of the captions, the most frequent first, 8,192 at most."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:_MAX_VOCABULARY])


class TransformerTextEncoder(nn.Module):
    """Captions -> (N, width): a Transformer over words (Vaswani et al. 2017, arXiv:1706.03762), with the norm before
    each sublayer (Xiong et al. 2020, arXiv:2002.04745) and a mean over the words.

    Args:
        vocabulary: the words that have their own vectors; all others share one.
    """

    def __init__(self, vocabulary: Sequence[str], width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.width = width
        self._index = {word: index for index, word in enumerate(vocabulary, 2)}  # 0 pads, 1 is any other word
        self.word = nn.Embedding(len(vocabulary) + 2, width)
        self.position = nn.Parameter(0.02 * torch.randn(MAX_WORDS, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """(N, longest) int64, padded with 0.

        Raises:
            UsageError: a caption without a word that the vocabulary has.
        """
        rows = [[self._index.get(word, 1) for word in words_of(caption)[:MAX_WORDS]] for caption in captions]
        for caption, row in zip(captions, rows, strict=True):
            if max(row, default=1) == 1:
                raise UsageError(f"caption {caption[:80]!r} has no word that the model learned: {self._known()}")
        longest = max(map(len, rows), default=0)
        padded = [row + [0] * (longest - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64, device=self.position.device).view(-1, longest)

    def _known(self) -> str:
        return ", ".join(list(self._index)[:20]) + (", ..." if len(self._index) > 20 else "")

    def forward(self, captions: Sequence[str]) -> Tensor:
        tokens = self.tokens(captions)
        padding = tokens == 0
        x = self.layers(self.word(tokens) + self.position[: tokens.shape[1]], src_key_padding_mask=padding)
        is_word = (~padding)[..., None].to(x.dtype)
        return (x * is_word).sum(1) / is_word.sum(1)


class HuggingFaceTextEncoder(nn.Module):
    """Captions -> (N, width): the mean over the tokens of the last layer of a Hugging Face text encoder.

    It is not trained and not part of the state_dict: a checkpoint holds its name, and its weights are loaded at the
    first call, from the local cache or the hub (only safetensors; no code of the repository is run).

    Args:
        name: a model on the hub, or a folder.

    Raises:
        FastgenError: transformers is not installed, or has no such encoder.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self._loaded: tuple[Any, Any] | None = None  # in a tuple, so that they are not submodules
        config = self._call("AutoConfig")
        config = getattr(config, "text_config", config)  # of an encoder of texts and images
        if not hasattr(config, "hidden_size"):
            raise FastgenError(f"text encoder {name!r} is not a text encoder: its configuration has no hidden_size")
        self.width: int = config.hidden_size
        # its device is where to compute; on the CPU even if a model is made on the meta device: no checkpoint fills it
        self.register_buffer("_device", torch.empty(0, dtype=torch.float32, device="cpu"), persistent=False)

    def _call(self, kind: str, **options: Any) -> Any:
        try:
            import transformers

            return getattr(transformers, kind).from_pretrained(self.name, trust_remote_code=False, **options)
        except ImportError as error:
            raise FastgenError(f"text encoder {self.name!r} needs transformers: pip install 'fastgen[text]'") from error
        except (OSError, ValueError, KeyError) as error:
            raise FastgenError(f"text encoder {self.name!r} cannot be loaded: {str(error).splitlines()[0]}") from error

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Tensor:
        device: Any = self._device.device
        for caption in captions:
            if not caption.strip():  # some encoders make no token of it, and the mean needs one
                raise UsageError(f"caption {caption!r} has no word")
        with device:  # for the tensors that transformers makes
            if self._loaded is None:
                self._loaded = self._load()
            tokenizer, encoder = self._loaded
            batch = tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(device)
            x = encoder.to(device)(**batch).last_hidden_state
            is_token = batch["attention_mask"][..., None].to(x.dtype)
            return (x * is_token).sum(1) / is_token.sum(1)

    def _load(self) -> tuple[Any, Any]:
        encoder = self._call("AutoModel", use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)
        encoder = (
            encoder.get_encoder() if encoder.config.is_encoder_decoder else getattr(encoder, "text_model", encoder)
        )
        tokenizer = self._call("AutoTokenizer")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        return tokenizer, encoder
