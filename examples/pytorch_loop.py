"""Fast Forward in a plain PyTorch loop: one added line.

    python examples/pytorch_loop.py

Runs as it stands: LoRA on the model that comes with ffkernels, no network, seconds on a CPU.
"""

import torch

from ffkernels import FastForward, ValidationLoss
from ffkernels.training.models import add_adapter, load_model
from ffkernels.training.tasks import collate, load_task

model, tokenizer = load_model("tiny")
model = add_adapter(model, rank=8, seed=0)
task = load_task("instruction", tokenizer, test_examples=64)  # train, validation, test: disjoint


def batch(examples):
    return collate(examples, tokenizer.pad_token_id)


optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
validation = ValidationLoss(model, [batch(task.validation)])  # 32 examples
test = ValidationLoss(model, [batch(task.test)])

ff = FastForward(model, optimizer, validation)  # ← the line: it hooks itself to optimizer.step()

print(f"test loss {float(test()):.3f}")
model.train()
for step in range(18):
    examples = task.train[16 * step : 16 * (step + 1)]
    model(**batch(examples)).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()  # every 6th step is followed by a stage
    optimizer.zero_grad()
ff.detach()  # hooks off, buffers freed; ff.stages stays

for stage in ff.stages:
    print(
        f"after step {stage.optimizer_step}: the update repeated {stage.tau} times, "
        f"validation loss {stage.loss_before:.3f} → {stage.loss_after:.3f}"
    )
print(f"test loss {float(test()):.3f}")
