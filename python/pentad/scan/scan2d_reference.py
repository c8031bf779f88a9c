# SPDX-License-Identifier: Apache-2.0
"""The definitions of scans over images in plain PyTorch, with the signatures of the functions."""

import torch

from pentad.scan import reference


def scan2d(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    *,
    delta_bias=None,
    delta_softplus=False,
    order="cross",
    by_step=(),
):
    """A selective scan per direction over what lies at order[k, t]; the sum by places."""
    dtype, (_, dim, height, width) = u.dtype, u.shape
    wide = torch.promote_types(dtype, torch.float32)
    directions = delta.shape[1]
    if isinstance(order, str):
        order = torch.tensor(_paths(height, width, snake=order == "snake"), dtype=torch.int64)
    A = A.reshape(directions, dim, A.shape[-1])
    D, delta_bias = (t if t is None else t.reshape(directions, dim) for t in (D, delta_bias))
    u = u.flatten(2).to(wide)
    out = torch.zeros_like(u)
    for k in range(directions):
        steps = {
            name: t[:, k].reshape(t.shape[0], t.shape[2], height * width).to(wide)
            for name, t in (("delta", delta), ("B", B), ("C", C))
        }
        for name, t in steps.items():
            if name not in by_step:
                steps[name] = t[..., order[k]]
        y = reference.selective_scan(
            u[..., order[k]], steps["delta"], A[k], steps["B"], steps["C"],
            None if D is None else D[k], None, None if delta_bias is None else delta_bias[k],
            delta_softplus,
        )  # fmt: skip
        out = out.index_add(2, order[k].long(), y)
    return out.unflatten(2, (height, width)).to(dtype)


def _paths(height, width, snake):
    """Places by rows, by columns, and both backwards."""

    def walk(lines, places, place):
        for line in range(lines):
            backwards = snake and line % 2
            yield from (
                place(line, p) for p in (range(places)[::-1] if backwards else range(places))
            )

    rows = list(walk(height, width, lambda i, j: i * width + j))
    columns = list(walk(width, height, lambda j, i: i * width + j))
    return rows, columns, rows[::-1], columns[::-1]


def scan2d_wavefront(u, delta, A, B, C, D=None):
    """h_ij is the mean of what comes from the left and from the top, or the one that there is."""
    dtype, (_, _, height, width) = u.dtype, u.shape
    wide = torch.promote_types(dtype, torch.float32)
    u, delta, A, B, C = (t.to(wide) for t in (u, delta, A, B, C))

    def along(axis, i, j, before):
        dt = delta[:, axis, :, i, j, None]
        new = dt * B[:, axis, None, :, i, j] * u[:, :, i, j, None]
        return new if before is None else torch.exp(dt * A[axis]) * before + new

    h, rows = {}, []
    for i in range(height):
        row = []
        for j in range(width):
            left, top = h.get((i, j - 1)), h.get((i - 1, j))
            if i == 0:
                h[i, j] = along(0, i, j, left)
            elif j == 0:
                h[i, j] = along(1, i, j, top)
            else:
                h[i, j] = (along(0, i, j, left) + along(1, i, j, top)) / 2
            row.append((C[:, None, :, i, j] * h[i, j]).sum(-1))
        rows.append(torch.stack(row, -1) if row else u[:, :, i])
    y = torch.stack(rows, -2) if rows else torch.zeros_like(u)
    if D is not None:
        y = y + D.to(wide)[:, None, None] * u
    return y.to(dtype)
