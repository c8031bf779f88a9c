# SPDX-License-Identifier: Apache-2.0
"""Slicing of torch tensors."""

import torch


def dense(x, slices, stride):
    n, columns = x.shape
    width = -(-columns // slices)
    padded = torch.nn.functional.pad(x, (0, slices * width - columns))
    if stride:
        parts = padded.reshape(n, width, slices).transpose(1, 2)
    else:
        parts = padded.reshape(n, slices, width)
    place = parts.detach().max(-1).indices
    values = parts.gather(-1, place.unsqueeze(-1)).squeeze(-1)
    own = torch.arange(slices, device=x.device)
    ids = place * slices + own if stride else own * width + place
    none = values <= 0
    return torch.where(none, 0, values), torch.where(none, -1, ids).int()


def placed(values, entry, slot, ids):
    """(values, ids) of slices: `values[entry]` at `slot`, 0 elsewhere."""
    entry, slot, ids = (torch.from_numpy(a) for a in (entry, slot, ids))
    out = values.new_zeros(ids.numel()).index_copy(0, slot, values[entry])
    return out.view(ids.shape), ids
