"""The key-value cache of a joint rollout: grows in place, and rows can leave."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

_BLOCK = 64


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, views `(rows, heads, tokens, d)` of buffers with room for more.

    The stock layer copies all it holds for every token.
    """

    _room = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._have(key_states.new_empty(0), value_states.new_empty(0), 0)
        start = self._tokens
        end = start + key_states.shape[-2]
        if end > self._room:
            self._have(
                _with_room(self.keys, key_states, end + _BLOCK),
                _with_room(self.values, value_states, end + _BLOCK),
                end + _BLOCK,
            )
        self._key_buffer[..., start:end, :] = key_states
        self._value_buffer[..., start:end, :] = value_states
        self._show(end)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self._tokens if self.is_initialized else 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, `(rows,)`."""
        tokens = self._tokens
        self._have(self._key_buffer.index_select(0, indices), self._value_buffer.index_select(0, indices), self._room)
        self._show(tokens)

    def _have(self, keys: Tensor, values: Tensor, room: int) -> None:
        self._key_buffer, self._value_buffer, self._room = keys, values, room
        if not room:
            self._tokens = 0

    def _show(self, tokens: int) -> None:
        self._tokens = tokens
        self.keys, self.values = self._key_buffer[..., :tokens, :], self._value_buffer[..., :tokens, :]


def _with_room(held: Tensor, like: Tensor, room: int) -> Tensor:
    buffer = like.new_empty(*like.shape[:-2], room, like.shape[-1])
    if held.numel():
        buffer[..., : held.shape[-2], :] = held
    return buffer


def new_cache(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache for a model's layers; full-attention layers grow in place."""
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
