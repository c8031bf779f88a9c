# SPDX-License-Identifier: Apache-2.0
"""The modules of all families under one name. Importing this imports torch."""

from pentad.attention.modules import Attention
from pentad.hamming.modules import Binarize, BinaryMemory
from pentad.pq.compressed_embedding import CompressedEmbedding
from pentad.pq.product_key_memory import ProductKeyMemory
from pentad.pq.vector_quantizer import VectorQuantizer
from pentad.scan.gated_delta_net import GatedDeltaNet
from pentad.scan.mamba2 import Mamba2
from pentad.scan.modules import Mamba
from pentad.scan.retention import MultiScaleRetention
from pentad.sparse.autoencoder import SparseAutoencoder

__all__ = [
    "Attention",
    "Binarize",
    "BinaryMemory",
    "CompressedEmbedding",
    "GatedDeltaNet",
    "Mamba",
    "Mamba2",
    "MultiScaleRetention",
    "ProductKeyMemory",
    "SparseAutoencoder",
    "VectorQuantizer",
]
