"""InhibitFT inside a training script of your own: one callback, and the chosen neurons keep their weights.

Everything else is ordinary transformers and PEFT. Neurons come from ``pnlac-fast locate``. Run it with::

    python examples/your_trainer.py --model base --neurons neurons.json --set race/general --text train.txt --out tuned

where train.txt holds one training text a line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.neurons import load_sets


def main(arguments: Sequence[str] | None = None) -> InhibitFT:
    """Train an adapter that leaves the chosen neurons alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--neurons", required=True, help="file from pnlac-fast locate")
    parser.add_argument("--set", required=True, help="name of a set in it")
    parser.add_argument("--text", required=True, type=Path, help="file with one training text a line")
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=100)
    given = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    base = AutoModelForCausalLM.from_pretrained(given.model)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    lines = [line for line in given.text.read_text().splitlines() if line.strip()]
    rows = [{"input_ids": tokenizer(line)["input_ids"]} for line in lines]

    inhibit = InhibitFT(load_sets(given.neurons)[given.set])  # "freeze" these; mode="specific" trains only these
    settings = TrainingArguments(
        given.out,
        max_steps=given.steps,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[inhibit],
    )
    trainer.train()
    model.save_pretrained(given.out)
    assert inhibit.masks is not None
    print(f"{inhibit.steps} steps; still: {inhibit.masks.covered}")
    return inhibit


if __name__ == "__main__":
    main()
