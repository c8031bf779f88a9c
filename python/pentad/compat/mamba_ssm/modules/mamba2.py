# SPDX-License-Identifier: Apache-2.0
"""The Mamba-2 block, which is `pentad.nn.Mamba2`."""

from pentad.nn import Mamba2

__all__ = ["Mamba2"]
