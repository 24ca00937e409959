import json
import math
import signal
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ffkernels.engine.config import FastForwardConfig
from ffkernels.reporting.recorder import read_run
from ffkernels.search.search import LinearSearch
from ffkernels.training.config import TrainConfig
from ffkernels.training.session import DataOrder, prepare_task
from ffkernels.training.trainer import _Interrupt, train

STAGES = FastForwardConfig(interval=4, max_tau=16)


@pytest.fixture
def config(small, tmp_path):
    return TrainConfig(**small, out=str(tmp_path))


def state(config, name=None):
    return torch.load(f"{config.out}/{name or config.name}/state.pt", weights_only=True)


def assert_same(mine, other):
    """Equal to the bit, through dicts and lists."""
    assert type(mine) is type(other)
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        mine, other = list(mine.values()), [other[key] for key in mine]
    if isinstance(mine, (list, tuple)):
        assert len(mine) == len(other)
        for a, b in zip(mine, other, strict=True):
            assert_same(a, b)
    else:
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


def raising(error, event, step=None):
    """An ``on_event`` that raises at an event, of an optimizer step."""

    def on_event(told):
        if told["event"] == event and step in (None, told.get("optimizer_step")):
            raise error

    return on_event


def events(config, kind, name=None):
    log = read_run(f"{config.out}/{name or config.name}.jsonl")
    return {"step": log.steps, "stage": log.stages, "test": log.tests, "end": [log.end]}[kind]


def assert_same_run(config, a, b):
    """Weights, optimizer, random numbers, FLOPs, losses and stages; not the clock."""
    mine, other = state(config, a), state(config, b)
    for part in ("weights", "optimizer", "random", "meter"):
        assert_same(mine[part], other[part])
    told = {"step": ("train_loss", "flops"), "stage": ("losses", "run_flops")}
    for kind, field in ((kind, field) for kind, fields in told.items() for field in fields):
        assert [e[field] for e in events(config, kind, a)] == [e[field] for e in events(config, kind, b)]
    finals = [(e["optimizer_steps"], e["test_loss"], e["flops"]) for e in events(config, "end", a)]
    assert finals == [(e["optimizer_steps"], e["test_loss"], e["flops"]) for e in events(config, "end", b)]


# The configuration


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("lr", 0, "above 0"),
        ("lr", math.nan, "above 0"),
        ("steps", 0, "at least 1"),
        ("steps", 2.5, "integer"),
        ("steps", True, "integer"),
        ("batch_size", -1, "at least 1"),
        ("micro_batch_size", 0, "or None"),
        ("method", "ia3", "'dora'"),
        ("schedule", "step", "'cosine'"),
        ("dropout", 1.0, "below 1"),
        ("name", "a/b", "file name"),
        ("name", "", "file name"),
        ("targets", "dense", "module names"),
        ("fast_forward", True, "FastForwardConfig"),
        ("target_loss", "low", "number"),
        ("dtype", "int8", "'bfloat16'"),
        ("optimizer", "sgd", "must be one of 'adamw', 'lora-plus'"),
        ("lora_plus_ratio", 0.5, "must be a number of at least 1"),
        ("attn", "flash", "must be one of 'sdpa', 'eager', 'flash_attention_2', None"),
        ("source", "web", "must be one of 'offline', 'hub'"),
        ("eval_tokens", 0, "must be an integer of at least 1 or None"),
        ("dtype", "bfloat16", "must be 'float32' with method='full'"),
        ("optimizer", "lora-plus", "must be 'adamw' with method='full'"),
    ],
)
def test_a_bad_setting_names_field_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError) as error:
        TrainConfig(**{field: value}, **({"method": "full"} if "method='full'" in allowed else {}))
    assert f"{field}={value!r}: must be" in str(error.value)
    assert allowed in str(error.value)


def test_learning_rates():
    constant = TrainConfig(lr=1.0, warmup_steps=4)
    assert [constant.learning_rate(s, 8) for s in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    linear = TrainConfig(lr=1.0, warmup_steps=0, schedule="linear")
    assert [linear.learning_rate(s, 4) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    cosine = TrainConfig(lr=1.0, warmup_steps=2, schedule="cosine")
    rates = [cosine.learning_rate(s, 6) for s in range(6)]
    assert rates[:3] == [0.5, 1, 1]
    assert rates[4] == pytest.approx(0.5)
    assert rates[5] == pytest.approx(0.5 - math.sqrt(0.125))


def test_data_order_is_a_function_of_seed_and_step():
    order = DataOrder(10, 4, seed=3)
    batches = [order(step) for step in range(10)]
    flat = [index for batch in batches for index in batch]
    assert sorted(flat[:10]) == sorted(flat[30:]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert DataOrder(10, 4, seed=3)(7) == order(7) == batches[7]
    assert order(0) == batches[0]
    assert DataOrder(10, 4, seed=4)(0) != batches[0]
    assert len(DataOrder(3, 8, seed=0)(0)) == 8


# The run


def test_a_run_learns_counts_and_saves(config, small):
    from ffkernels.training.models import load_model
    from ffkernels.training.tasks import collate
    from ffkernels.validation.loss import ValidationLoss

    config = replace(config, fast_forward=replace(STAGES, patience=None), evaluate_every=5, lr=3e-3)
    seen = []
    result = train(config, on_event=lambda event: seen.append(event["event"]))
    tests = events(config, "test")
    assert [t["optimizer_step"] for t in tests] == [0, 4, 5, 8, 10]
    assert result.test_loss == tests[-1]["loss"] < tests[0]["loss"]
    assert [s.optimizer_step for s in result.stages] == [4, 8]
    assert result.validation_forwards == sum(len(s.losses) for s in result.stages) > 2
    assert result.flops["measured"] > 0 and result.flops["paper"] > 0
    assert result.stopped_because == "all steps done" and result.reached_target is None
    logged = [e["event"] for e in map(json.loads, result.log.read_text().splitlines())]
    assert [event for event in seen if event != "stage_begins"] == logged
    assert seen[0] == "run" and seen[-1] == "end" and seen.count("step") == 10

    first = json.loads(result.log.read_text().splitlines()[0])
    assert first["tokens"]["test"]["examples"] == 16 and first["tokens"]["train"]["tokens"] > 0
    assert "peer" not in first["config"]
    assert first["machine"]["threads"] == torch.get_num_threads()
    assert first["versions"]["torch"] == torch.__version__

    for event in events(config, "step") + tests + events(config, "end"):
        s = event["seconds"]
        assert s["total"] == pytest.approx(s["train"] + s["validate"] + s["move"] + s["other"], abs=1e-12)
    stages = events(config, "stage")
    assert result.seconds["validate"] == pytest.approx(sum(s["validate_seconds"] for s in stages))
    assert result.seconds["move"] == pytest.approx(sum(s["move_seconds"] for s in stages))

    # The saved adapter on a fresh base is the model that was tested.
    peft = pytest.importorskip("peft")
    base, tokenizer = load_model(config.model)
    loaded = peft.PeftModel.from_pretrained(base, str(result.folder))
    task = prepare_task(config, tokenizer)
    test = ValidationLoss(loaded, task.test, collator=partial(collate, pad_token_id=tokenizer.pad_token_id))
    assert float(test()) == result.test_loss
    saved = state(config)["weights"]
    weights = {name: p for name, p in loaded.named_parameters() if name in saved}
    assert_same({n: p.detach() for n, p in weights.items()}, saved)
    leftovers = [p.name for p in result.folder.iterdir() if "writing" in p.name]
    assert not leftovers


@pytest.mark.parametrize(
    ("cut", "method"),
    [(1, "lora"), (3, "lora"), (4, "lora"), (6, "lora"), (8, "lora"), (9, "dora")],
    ids=["first step", "before a stage", "after a stage", "mid-interval", "after the second stage", "dora"],
)
def test_resume_is_bit_identical(config, cut, method):
    config = replace(config, fast_forward=STAGES, method=method, dropout=0.1, micro_batch_size=3)
    train(replace(config, name="straight"))
    train(replace(config, name="parts", steps=cut))
    train(replace(config, name="parts"), resume=True)
    assert_same_run(config, "straight", "parts")
    assert len(events(config, "step", "parts")) == 10
    stages = [s["optimizer_step"] for s in events(config, "stage", "parts")]
    assert stages == [4, 8]


@pytest.mark.parametrize("schedule", ["constant", "linear"])
@pytest.mark.parametrize("cut", [1, 5, 9])
def test_without_a_learning_rate_steps_tell_it_and_a_resumed_run_is_the_same(config, schedule, cut):
    auto = FastForwardConfig(learning_rate="auto", interval=None)
    config = replace(config, fast_forward=auto, schedule=schedule, warmup_steps=3, steps=12)
    result = train(replace(config, name="straight"))
    steps = events(config, "step", "straight")
    assert [step["alignment"] for step in steps[:1]] == [None] and result.validation_forwards == 0
    rates = [step["lr"] / config.learning_rate(i, 12) * config.lr for i, step in enumerate(steps)]
    assert rates[:4] == pytest.approx([1e-5, 4e-5, 16e-5, 64e-5])
    assert all(step["alignment"] < 0 for step in steps[1:4]) and max(rates) > 1e-3

    interrupted = train(replace(config, name="parts"), on_event=raising(KeyboardInterrupt, "step", cut))
    assert interrupted.optimizer_steps == cut
    train(replace(config, name="parts"), resume=True)
    assert [s["lr"] for s in events(config, "step", "parts")] == [step["lr"] for step in steps]
    assert events(config, "test", "parts")[-1]["loss"] == result.test_loss


def test_paths_may_be_paths_and_the_run_is_resumed(config):
    config = replace(config, **{name: Path(getattr(config, name)) for name in ("model", "data", "out")})
    train(replace(config, steps=2))
    assert train(config, resume=True).optimizer_steps == 10


@pytest.mark.parametrize(
    ("changes", "error", "at"),
    [
        (dict(fast_forward=STAGES, checkpoint_every=3), RuntimeError("power cut"), 5),
        (dict(schedule="cosine", checkpoint_every=4), KeyboardInterrupt(), 6),
    ],
    ids=["crash", "decaying schedule"],
)
def test_resume_drops_what_was_logged_after_the_checkpoint(config, changes, error, at):
    config = replace(config, **changes)
    train(replace(config, name="straight"))
    crash = isinstance(error, RuntimeError)
    with pytest.raises(RuntimeError, match="power cut") if crash else nullcontext():
        train(replace(config, name="parts"), on_event=raising(error, "step", at))
    assert len(events(config, "step", "parts")) == at
    if config.schedule == "cosine":
        with pytest.raises(ValueError, match=r"steps=12 \(saved: 10\)"):
            train(replace(config, name="parts", steps=12), resume=True)
    train(replace(config, name="parts"), resume=True)
    assert_same_run(config, "straight", "parts")


def test_resume_refuses_what_it_cannot_continue(config):
    with pytest.raises(ValueError, match="nothing to resume"):
        train(config, resume=True)
    train(replace(config, steps=1))
    with pytest.raises(ValueError, match=r"lr=0\.5 \(saved: 0\.001\)"):
        train(replace(config, lr=0.5), resume=True)
    (open(f"{config.out}/run/state.pt", "wb")).close()
    with pytest.raises(ValueError, match="cannot be read"):
        train(config, resume=True)


class NeverBetter(LinearSearch):
    """Sees a loss that rises with τ, whatever the model says."""

    def observe(self, tau, loss, sure=True, computed=True):
        super().observe(tau, float(tau))


def test_no_accepted_step_means_the_plain_run_bit_for_bit(config, monkeypatch):
    monkeypatch.setattr(
        "ffkernels.engine.fast_forward.make_search", lambda name, max_tau, start=1: NeverBetter(max_tau)
    )
    config = replace(config, dropout=0.1)
    train(replace(config, name="plain"))
    stages = FastForwardConfig(interval=2, patience=None)
    result = train(replace(config, name="ff", fast_forward=stages, evaluate_every=1))
    assert [s.tau for s in result.stages] == [0] * 5
    assert [len(s.losses) for s in result.stages] == [2] * 5
    for part in ("weights", "optimizer", "random"):
        assert_same(state(config, "plain")[part], state(config, "ff")[part])
    assert result.flops["measured"] > state(config, "plain")["meter"]["measured"]


def test_the_result_does_not_depend_on_the_micro_batch_size(config):
    runs = {}
    for size in (None, 1, 3, 8):
        name = f"micro-{size}"
        train(replace(config, name=name, micro_batch_size=size))
        losses = [e["train_loss"] for e in events(config, "step", name)]
        runs[size] = losses, state(config, name)["weights"]
    losses, weights = runs[None]
    for size in (1, 3, 8):
        assert runs[size][0] == pytest.approx(losses, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(runs[size][1][name], weight, rtol=1e-3, atol=1e-5)


def test_a_start_that_fails_leaves_the_earlier_run_alone(config):
    train(replace(config, steps=1))
    before = state(config)
    for wrong in ({"data": f"{config.out}/none.jsonl"}, {"device": "cuda:99"}, {"targets": ("nowhere",)}):
        with pytest.raises(ValueError):
            train(replace(config, **wrong))
    assert_same(state(config), before)
    assert (open(f"{config.out}/run/adapter_model.safetensors", "rb")).read()


def test_a_run_does_not_replace_the_model_that_it_starts_from(config):
    whole = replace(config, steps=1, method="full")
    model = train(whole).folder
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"name='run': .* would replace the model"):
        train(replace(config, steps=1, model=str(model)))
    assert (model / "model.safetensors").read_bytes() == before
    assert train(replace(config, steps=1, model=str(model), name="next")).optimizer_steps == 1


def test_seeds_change_the_run_and_repeat_it(config):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(replace(config, name=name, seed=seed, steps=3))
    assert_same(state(config, "a")["weights"], state(config, "b")["weights"])
    lora_a = next(n for n in state(config, "a")["weights"] if "lora_A" in n)
    assert not torch.equal(state(config, "a")["weights"][lora_a], state(config, "c")["weights"][lora_a])


@pytest.mark.parametrize(
    ("fast_forward", "evaluate_every", "step"), [(None, 3, 3), (STAGES, 3, 3), (STAGES, 0, 4)]
)
def test_the_target_is_checked_at_the_cadence_and_after_every_stage(
    config, fast_forward, evaluate_every, step
):
    train(replace(config, name="start", steps=1))
    target = events(config, "test", "start")[0]["loss"] - 1e-7
    changes = dict(fast_forward=fast_forward, evaluate_every=evaluate_every, warmup_steps=0, lr=1e-2)
    result = train(replace(config, **changes, target_loss=target))
    assert (result.stopped_because, result.reached_target) == ("target loss reached", True)
    assert result.optimizer_steps == step
    assert result.test_loss <= target


@pytest.mark.parametrize(("target", "steps", "reached"), [(0.0, 2, False), (100.0, 0, True)])
def test_a_target_out_of_reach_and_one_already_reached(config, target, steps, reached):
    result = train(replace(config, steps=2, target_loss=target))
    assert (result.optimizer_steps, result.reached_target) == (steps, reached)


def test_a_diverged_run_ends(config):
    result = train(replace(config, lr=1e30, warmup_steps=0))
    assert result.stopped_because == "training loss is not finite"
    assert result.optimizer_steps < 10
    assert not (result.folder / "adapter_model.safetensors").exists(), "lost weights are not worth keeping"


def test_ctrl_c_in_a_callback_saves_and_the_run_goes_on(config):
    config = replace(config, fast_forward=STAGES)

    train(replace(config, name="straight"))
    result = train(replace(config, name="parts"), on_event=raising(KeyboardInterrupt, "stage"))
    assert result.interrupted and result.optimizer_steps == 4
    assert events(config, "end", "parts")[0]["stopped_because"] == "interrupted"
    assert (result.folder / "adapter_model.safetensors").is_file()
    train(replace(config, name="parts"), resume=True)
    assert_same_run(config, "straight", "parts")


def test_a_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with _Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.wanted
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# Files and interrupts


def test_two_runs_of_one_name_do_not_write_one_log(config):
    seen = []

    def start_another(event):
        if event["event"] == "step" and event["optimizer_step"] == 2:
            for resume in (False, True):
                with pytest.raises(RuntimeError, match=r"another run is writing .*run\.jsonl"):
                    train(config, resume=resume)
            seen.append(True)

    assert train(replace(config, steps=3), on_event=start_another).optimizer_steps == 3 and seen
    assert [e["optimizer_step"] for e in events(config, "step")] == [1, 2, 3]


@contextmanager
def little_space(limit):
    """Files cannot grow beyond ``limit`` bytes, which libraries take as they take a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_for_the_state_keeps_the_last_one_and_the_adapter(config):
    config = replace(config, checkpoint_every=2)
    train(replace(config, steps=2))
    folder = Path(config.out) / "run"
    state_file, adapter_file = folder / "state.pt", folder / "adapter_model.safetensors"
    before, adapter = state_file.read_bytes(), adapter_file.read_bytes()
    assert len(before) > 2 * len(adapter)
    with little_space(int(1.5 * len(adapter))), pytest.raises(OSError) as error:
        train(config, resume=True)
    told = str(error.value)
    assert told.startswith(f"{state_file} cannot be written: ")
    assert told.endswith(
        f"The state after step 2 is in {config.out}/run: go on with the same command and --resume."
    )
    assert state_file.read_bytes() == before
    assert adapter_file.read_bytes() != adapter
    assert not [path.name for path in folder.glob("*writing*")]
    assert read_run(f"{config.out}/run.jsonl").end is None
    train(config, resume=True)
    train(replace(config, name="straight"))
    assert_same_run(config, "straight", "run")


def test_no_space_for_the_log_saves_the_weights(config):
    full = []

    def stop(event):
        if event["event"] == "step" and event["optimizer_step"] == 3:
            full.append(little_space(Path(f"{config.out}/run.jsonl").stat().st_size))
            full[0].__enter__()
        elif full and event["event"] == "step":
            full.pop().__exit__(None, None, None)

    with pytest.raises(OSError, match=r"run\.jsonl'\. The state after step 4 is in .*run: go on .*--resume"):
        train(config, on_event=stop)
    assert len(events(config, "step")) == 3 and read_run(f"{config.out}/run.jsonl").end is None
    train(config, resume=True)
    train(replace(config, name="straight"))
    for part in ("weights", "optimizer", "meter"):
        assert_same(state(config, "run")[part], state(config, "straight")[part])


def test_the_state_is_saved_before_the_log_has_its_end(config):
    seen = []

    def saved(event):
        if event["event"] == "end":
            seen.append(state(config)["progress"]["optimizer_steps"])

    train(replace(config, steps=2), on_event=saved)
    assert seen == [2]


@pytest.mark.parametrize("at", ["stage_begins", "step"])
def test_ctrl_c_says_at_once_what_comes(config, at):
    config = replace(config, fast_forward=replace(STAGES, patience=None))
    seen, before = [], signal.getsignal(signal.SIGINT)

    def interrupt(event):
        seen.append(event["event"])
        if event["event"] == "interrupt":
            assert event == {"event": "interrupt", "in_stage": at == "stage_begins", "save": True}
        if event["event"] == at and event["optimizer_step"] == 4:
            signal.raise_signal(signal.SIGINT)

    result = train(config, on_event=interrupt)
    assert result.interrupted and result.optimizer_steps == 4
    assert signal.getsignal(signal.SIGINT) is before
    order = seen[seen.index("stage_begins") :]
    expected = ["stage_begins", "step", "stage", "test", "end"]
    expected.insert(expected.index(at) + 1, "interrupt")
    assert order == expected
    logged = [json.loads(line)["event"] for line in result.log.read_text().splitlines()]
    assert "interrupt" not in logged and "stage_begins" not in logged
