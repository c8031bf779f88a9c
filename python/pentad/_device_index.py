# SPDX-License-Identifier: Apache-2.0
"""What indexes on a CUDA device share: made by `Index.to`, searched like the index they copy.

A kind of index with kernels defines `_on_device(device)`, which returns its subclass of
`DeviceIndex`: that keeps the rows in the layout that the kernels want, in the order of ids, and
answers `search` with positions. Nothing here waits for the device (docs/decisions, 11).
"""

import numpy as np
import torch

from pentad import _C
from pentad._arrays import is_numpy
from pentad._checks import check_choice
from pentad._errors import DeviceError
from pentad._index import SearchResult


def cuda_device(op: str, device) -> torch.device | None:
    """The CUDA device that is meant, with its number; None for the CPU."""
    device = torch.device(device)
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        raise DeviceError(f"[{op}] there are no {device.type} kernels, only those of CUDA")
    if not _C.cuda_built():
        raise DeviceError(f"[{op}] this build of pentad has no CUDA kernels, only CPU ones")
    if not torch.cuda.is_available():
        raise DeviceError(f"[{op}] torch sees no CUDA device")
    return torch.device(
        "cuda", torch.cuda.current_device() if device.index is None else device.index
    )


class DeviceIndex:
    """The present rows of an index, in the memory of a device."""

    def __init__(self, index, device):
        self.device = torch.device(device)
        self._empty = type(index)._made(index._meta())  # for the options and their checks
        self.ids = self._there(index.ids)

    def _there(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} rows on {self.device}>"

    def _op(self, name: str) -> str:
        return self._empty._op(name)

    # --- Arguments --------------------------------------------------------------------------------

    def _here(self, op, name, array):
        """A tensor on the index's device, without its history."""
        if is_numpy(op, any_device=True, traced=False, **{name: array}):
            raise DeviceError(f"[{op}] {name} is a numpy array, but the index is on {self.device}")
        if array.device != self.device:
            raise DeviceError(f"[{op}] {name} is on {array.device}, but the index on {self.device}")
        return array.detach()

    def _mask(self, op, keep):
        """`filter` as a mask over the rows: given as one, or as ids."""
        if keep is None:
            return None
        keep = keep.to(self.device) if isinstance(keep, torch.Tensor) else self._there(keep)
        if keep.dtype == torch.bool:
            if keep.shape != self.ids.shape:
                raise ValueError(
                    f"[{op}] filter has shape {tuple(keep.shape)}, expected {tuple(self.ids.shape)}"
                )
            return keep
        if keep.numel() and (keep.is_floating_point() or keep.is_complex()):
            raise TypeError(f"[{op}] ids have dtype {keep.dtype}, expected integers")
        if keep.ndim != 1:
            raise ValueError(f"[{op}] ids have shape {tuple(keep.shape)}, expected one dimension")
        at = self._find(keep.long())
        mask = torch.zeros(len(self) + 1, dtype=torch.bool, device=self.device)
        mask[torch.where(at >= 0, at, len(self))] = True  # the unknown go behind the end
        return mask[:-1]

    def _find(self, ids):
        """Row of each id, -1 where unknown."""
        if not len(self):
            return torch.full_like(ids, -1)
        at = torch.searchsorted(self.ids, ids.contiguous()).clamp_(max=len(self) - 1)
        return torch.where(self.ids[at] == ids, at, -1)

    def _ids_at(self, at):
        if not len(self):
            return torch.full_like(at, -1)
        return torch.where(at >= 0, self.ids[at.clamp(min=0)], -1)

    # --- Candidates -------------------------------------------------------------------------------

    def _scores(self, given, at, by):
        """float32 scores of the candidate rows (nq, c), the worst where one is -1."""
        raise NotImplementedError

    def _best(self, given, at, by, k) -> SearchResult:
        """The k best of the candidate rows (nq, c), scored anew; ties in rising order of id."""
        beyond = torch.iinfo(torch.int64).max
        at = torch.where(at >= 0, at, beyond).sort(dim=1).values  # rows rise with ids
        at = torch.where(at == beyond, -1, at)
        scores = self._scores(given, at, by)
        order = scores.sort(dim=1, descending=self._empty._largest, stable=True).indices[:, :k]
        found = scores.gather(1, order), self._ids_at(at.gather(1, order))
        missing = k - order.shape[1]
        if missing > 0:
            worst = -torch.inf if self._empty._largest else torch.inf
            pad = torch.nn.functional.pad
            found = pad(found[0], (0, missing), value=worst), pad(found[1], (0, missing), value=-1)
        return SearchResult(*found)

    def rescore(self, queries, ids, *, by="store") -> SearchResult:
        """Order candidates, such as the ids of a search; as the index's `rescore`."""
        op = self._op("rescore")
        check_choice(op, "by", by, self._empty._by)
        if by == "store" and self._empty.store is None:
            raise ValueError(f"[{op}] by='store' but the index was made with store=None")
        given = self._input("rescore", queries)
        ids = self._here(op, "ids", ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"[{op}] ids have dtype {ids.dtype}, expected int64")
        if ids.ndim != 2 or len(ids) != len(given):
            raise ValueError(
                f"[{op}] ids have shape {tuple(ids.shape)}, expected ({len(given)}, c)"
            )
        return self._best(given, self._find(ids), by, ids.shape[1])

    def _input(self, name, queries):
        """The queries, checked for the method `name`; their length is that of the rows."""
        raise NotImplementedError
