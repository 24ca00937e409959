"""No stage where a schedule has brought the rate near 0: how low that is, what is no fall, and a resume."""

import math

import pytest
import torch
from small_loops import descend
from torch import nn

from ffkernels import FastForward, FastForwardConfig
from ffkernels.engine.schedule import FADED, FadedRate
from ffkernels.ops.notices import FFKernelsNotice


def of(*rates):
    weights = [nn.Parameter(torch.zeros(1)) for _ in rates]
    return torch.optim.SGD([{"params": [w], "lr": lr} for w, lr in zip(weights, rates, strict=True)], lr=1.0)


def test_faded_is_a_share_of_the_highest_so_far():
    optimizer = of(0.0, 1.0)
    rate, group = FadedRate(optimizer), optimizer.param_groups[1]
    told = []
    for lr in (1e-6, 1e-3, 1.0, 0.5, 1.01 * FADED, 0.99 * FADED, 0.0, 0.5, 10.0, 0.19):
        group["lr"] = lr
        told.append(rate.look(False))
    assert told == [False] * 5 + [True, True, False, False, True] and rate.highest == 10.0


def test_rates_that_are_tensors_are_read_at_an_intervals_end_only():
    optimizer = of(torch.tensor(1.0))
    rate = FadedRate(optimizer)
    assert not rate.look(False) and rate.highest == 0.0
    assert not rate.look(True) and rate.highest == 1.0
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    with pytest.warns(FFKernelsNotice, match=r"fallen from 1 to 0\.001: it would repeat"):
        assert not rate.look(False) and rate.look(True)


class Bowl(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def loss(self):
        return ((self.w - torch.tensor([1.0, -2.0, 3.0])) ** 2).sum()


SCHEDULES = {
    "linear to 0": lambda step: 1 - step / 100,
    "cosine to 0": lambda step: 0.5 + 0.5 * math.cos(math.pi * step / 100),
    "step": lambda step: 1.0 if step < 50 else 0.01,
    "a long warm-up": lambda step: (step + 1) / 1000,
    "a fall to a tenth": lambda step: 1 - 0.9 * step / 99,
}


@pytest.mark.parametrize("patience", [None, 100, "auto"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore::ffkernels.ops.notices.FFKernelsNotice")
def test_stages_end_where_the_schedule_has_fallen(name, patience):
    shape, stages = SCHEDULES[name], {"linear to 0": 49, "cosine to 0": 45, "step": 25}.get(name, 50)

    def run(resume_at=None):
        model = Bowl()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
        config = FastForwardConfig(interval=2, max_tau=4, patience=patience)
        ff = FastForward(model, optimizer, Bowl.loss, config)
        for step in range(100):
            if step == resume_at:
                state = ff.state_dict()
                ff.detach()
                ff = FastForward(model, optimizer, Bowl.loss, config)
                ff.load_state_dict(state)
            descend(optimizer, model.loss())
            schedule.step()
        return [stage.optimizer_step for stage in ff.stages]

    steps = run()
    assert steps == [2 * (number + 1) for number in range(stages)]
    assert run(resume_at=97) == steps
