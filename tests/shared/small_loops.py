"""A small model, a step of it and a comparison, for tests of more than one folder."""

import torch
from torch import nn


class Factors(nn.Module):
    """A product of two matrices that is to become a third, like an adapter without its base."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(torch.randn(8, 8, generator=generator) * 0.3)
        self.b = nn.Parameter(torch.zeros(8, 8))

    def loss(self):
        return ((self.a @ self.b + self.a - 1) ** 2).mean()


def descend(optimizer, loss):
    """One step down ``loss``, whose gradients stay to be looked at."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def same(now, then):
    """Equal to the bit, through dicts and lists."""
    if isinstance(then, torch.Tensor):
        return torch.equal(now, then)
    if isinstance(then, dict):
        return now.keys() == then.keys() and all(same(now[key], then[key]) for key in then)
    if isinstance(then, list | tuple):
        return len(now) == len(then) and all(map(same, now, then))
    return now == then


def weights_of(model):
    """Copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same_weights(model, other):
    """Whether two models, or what ``weights_of`` said of one, have the same parameters to the bit."""
    mine, theirs = (m if isinstance(m, dict) else weights_of(m) for m in (model, other))
    return same(mine, theirs)
