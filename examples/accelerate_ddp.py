"""Fast Forward in a loop with accelerate, in one process or in several: the same added line.

    python examples/accelerate_ddp.py
    accelerate launch --multi_gpu --num_processes 8 examples/accelerate_ddp.py
    torchrun --standalone --nproc-per-node 2 examples/accelerate_ddp.py

Every rank is given the whole validation set; the ranks share it among themselves and take the same τ.
Runs as it stands: LoRA on the model that comes with ffkernels, no network, seconds on a CPU. All three
also work where there is no GPU; the ranks are then processes that talk over gloo.
"""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from ffkernels import FastForward, ValidationLoss
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.tasks import collate, load_task

accelerator = Accelerator(cpu=not torch.cuda.is_available())
model, tokenizer = load_model("tiny")
model = add_adapter(model, rank=8, seed=0)
task = load_task("instruction", tokenizer, test_examples=64)  # train, validation, test: disjoint


def batch(examples):
    return collate(examples, tokenizer.pad_token_id)


# A global batch of 16, whatever the number of ranks: accelerate gives each rank its own part of it.
loader = DataLoader(task.train[: 18 * 16], batch_size=16 // accelerator.num_processes, collate_fn=batch)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

# After prepare, when model and optimizer stand where they train; on every rank, with the same examples.
validation = ValidationLoss(model, [batch(task.validation)])  # 32 examples
test = ValidationLoss(model, [batch(task.test)])
ff = FastForward(model, optimizer, validation)  # ← the line

before = float(test())  # a ValidationLoss is collective: call it on every rank, print on one
model.train()
for examples in loader:
    accelerator.backward(model(**examples).loss)
    accelerator.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # every 6th step is followed by a stage
    optimizer.zero_grad()
ff.detach()
after = float(test())

if accelerator.is_main_process:
    print(f"ranks: {accelerator.num_processes}, test loss {before:.3f}")
    for stage in ff.stages:
        print(
            f"after step {stage.optimizer_step}: the update repeated {stage.tau} times, "
            f"validation loss {stage.loss_before:.3f} → {stage.loss_after:.3f}"
        )
    print(f"test loss {after:.3f}")
accelerator.end_training()
