# SPDX-License-Identifier: Apache-2.0
"""Softmax attention: forward, backward, and decoding with a cache. Importing this imports torch."""

from pentad.attention.block_mask import BlockMask
from pentad.attention.decode import decode
from pentad.attention.functional import attention
from pentad.attention.rotary import apply_rotary, rotary_tables
from pentad.attention.sdpa import scaled_dot_product_attention

__all__ = [
    "BlockMask",
    "apply_rotary",
    "attention",
    "decode",
    "rotary_tables",
    "scaled_dot_product_attention",
]
