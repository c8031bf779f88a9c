# SPDX-License-Identifier: Apache-2.0
"""The modules of all families under one name. Importing this imports torch."""

from pentad.attention.modules import Attention
from pentad.hamming.modules import Binarize, BinaryMemory
from pentad.scan.modules import Mamba

__all__ = ["Attention", "Binarize", "BinaryMemory", "Mamba"]
