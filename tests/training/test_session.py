from dataclasses import replace

import pytest
import torch

from ffkernels.engine.config import FastForwardConfig
from ffkernels.reporting.recorder import read_run
from ffkernels.stage.record import Stage
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import open_session, waiting_stages
from ffkernels.training.trainer import train

STAGES = FastForwardConfig(interval=4, max_tau=16)


@pytest.fixture
def config(small, tmp_path):
    return TrainConfig(**{**small, "steps": 6}, out=str(tmp_path))


@pytest.mark.parametrize("fast_forward", [None, STAGES], ids=["plain", "fast forward"])
def test_a_session_driven_by_hand_is_the_run_of_train_to_the_bit(config, fast_forward):
    config = replace(
        config,
        fast_forward=fast_forward,
        dropout=0.1,
        micro_batch_size=3,
        max_grad_norm=0.1,
        schedule="cosine",
        weight_decay=0.1,
    )
    result = train(config)
    log = read_run(str(result.log))
    losses = []
    with open_session(config) as session:
        assert session.test_loss() == log.tests[0]["loss"]
        for step in range(session.steps):
            batch = session.load(step)
            loss = session.backward(batch)
            assert session.learning_rate(step) == log.steps[step]["lr"]
            session.update(step)
            assert all(p.grad is None for p in session.trainable)
            losses.append(loss.item())
        assert losses == [step["train_loss"] for step in log.steps]
        assert session.test_loss() == result.test_loss
        weights = torch.load(result.folder / "state.pt", weights_only=True)["weights"]
        assert session.names == list(weights)
        for name, weight in zip(session.names, session.trainable, strict=True):
            assert torch.equal(weight, weights[name])
    if fast_forward is None:
        assert session.ff is None
    else:
        assert [stage.losses for stage in session.ff.stages] == [stage.losses for stage in result.stages]
        assert not session.ff.active, "leaving the session detaches"


def test_stages_draw_their_examples_from_a_pool_that_nothing_else_uses(config):
    stages = FastForwardConfig(interval=2, max_tau=4, patience=None)
    config = replace(config, fast_forward=stages, resample_validation=24, seed=3)
    log = read_run(str(train(config, save=False).log))
    assert [stage["draw"] for stage in log.stages] == [0, 1, 2]
    with open_session(config) as session:
        task, pool = session.task, session.validation
        assert (len(task.test), len(task.validation), len(task.train)) == (16, 24, 80)
        assert (pool.examples, pool.pool_size, pool.drawn) == (8, 24, 0)
        for step, stage in zip((1, 3, 5), log.stages, strict=True):
            session.step(step - 1)
            session.step(step)
            assert [list(pair) for pair in session.ff.stages[-1].losses] == stage["losses"]
    fixed = read_run(str(train(replace(config, resample_validation=None), save=False).log))
    assert [stage["draw"] for stage in fixed.stages] == [None] * 3


def test_a_learning_rate_that_fast_forward_found_multiplies_the_schedule(config):
    class Finder(Peer):
        lr_scale = 1.0

        def after(self, *_):
            self.lr_scale = 8.0  # from the second step on

    config = replace(config, optimizer="lora-plus", lora_plus_ratio=2, warmup_steps=2)
    with open_session(config, attach=Finder) as session:
        for step, lr in ((0, 0.5e-3), (1, 8e-3), (2, 8e-3)):
            session.step(step)
            assert session.lr == lr and session.learning_rate(step) == lr / (1 if step == 0 else 8)
            assert [group["lr"] for group in session.optimizer.param_groups[2:]] == [2 * lr, 2 * lr]
    log = read_run(str(train(config, attach=Finder).log))
    assert [event["lr"] for event in log.steps] == [0.5e-3] + [8e-3] * 5


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_examples_beyond_the_positions_are_counted_or_refused_where_a_table_ends(config, kind, tmp_path):
    import transformers

    cls, sizes = getattr(transformers, kind), {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 300}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 7, "eos_token_id": 1, "bos_token_id": 1}
    cls(cls.config_class(**sizes, tokenizer_class="ByteTokenizer")).save_pretrained(tmp_path / "model")
    config = replace(config, model=str(tmp_path / "model"), method="full", fast_forward=None)
    if kind == "GPT2LMHeadModel":
        with pytest.raises(
            ValueError, match=r"^max_length=\d+: must be at most 7, the positions that the mod"
        ):
            open_session(config)
        return
    with open_session(config) as session:
        task = session.task
        lengths = [len(example["input_ids"]) for example in (*task.train, *task.validation, *task.test)]
        beyond = sum(length > 7 for length in lengths)
        assert 0 < beyond < len(lengths)
        assert session.remarks == [
            f"Of {len(lengths)} examples {beyond}, of up to {max(lengths)} tokens, are longer than the 7 "
            "positions that the model was made for; lower max_length (--max-length)."
        ]


def test_step_is_its_three_parts(config):
    with open_session(config) as parts, open_session(config) as whole:
        for step in range(3):
            loss = parts.backward(parts.load(step)).item()
            parts.update(step)
            assert whole.step(step) == loss


def test_a_batch_is_cut_into_micro_batches_and_its_labelled_tokens_are_counted(config):
    with open_session(replace(config, micro_batch_size=3)) as session:
        batch = session.load(2)
        assert [mb["input_ids"].shape[0] for mb in batch.micro_batches] == [3, 3, 2]
        examples = [session.task.train[i] for i in session.order(2)]
        counted = [sum(label != -100 for label in example["labels"][1:]) for example in examples]
        assert batch.labelled == [sum(counted[:3]), sum(counted[3:6]), sum(counted[6:])]


class Peer:
    """Runs no stages, and says that it ran one at every second step."""

    def __init__(self, session):
        self.session, self.stages, self.detached, self.steps = session, [], False, 0
        self.hook = session.optimizer.register_step_post_hook(self.after)

    def after(self, *_):
        self.steps += 1
        if self.steps % 2 == 0:
            self.stages.append(Stage(self.steps, losses=[(0, float(self.session.validation()))], seconds=0.0))

    def detach(self):
        self.hook.remove()
        self.detached = True


def test_a_peer_takes_the_place_of_fast_forward(config):
    config = replace(config, fast_forward=STAGES)
    made = []

    def attach(session):
        made.append(Peer(session))
        return made[-1]

    result = train(replace(config, name="peer"), attach=attach)
    assert [stage.optimizer_step for stage in result.stages] == [2, 4, 6]
    assert result.validation_forwards == 3 and made[0].detached
    log = read_run(str(result.log))
    assert log.config["peer"] == "Peer" and log.config["fast_forward"]["interval"] == 4
    tests = log.tests
    assert [test["optimizer_step"] for test in tests] == [0, 2, 4, 6]
    train(replace(config, name="plain", fast_forward=None))
    mine, plain = (read_run(f"{config.out}/{name}.jsonl") for name in ("peer", "plain"))
    assert [s["train_loss"] for s in mine.steps] == [s["train_loss"] for s in plain.steps]
    with pytest.raises(ValueError, match="Peer cannot be resumed"):
        train(replace(config, name="peer", steps=8), resume=True, attach=attach)
    assert made[-1].detached


def test_a_run_goes_on_with_the_loop_it_was_saved_with(config):
    class Resumable(Peer):
        def state_dict(self):
            return {"steps": self.steps}

        def load_state_dict(self, state):
            self.steps = state["steps"]

    train(replace(config, steps=3), attach=Resumable)
    with pytest.raises(ValueError, match="cannot resume with attach of None: the run was saved with 'Resum"):
        train(config, resume=True)
    result = train(config, resume=True, attach=Resumable)
    assert [stage.optimizer_step for stage in result.stages] == [4, 6]
    train(replace(config, name="plain", steps=3))
    with pytest.raises(ValueError, match="attach of 'Resumable': the run was saved with None"):
        train(replace(config, name="plain"), resume=True, attach=Resumable)


def test_attach_may_decline(config):
    result = train(replace(config, fast_forward=STAGES), attach=lambda session: None)
    assert result.stages == [] and result.optimizer_steps == 6


def flat(weights):
    return torch.cat([weight.detach().flatten() for weight in weights])


def test_waiting_stages_make_the_same_run(config):
    stages = FastForwardConfig(interval=3, warmup=1, max_tau=20)
    config = replace(config, steps=10, fast_forward=stages)
    with open_session(config) as session:
        for step in range(8):
            session.step(step)
        expected, taus = flat(session.trainable), [stage.tau for stage in session.ff.stages]
    with open_session(config, attach=waiting_stages) as session:
        for step in range(8):
            session.step(step)
            before = flat(session.trainable)
            due = session.ff.stage_due
            assert due == (step in (3, 6))
            stage = session.ff.run_due_stage()
            assert (stage is not None) == due and not session.ff.stage_due
            assert torch.equal(before, flat(session.trainable)) == (stage is None or stage.tau == 0)
        assert torch.equal(flat(session.trainable), expected)
        assert [stage.tau for stage in session.ff.stages] == taus and max(taus) > 0


def test_without_fast_forward_no_stage_waits(config):
    with open_session(config, attach=waiting_stages) as session:
        assert session.ff is None
