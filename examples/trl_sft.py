"""Fast Forward in TRL's SFTTrainer: one added line.

    pip install trl && python examples/trl_sft.py

Runs as it stands: LoRA on the model that comes with ffkernels, no network, seconds on a CPU. The validation
loss is taken from the first 32 examples of ``eval_dataset``, as SFTTrainer tokenizes and collates them.
"""

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from ffkernels import FastForwardCallback
from ffkernels.training.models import load_model
from ffkernels.training.offline import documented_functions

model, tokenizer = load_model("tiny")
pairs = [{"prompt": f'"""{doc}"""\n', "completion": code} for doc, code in documented_functions()]
pairs = [pair for pair in pairs if len(pair["prompt"]) < 60]

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir="runs/trl_sft",
        max_steps=18,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        max_length=64,
        logging_steps=6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(pairs[32:1000]),
    eval_dataset=Dataset.from_list(pairs[:32]),
    processing_class=tokenizer.for_transformers(),
    peft_config=LoraConfig(
        r=8, lora_alpha=16, target_modules=["query_key_value", "dense"], task_type="CAUSAL_LM"
    ),
)
trainer.add_callback(callback := FastForwardCallback())  # ← the line

metrics = trainer.train().metrics

for stage in callback.stages:
    print(
        f"after step {stage.optimizer_step}: the update repeated {stage.tau} times, "
        f"validation loss {stage.loss_before:.3f} → {stage.loss_after:.3f}"
    )
print(f"{metrics['ff/flops_measured']:.2e} FLOPs, {metrics['ff/flops_share']:.0%} of them Fast Forward's")
