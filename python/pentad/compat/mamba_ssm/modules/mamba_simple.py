# SPDX-License-Identifier: Apache-2.0
"""The Mamba block, which is `pentad.nn.Mamba`."""

from pentad.nn import Mamba

__all__ = ["Mamba"]
