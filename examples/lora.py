"""Fine-tune a quantized causal language model with LoRA, save the adapter, merge it and save the merged model.

    python examples/lora.py HuggingFaceTB/SmolLM2-135M-Instruct --text-file my.txt --output lora-out

The codes stay int8 while the adapter is trained beside them. `OUTPUT/adapter` then holds the adapter alone, some
megabytes to be used with the quantized model in `OUTPUT/base`; `OUTPUT/merged` a quantized model that needs no PEFT.

Needs `pip install peft`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from mono_quant_hf import MonoQuantConfig


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="LoRA on a quantized causal language model.")
    parser.add_argument("model", help="folder or Hub name of a float causal language model")
    parser.add_argument("--text-file", type=Path, required=True, help="what to train on, as UTF-8")
    parser.add_argument("--output", type=Path, required=True, help="folder to save in")
    parser.add_argument("--kind", choices=["lora", "rslora", "dora"], default="lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--window", type=int, default=128, help="tokens in an example (default: 128)")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = tokenizer(arguments.text_file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    windows = [w for w in tokens.split(arguments.window) if len(w) == arguments.window]
    if not windows:
        raise ValueError(f"{arguments.text_file} has {len(tokens)} tokens, fewer than --window.")
    # Quantized first, and loaded again: the adapter remembers the folder that its base model came from.
    base = arguments.output / "base"
    AutoModelForCausalLM.from_pretrained(
        arguments.model, quantization_config=MonoQuantConfig()
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    quantized = AutoModelForCausalLM.from_pretrained(base)

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules="all-linear",
        use_rslora=arguments.kind == "rslora",
        use_dora=arguments.kind == "dora",
    )
    model: Any = get_peft_model(quantized, config)
    model.print_trainable_parameters()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            str(arguments.output / "trainer"),
            max_steps=arguments.steps,
            learning_rate=arguments.learning_rate,
            per_device_train_batch_size=4,
            logging_steps=max(1, arguments.steps // 10),
            save_strategy="no",
            report_to=[],
            dataloader_pin_memory=torch.accelerator.is_available(),
        ),
        train_dataset=[{"input_ids": window, "labels": window} for window in windows],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss: {losses[0]:.4f} at first, {losses[-1]:.4f} at last")

    model.save_pretrained(arguments.output / "adapter")
    probe = windows[0][None].to(model.device)
    model.eval()
    with torch.no_grad():
        apart = model(input_ids=probe).logits
        merged: Any = model.merge_and_unload(
            safe_merge=True
        )  # rounds the merged weights, and says what it costs
        together = merged(input_ids=probe).logits
    same = (apart.argmax(-1) == together.argmax(-1)).float().mean()
    print(f"merged: the same next token as with the adapter apart in {100 * same:.1f} % of places")
    merged.save_pretrained(arguments.output / "merged")
    tokenizer.save_pretrained(arguments.output / "merged")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, save, merge; 0 if all went well, 2 with one line on stderr if the user must change something."""
    try:
        run(parse(argv))
    except (OSError, ValueError) as error:
        print("lora.py: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
