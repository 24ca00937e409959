import pytest
import torch
from torch import nn

from ffkernels.engine.weights import signature, trainable_weights, unwrap_optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(3, 3).requires_grad_(False)
        self.lora_A = nn.Linear(3, 2, bias=False)
        self.lora_B = nn.Linear(2, 3)
        self.scale = nn.Parameter(torch.ones(3))


class Wrapper:
    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_takes_what_requires_grad_and_is_in_the_optimizer():
    net = Net()
    optimizer = torch.optim.SGD([*net.lora_A.parameters(), *net.base.parameters(), net.scale], lr=0.1)
    assert list(trainable_weights(net, optimizer)) == ["scale", "lora_A.weight"]


def test_tied_parameters_appear_once():
    net = Net()
    net.tied = net.lora_A
    weights = trainable_weights(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert sum(p is net.lora_A.weight for p in weights.values()) == 1


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"include": "lora_"}, ["lora_A.weight", "lora_B.weight", "lora_B.bias"]),
        ({"exclude": ["bias$", "scale"]}, ["lora_A.weight", "lora_B.weight"]),
        ({"include": ["lora_B"], "exclude": lambda name: name.endswith("bias")}, ["lora_B.weight"]),
    ],
)
def test_include_and_exclude_narrow_by_name(filters, names):
    net = Net()
    assert list(trainable_weights(net, torch.optim.SGD(net.parameters(), lr=0.1), **filters)) == names


def test_errors_say_which_condition_left_nothing():
    net, other = Net(), Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="none of the model's 4 trainable parameters is in the optimizer"):
        trainable_weights(other, optimizer)
    with pytest.raises(ValueError, match="include='nothing' and exclude=None leave none of the 4"):
        trainable_weights(net, optimizer, include="nothing")
    with pytest.raises(TypeError, match="include must be a predicate, a regular expression"):
        trainable_weights(net, optimizer, include=[3])
    with pytest.raises(ValueError, match="no trainable parameter"):
        trainable_weights(net.requires_grad_(False), optimizer)


def test_unwrap_goes_down_to_the_torch_optimizer():
    inner = torch.optim.SGD(Net().parameters(), lr=0.1)
    assert unwrap_optimizer(inner) is inner
    assert unwrap_optimizer(Wrapper(Wrapper(inner))) is inner
    with pytest.raises(
        TypeError, match=r"must be a torch.optim.Optimizer or wrap one as .optimizer, got str"
    ):
        unwrap_optimizer("adam")


def test_signature_sees_a_replaced_storage_behind_the_same_parameter():
    net = Net()
    weights = trainable_weights(net, torch.optim.SGD(net.parameters(), lr=0.1))
    before = signature(weights)
    net.scale.data.add_(1)
    assert signature(weights) == before
    net.scale.data = net.scale.data.clone()
    assert signature(weights) != before


def test_a_circle_of_wrappers_is_an_error():
    one, other = Wrapper(None), Wrapper(None)
    one.optimizer, other.optimizer = other, one
    with pytest.raises(TypeError, match="got Wrapper"):
        unwrap_optimizer(one)


def test_partitioned_parameters_are_refused():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        parameter.data = torch.empty(0)
    with pytest.raises(ValueError, match="empty on this process, as DeepSpeed ZeRO-3"):
        trainable_weights(net, optimizer)
