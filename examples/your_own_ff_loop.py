"""The kernels alone: a Fast Forward loop of your own on ``ffkernels.ops``.

    python examples/your_own_ff_loop.py

Nothing of ffkernels but ``ops`` is used, and nothing but torch is needed: a low-rank adapter on a frozen
layer learns to be another layer. The loop is the paper's: repeat the last update while the loss falls.
"""

import torch

from ffkernels import ops

torch.manual_seed(0)
base = torch.randn(64, 64)
target = base + torch.randn(64, 4) @ torch.randn(4, 64) / 8
A = torch.nn.Parameter(torch.randn(4, 64) / 8)
B = torch.nn.Parameter(torch.zeros(64, 4))
optimizer = torch.optim.Adam([A, B], lr=1e-3)


def loss(x):
    return (x @ (base + B @ A).T - x @ target.T).square().mean()


def validate():
    with torch.no_grad():
        return float(loss(held_out))


held_out = torch.randn(32, 64)
table = ops.TensorTable([A, B])  # where all weights, their updates and their checkpoints are

for step in range(1, 31):
    loss(torch.randn(256, 64)).backward()
    due = step % 6 == 0
    if due:
        ops.checkpoint_(table)  # best ← W
    optimizer.step()
    optimizer.zero_grad()
    if not due:
        continue

    ops.delta_(table)  # Δ ← W − best; best ← W
    before = best = validate()
    tau = 0
    ops.step_(table, True, 1.0)  # best ← W; W ← W + Δ, all tensors in one call
    while tau < 1000 and (now := validate()) < best:
        best, tau = now, tau + 1
        ops.step_(table, True, 1.0)
    ops.step_(table, False, 0.0)  # the last one did not help: W ← best, bit for bit
    assert validate() == best
    print(f"after step {step}: the update repeated {tau} times, validation loss {before:.2f} → {best:.2f}")
