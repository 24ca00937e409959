# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Fine-tune a causal language model with LoRA and Fast Forward, or, to compare, without the latter."""

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft import LoraConfig, get_peft_model
from peft.optimizers import create_fast_forward_optimizer


def load_model_and_examples(args):
    """Returns the model, a list of token ids per example, and the padding token."""
    if args.smoke_test:
        # A tiny random model on bytes, trained on this very file: runs anywhere in seconds, without any download.
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        text = Path(__file__).read_bytes()
        examples = [list(text[i : i + 64]) for i in range(0, len(text) - 64, 16)]
        return LlamaForCausalLM(config), examples, 0

    from datasets import load_dataset

    tokenizer = AutoTokenizer.from_pretrained(args.base_model_name_or_path)
    # The base model may be in bfloat16, the adapter that PEFT adds to it is in float32. The trainer moves both.
    dtype = torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.base_model_name_or_path, dtype=dtype)
    dataset = load_dataset(args.dataset_name_or_path, split="train")
    dataset = dataset.shuffle(seed=args.seed).select(range(min(len(dataset), args.max_examples)))
    examples = [
        tokenizer(row["query"] + "\n" + row["response"] + tokenizer.eos_token)["input_ids"][: args.cutoff_len]
        for row in dataset
    ]
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return model, examples, pad_token_id


def train_model(args):
    set_seed(args.seed)
    model, examples, pad_token_id = load_model_and_examples(args)
    # 32 examples for Fast Forward and 64 for the evaluation; neither is trained on
    validation, test, train = examples[:32], examples[32:96], examples[96:]

    def collate(rows):
        length = max(len(row) for row in rows)
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        for row in rows:
            padding = length - len(row)
            batch["input_ids"].append(row + [pad_token_id] * padding)
            batch["attention_mask"].append([1] * len(row) + [0] * padding)
            batch["labels"].append(row + [-100] * padding)
        return {key: torch.tensor(value) for key, value in batch.items()}

    config = LoraConfig(
        r=args.lora_rank, lora_alpha=args.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()

    if args.fast_forward:
        optimizer = create_fast_forward_optimizer(
            model,
            torch.optim.AdamW,
            lr=args.lr,
            validation=[collate(validation[i : i + args.batch_size]) for i in range(0, 32, args.batch_size)],
            interval=args.interval,
            search=args.search,
            weight_decay=0.0,
        )
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0)

    training_args = TrainingArguments(
        output_dir=args.output_dir,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        lr_scheduler_type="constant",
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        logging_steps=args.eval_steps,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=test,
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    trainer.train()
    if args.fast_forward:
        for stage in optimizer.fast_forward.stages:
            losses = dict(stage.losses)
            print(
                f"step {stage.step}: the update was repeated {stage.tau} times, validation loss "
                f"{losses.get(0, float('nan')):.4f} -> {losses.get(stage.tau, float('nan')):.4f} "
                f"({len(losses)} measured)"
            )
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model_name_or_path", type=str, default="meta-llama/Llama-3.2-3B")
    parser.add_argument(
        "--dataset_name_or_path",
        type=str,
        default="meta-math/MetaMathQA-40K",
        help="A dataset with the columns query and response",
    )
    parser.add_argument("--output_dir", type=str, required=True)
    parser.add_argument("--fast_forward", action="store_true", help="Use Fast Forward")
    parser.add_argument("--interval", type=int, default=6, help="Optimizer steps between two Fast Forward stages")
    parser.add_argument("--search", choices=["parabolic", "linear"], default="parabolic")
    parser.add_argument("--max_steps", type=int, default=120)
    parser.add_argument("--eval_steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--cutoff_len", type=int, default=512)
    parser.add_argument("--max_examples", type=int, default=4000)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--lora_alpha", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke_test", action="store_true", help="A tiny random model instead, on the CPU in seconds")
    train_model(parser.parse_args())
