import pytest
import torch
from torch import nn

from ffkernels import ops
from ffkernels.ops.notices import FFKernelsNotice
from ffkernels.stage.weights import (
    MovedWeights,
    local_tensors,
    signature,
    trainable_weights,
    unwrap_optimizer,
)


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
    told = r"none of the model's 4 trainable parameters is in the optimizer's param_groups \(SGD, 6 other"
    with pytest.raises(ValueError, match=told):
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
    with pytest.raises(ValueError, match="4 trainable parameters are empty on this process between steps"):
        trainable_weights(net, optimizer)


def test_two_parameters_in_one_memory_are_moved_once():
    net = Net()
    net.twin = nn.Parameter(net.scale.data)
    net.empty = nn.Parameter(torch.empty(0))
    net.other_empty = nn.Parameter(torch.empty(0))
    weights = trainable_weights(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert "scale" in weights and "twin" not in weights
    assert "empty" in weights and "other_empty" in weights


def test_a_count_that_became_trainable_is_left_out_and_named():
    net = Net()
    net.ranknum = nn.ParameterDict({"default": nn.Parameter(torch.tensor([4.0]))})
    net.pruned = nn.ParameterDict({"ranknumber": nn.Parameter(torch.ones(2))})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.warns(FFKernelsNotice, match=r"ranknum is trainable here \(1 of them.*'ranknum.default'"):
        names = list(trainable_weights(net, optimizer))
    assert "ranknum.default" not in names
    assert "pruned.ranknumber" in names


def test_optimizers_with_modes_are_refused():
    class AdamScheduleFree(torch.optim.SGD):
        def train(self): ...
        def eval(self): ...

    class HasModesForOthers(Wrapper):
        def train(self): ...
        def eval(self): ...

    parameters = list(Net().parameters())
    for optimizer in (AdamScheduleFree(parameters, lr=0.1), Wrapper(AdamScheduleFree(parameters, lr=0.1))):
        with pytest.raises(ValueError, match=r"AdamScheduleFree has train\(\) and eval\(\) modes"):
            unwrap_optimizer(optimizer)
    plain = torch.optim.SGD(parameters, lr=0.1)
    assert unwrap_optimizer(HasModesForOthers(plain)) is plain


def test_optimizers_with_copies_of_the_weights_are_refused():
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    optimizer.master_weights = False  # as apex's and Transformer Engine's FusedAdam say
    assert unwrap_optimizer(Wrapper(optimizer)) is optimizer
    optimizer.master_weights = True
    with pytest.raises(ValueError, match=r"SGD has master_weights=True.*leave master_weights off"):
        unwrap_optimizer(Wrapper(optimizer))


@pytest.fixture
def mesh(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_dtensor_is_moved_by_its_shard_beside_plain_tensors(mesh):
    from torch.distributed.fsdp import fully_shard

    net = Net()
    fully_shard(net.lora_A, mesh=mesh)
    weights = trainable_weights(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert list(weights) == ["scale", "lora_A.weight", "lora_B.weight", "lora_B.bias"]
    assert weights["lora_A.weight"] is net.lora_A.weight
    shards = local_tensors(weights)
    assert {type(shard) for shard in shards.values()} == {torch.Tensor, nn.Parameter}
    assert shards["scale"] is net.scale

    before, old = signature(weights), net.lora_A.weight.full_tensor().detach().clone()
    assert before == signature(weights)
    table = ops.TensorTable(shards)
    for delta in table.deltas:
        delta.fill_(0.5)
    ops.step_(table, True, 2.0)
    assert torch.equal(net.lora_A.weight.full_tensor(), old + 1.0)
    assert torch.equal(net.scale, torch.full((3,), 2.0))
    assert signature(weights) == before

    moved = MovedWeights(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert not moved.is_stale() and moved.follow()
    net.lora_A.weight._local_tensor = net.lora_A.weight._local_tensor.clone()  # as `.to()` does under FSDP
    assert signature(weights) != before
    assert moved.is_stale() and not moved.table.is_stale(), "the old shard lies where it lay"
    assert moved.follow() and not moved.is_stale()
    table = moved.table
    shard = table.weights[table.names.index("lora_A.weight")]
    assert shard.data_ptr() == net.lora_A.weight._local_tensor.data_ptr()


def test_parameters_that_fsdp_has_gathered_are_not_missed(mesh):
    from torch.distributed.fsdp import fully_shard

    class Whole(Net):
        def forward(self, x):
            return self.lora_B(self.lora_A(self.base(x))) * self.scale

    net = Whole()
    fully_shard(net.lora_A, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    names = list(trainable_weights(net, optimizer))
    assert names == ["scale", "lora_A.weight", "lora_B.weight", "lora_B.bias"]
    with torch.no_grad():
        net(torch.ones(2, 3))
    assert not hasattr(net.scale, "to_local"), "gathered, for a backward that does not come"
    weights = trainable_weights(net, optimizer)
    assert list(weights) == names
    assert all(hasattr(weight, "to_local") for weight in weights.values())


def test_the_table_is_taken_along_to_other_memory_and_made_anew_for_other_weights():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    moved, let_go = MovedWeights(model, optimizer, impl="torch"), []
    table, fingerprint = moved.table, moved.fingerprint

    def refresh():
        return moved.refresh(lambda: let_go.append(1)), len(let_go)

    assert refresh() == (False, 0) and (table.numel, fingerprint[0], moved.sharded) == (8, 2, False)
    here, there = model.weight.data, model.weight.data.clone()
    model.weight.data = there
    assert moved.is_stale() and refresh() == (False, 1) and moved.table is table and not moved.is_stale()
    assert table.weights[0].data_ptr() == model.weight.data_ptr()
    model.weight.data = here
    assert moved.follow() and not moved.is_stale() and refresh() == (False, 1)
    model.weight.data = there  # where the last refresh saw it, and the table does not have it any more
    assert moved.is_stale() and refresh() == (False, 2) and not table.is_stale()
    model.weight.data = there.t().contiguous().t()
    with pytest.warns(UserWarning, match="1 of another shape, layout"):
        assert moved.is_stale() and not moved.follow() and moved.table is table
    model.weight.data = there
    assert not moved.is_stale()
    model.bias.requires_grad_(False)
    assert not moved.is_stale(others=True), "who trains is looked at where a stage may come"
    with pytest.warns(UserWarning, match=r"1 gone, such as 'bias'\); the table is rebuilt"):
        assert refresh() == (True, 3)
    assert moved.table is not table and (moved.table.numel, list(moved.parameters)) == (6, ["weight"])
    assert moved.fingerprint[0] == 1 and moved.fingerprint != fingerprint
    moved.free()
    assert moved.table is None and moved.is_stale()
    assert refresh() == (True, 4) and moved.table.numel == 6 and not moved.is_stale()
    model.weight = nn.Parameter(model.weight.detach())
    assert not moved.is_stale(others=True), "the optimizer's is the one that moves"
    optimizer.param_groups[0]["params"] = [model.weight]
    assert moved.is_stale(others=True) and not moved.is_stale()
    with pytest.warns(UserWarning, match=r"1 another parameter, such as 'weight'"):
        assert refresh() == (True, 5) and moved.table.weights == [model.weight]
