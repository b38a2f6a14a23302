"""The adapter bank: every live trial's LoRA matrices as rows of one tensor, so that a joint pass stacks nothing.

A trial's PEFT parameters stay PEFT's own `Parameter` objects; only their storage moves: each becomes a view into the
trial's row. Optimizers, clipping and saving work on them as before, and a pass reads all trials with one `narrow`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class LoraSite:
    """One trial's adapter on one Linear of the base.

    Args:
        a: PEFT's `lora_A` weight, `(rank, in)`.
        b: PEFT's `lora_B` weight, `(out, rank)`.
        scaling: PEFT's factor on the update.
        dropout: Probability of LoRA dropout, 0 when there is none.
        dropout_module: The module whose `training` flag says whether dropout is on.
    """

    a: nn.Parameter
    b: nn.Parameter
    scaling: float
    dropout: float
    dropout_module: nn.Module

    @property
    def rank(self) -> int:
        """The adapter's rank."""
        return self.a.shape[0]


def _aligned(numbers: int) -> int:
    """Rounded up to 64 bytes of float32: matrix kernels may round differently at other addresses."""
    return -(-numbers // 16) * 16


@dataclass(frozen=True, slots=True)
class _Place:
    offset: int
    in_features: int
    out_features: int


class AdapterBank:
    """Rows of adapters, laid out site by site, ranks padded with zeros.

    Layout of a row: for each site `key`, `A` as `(rank, in)` and then `B` transposed as `(rank, out)`, both at the
    bank's rank. The row after the last is all zeros: a trial without an adapter at a site, or with its adapter off.

    Args:
        rows: Trials to make room for; grows when more come.
        device: Where the base lives.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self._device = device
        self._rows = rows
        self._rank = 0
        self._dtype: torch.dtype | None = None
        self._places: dict[str, _Place] = {}
        self._flat = torch.zeros(0)
        self._members: dict[int, Mapping[str, LoraSite]] = {}
        self.version = 0

    @property
    def rank(self) -> int:
        """The padded rank."""
        return self._rank

    @property
    def zero_row(self) -> int:
        """Index of the all-zero row."""
        return self._rows

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the adapters held, None while empty."""
        return self._dtype

    @property
    def nbytes(self) -> int:
        """Bytes the bank takes."""
        return self._flat.numel() * self._flat.element_size()

    @torch.no_grad()
    def add(self, sites: Mapping[str, LoraSite]) -> int:
        """Move a trial's adapter in.

        Args:
            sites: Site by module path.

        Returns:
            The trial's row.

        Raises:
            ValueError: The adapter's dtype differs from that of the adapters held.
        """
        dtype = next(iter(sites.values())).a.dtype
        if not self._members:
            self._dtype = dtype
        if dtype != self._dtype:
            raise ValueError(f"`peft_config` gives {dtype} adapters where the trials beside it have {self._dtype}.")
        free = [row for row in range(self._rows) if row not in self._members]
        needs = any(
            key not in self._places or site.rank > self._rank or not self._flat.numel() for key, site in sites.items()
        )
        if needs or not free or self._flat.dtype != dtype:
            self._grow(sites, rows=self._rows if free else 2 * self._rows)
            free = [row for row in range(self._rows) if row not in self._members]
        row = free[0]
        self._flat[row].zero_()
        self._members[row] = sites
        self._point(row)
        return row

    @torch.no_grad()
    def remove(self, row: int) -> None:
        """Give a trial its adapter's storage back; strides stay, because optimizer states were made for them."""
        for site in self._members.pop(row).values():
            site.a.data = site.a.data.clone()
            site.b.data = site.b.data.clone(memory_format=torch.preserve_format)
        self._flat[row].zero_()

    def reset(self) -> None:
        """Forget the layout, once nobody is left in it."""
        if not self._members:
            self._places, self._rank, self._flat = {}, 0, torch.zeros(0)

    @torch.no_grad()
    def _grow(self, sites: Mapping[str, LoraSite], rows: int) -> None:
        rank = max([self._rank, *(site.rank for site in sites.values())])
        shapes = {key: (p.in_features, p.out_features) for key, p in self._places.items()}
        shapes.update({key: (site.a.shape[1], site.b.shape[0]) for key, site in sites.items()})
        offset, places = 0, {}
        for key, (in_features, out_features) in shapes.items():
            places[key] = _Place(offset, in_features, out_features)
            offset += _aligned(rank * in_features) + _aligned(rank * out_features)
        self._rows, self._rank, self._places = rows, rank, places
        self._flat = torch.zeros(rows + 1, offset, dtype=self._dtype, device=self._device)
        self.version += 1
        for row in self._members:
            self._point(row)

    def _point(self, row: int) -> None:
        """Copy a member's matrices into its row and make its parameters views of it."""
        for key, site in self._members[row].items():
            a, b = self._views(self._flat[row : row + 1], key)
            a, b = a[0, : site.rank], b[0, : site.rank].T
            a.copy_(site.a.data)
            b.copy_(site.b.data)
            site.a.data, site.b.data = a, b

    def _views(self, flat: Tensor, key: str) -> tuple[Tensor, Tensor]:
        """`A (trials, rank, in)` and `B (trials, rank, out)` of a site in `flat (trials, numel)`."""
        place, rank = self._places[key], self._rank
        middle = place.offset + _aligned(rank * place.in_features)
        a = flat[:, place.offset : place.offset + rank * place.in_features].view(-1, rank, place.in_features)
        b = flat[:, middle : middle + rank * place.out_features].view(-1, rank, place.out_features)
        return a, b

    def select(self, rows: list[int], dtype: torch.dtype | None = None) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The adapters of some rows, stacked.

        Args:
            rows: Row of each trial in the pass; `zero_row` for none.
            dtype: Cast to it.

        Returns:
            By site: `A (trials, rank, in)` and `B (trials, rank, out)`, read-only, without gradient; `rank` is the
            largest among these rows, so that a trial alone computes the same whoever is in the bank beside it.
        """
        with torch.no_grad():
            first, count = rows[0], len(rows)
            if rows == list(range(first, first + count)):
                flat = self._flat.narrow(0, first, count)
            else:
                flat = self._flat.index_select(0, torch.tensor(rows, device=self._device))
            if dtype is not None and dtype != flat.dtype:
                flat = flat.to(dtype)
            ranks = [site.rank for row in rows if row in self._members for site in self._members[row].values()]
            rank = max(ranks, default=0)
            views = {key: self._views(flat, key) for key in self._places}
            return {key: (a[:, :rank], b[:, :rank]) for key, (a, b) in views.items()}

    def sites(self, rows: Iterable[int]) -> set[str]:
        """Sites at which any of the rows has an adapter."""
        return {key for row in rows if row in self._members for key in self._members[row]}

    def check(self, row: int) -> None:
        """Raise RuntimeError if somebody moved a member's parameters out of the bank."""
        for key, site in self._members[row].items():
            a, b = self._views(self._flat[row : row + 1], key)
            if site.a.data_ptr() != a.data_ptr() or site.b.data_ptr() != b.data_ptr():
                raise RuntimeError(f"The adapter's parameters at {key} were replaced while the trial trained.")
