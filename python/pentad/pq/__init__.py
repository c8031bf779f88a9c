# SPDX-License-Identifier: Apache-2.0
"""Product quantization: codes and codebooks in a model, and as an index."""

from pentad.pq.adc import adc
from pentad.pq.adc_search import topk_adc
from pentad.pq.assign import assign, soft_assign
from pentad.pq.codes import hash_codes, pack_codes, quotient_remainder, unpack_codes
from pentad.pq.index import PQIndex
from pentad.pq.ivf import IVFPQIndex
from pentad.pq.kmeans import KMeans, kmeans
from pentad.pq.lookup import lookup
from pentad.pq.product_keys import ProductKeyResult, product_key_lookup
from pentad.pq.quantize import Quantized, quantize, usage
from pentad.pq.rabitq import RaBitQIndex
from pentad.pq.scalar import ScalarCodes, fsq, fsq_decode, lfq, lfq_decode, lfq_entropy
from pentad.pq.scalar_index import ScalarIndex
from pentad.pq.train import Trained, train_codebooks

__all__ = [
    "IVFPQIndex",
    "KMeans",
    "PQIndex",
    "ProductKeyResult",
    "Quantized",
    "RaBitQIndex",
    "ScalarCodes",
    "ScalarIndex",
    "Trained",
    "adc",
    "assign",
    "fsq",
    "fsq_decode",
    "hash_codes",
    "kmeans",
    "lfq",
    "lfq_decode",
    "lfq_entropy",
    "lookup",
    "pack_codes",
    "product_key_lookup",
    "quantize",
    "quotient_remainder",
    "soft_assign",
    "topk_adc",
    "train_codebooks",
    "unpack_codes",
    "usage",
]
