"""What all of the project needs of a reader, whatever model it is: two keep it, and a third has to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.generation.streamers import BaseStreamer

from atlas.model.inputs import Inputs


@runtime_checkable
class Reader(Protocol):
    """A torch module that reads passages and writes an answer: `FusionInDecoder`, or `CausalReader`.

    Attributes:
        config: of transformers; it is saved with the weights.
        inputs: makes its tensors from text.
        fuses: whether passages are encoded one by one and fused, so that each of them has rows of its own, and the
            attention to it can be observed. If not, `inputs` makes prompts to judge passages by.
        blocks: layers that are gathered one by one where ranks share the weights, and kept in the computation's
            precision where nothing is learnt.
        has_dropout: whether training mode and evaluation mode differ.
    """

    config: PretrainedConfig
    inputs: type[Inputs]
    fuses: bool

    @property
    def blocks(self) -> list[nn.Module]: ...

    @property
    def has_dropout(self) -> bool: ...

    def encode(self, ids: Tensor, mask: Tensor, lengths: np.ndarray | None = None) -> Tensor:
        """What can be computed of rows by themselves: (B, K, L) -> (B, K·L, d)."""

    def logits(self, hidden: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
        """Logits of each token of given answers: (B, S, d), (B, S), (B, T) -> (B, T, V)."""

    def write(
        self,
        hidden: Tensor,
        mask: Tensor,
        *,
        max_length: int,
        min_length: int | None = None,
        num_beams: int = 1,
        length_penalty: float = 1.0,
        prompt: Sequence[Sequence[int]] | None = None,
        streamer: BaseStreamer | None = None,
    ) -> list[list[int]]:
        """The tokens of an answer for each row."""

    def reading_twice(self, hidden: Tensor) -> AbstractContextManager[None]:
        """Inside the block, a use of `logits` and then one of `write` may share what they compute of these rows."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Load weights by the names of `named_parameters`. Raises: ValueError if they do not fit."""
