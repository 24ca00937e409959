"""Fast Forward in a Hugging Face Trainer: one added line.

    python examples/hf_trainer.py

Runs as it stands: LoRA on the model that comes with ffkernels, no network, seconds on a CPU.
"""

from functools import partial

from transformers import Trainer, TrainingArguments

from ffkernels import FastForwardCallback
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.tasks import collate, load_task

model, tokenizer = load_model("tiny")
model = add_adapter(model, rank=8, seed=0)
task = load_task("instruction", tokenizer, test_examples=64)  # train, validation, test: disjoint

trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="runs/hf_trainer",
        max_steps=18,
        per_device_train_batch_size=16,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=6,
        save_strategy="no",
        report_to="none",  # "tensorboard", "wandb", "trackio" … get the ff/ metrics too
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=task.train,
    eval_dataset=task.test,
    data_collator=partial(collate, pad_token_id=tokenizer.pad_token_id),
)
trainer.add_callback(callback := FastForwardCallback(task.validation))  # ← the line

before = trainer.evaluate()["eval_loss"]
metrics = trainer.train().metrics
after = trainer.evaluate()["eval_loss"]

for stage in callback.stages:
    print(
        f"after step {stage.optimizer_step}: the update repeated {stage.tau} times, "
        f"validation loss {stage.loss_before:.3f} → {stage.loss_after:.3f}"
    )
print(f"test loss {before:.3f} → {after:.3f}")
print(f"{metrics['ff/flops_measured']:.2e} FLOPs, {metrics['ff/flops_share']:.0%} of them Fast Forward's")
