"""What trains besides a LoRA adapter: DoRA, every weight, the attention's weights; and LoRA+."""

from dataclasses import replace

import pytest
import torch

from ffkernels.engine.config import FastForwardConfig
from ffkernels.reporting.recorder import read_run
from ffkernels.training.config import TrainConfig
from ffkernels.training.models import load_model
from ffkernels.training.session import open_session, prepare_task
from ffkernels.training.trainer import train
from ffkernels.validation.loss import ValidationLoss

STAGES = FastForwardConfig(interval=3, max_tau=8)


@pytest.fixture
def config(small, tmp_path):
    return TrainConfig(**{**small, "steps": 6}, out=str(tmp_path))


def test_what_trains(config):
    with open_session(replace(config, method="full")) as session:
        every = {id(p) for p in session.model.parameters()}
        assert {id(p) for p in session.trainable} == every
        assert session.meter.trainable_numel == sum(p.numel() for p in session.model.parameters())
    with open_session(replace(config, method="full-attention")) as session:
        assert session.names == [
            f"gpt_neox.layers.{layer}.attention.{module}.{kind}"
            for layer in (0, 1)
            for module in ("query_key_value", "dense")
            for kind in ("weight", "bias")
        ]
        assert all(p.dtype == torch.float32 for p in session.trainable)
    targets = ("query_key_value",)
    with open_session(replace(config, method="full-attention", targets=targets)) as session:
        assert len(session.names) == 4 and all("query_key_value" in name for name in session.names)
    with pytest.raises(ValueError, match=r"no module named 'nowhere'"):
        open_session(replace(config, method="full-attention", targets=("nowhere",)))


def test_attention_of_an_unknown_family_has_to_be_named(config, monkeypatch):
    monkeypatch.setattr("ffkernels.training.session.attention_targets", lambda model: None)
    with pytest.raises(ValueError, match="name them with targets"):
        open_session(replace(config, method="full-attention"))


@pytest.mark.parametrize(
    "changes",
    [{"method": "full"}, {"method": "full-attention"}, {"optimizer": "lora-plus"}],
    ids=["full", "full-attention", "lora-plus"],
)
def test_it_learns_is_saved_and_resumes_to_the_bit(config, changes):
    config = replace(config, fast_forward=STAGES, **changes)
    straight = train(replace(config, name="straight"))
    train(replace(config, name="parts", steps=4))
    result = train(replace(config, name="parts"), resume=True)
    tests = read_run(str(result.log)).tests
    assert result.test_loss == straight.test_loss < tests[0]["loss"]
    a, b = (torch.load(r.folder / "state.pt", weights_only=True) for r in (straight, result))
    assert a["weights"].keys() == b["weights"].keys()
    assert all(torch.equal(a["weights"][name], b["weights"][name]) for name in a["weights"])
    assert [s.losses for s in straight.stages] == [s.losses for s in result.stages]
    with pytest.raises(ValueError, match=r"(method|optimizer)='(lora|adamw)' \(saved"):
        train(
            replace(config, name="parts", **{key: getattr(TrainConfig(), key) for key in changes}),
            resume=True,
        )

    saved = {path.name for path in result.folder.iterdir()}
    if "method" in changes:  # the folder is a model like any other
        assert not any(name.startswith("adapter") for name in saved)
        model, tokenizer = load_model(str(result.folder))
        with open_session(config) as session:
            test = ValidationLoss(model, prepare_task(config, tokenizer).test, collator=session.collator)
        assert float(test()) == result.test_loss
        assert '"use_cache": true' in (result.folder / "config.json").read_text()
    else:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= saved


def test_a_new_run_replaces_what_the_earlier_one_saved(config):
    folder = train(replace(config, steps=1, method="full")).folder
    assert (folder / "model.safetensors").is_file()
    train(replace(config, steps=1))
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    train(replace(config, steps=1, method="full"))
    assert not (folder / "adapter_model.safetensors").exists()


def test_lora_plus_is_adamw_with_a_higher_rate_for_the_b_matrices(config):
    config = replace(config, optimizer="lora-plus", lora_plus_ratio=8, warmup_steps=4, weight_decay=0.01)
    with open_session(config) as session:
        ids = {id(p): name for name, p in zip(session.names, session.trainable, strict=True)}
        for step, base in ((0, 0.25e-3), (1, 0.5e-3), (5, 1e-3)):
            session.backward(session.load(step))
            session.update(step)
            for group in session.optimizer.param_groups:
                for p in group["params"]:
                    assert group["lr"] == pytest.approx(base * (8 if "lora_B" in ids[id(p)] else 1))
                    assert group["weight_decay"] == 0.01
        held = [id(p) for group in session.optimizer.param_groups for p in group["params"]]
        assert sorted(held) == sorted(ids)


def test_lora_plus_of_ratio_one_is_adamw_to_the_bit(config):
    a = train(replace(config, name="a"))
    b = train(replace(config, name="b", optimizer="lora-plus", lora_plus_ratio=1))
    c = train(replace(config, name="c", optimizer="lora-plus"))
    assert a.test_loss == b.test_loss != c.test_loss


def test_the_evaluations_size_changes_no_loss(config):
    whole, small = (
        train(replace(config, name=name, eval_tokens=tokens, fast_forward=STAGES))
        for name, tokens in (("whole", None), ("small", 20))
    )
    with open_session(replace(config, eval_tokens=20)) as session:
        assert session.test_loss() == pytest.approx(read_run(str(whole.log)).tests[0]["loss"], rel=1e-6)
        assert max(batch.input_ids.numel() for batch in session.test.labelled.micro_batches) <= 20
    assert small.test_loss == pytest.approx(whole.test_loss, rel=1e-5)


def test_attention_implementations(config):
    losses = {}
    for attn in (None, "sdpa", "eager"):
        with open_session(replace(config, attn=attn)) as session:
            losses[attn] = session.test_loss()
            if attn is not None:
                assert session.model.config._attn_implementation == attn
    assert losses["sdpa"] == losses[None] == pytest.approx(losses["eager"], rel=1e-5)


def test_an_attention_that_is_not_installed_is_named(config):
    transformers = pytest.importorskip("transformers")
    if transformers.utils.is_flash_attn_2_available():
        pytest.skip("flash-attn is installed")
    with pytest.raises(RuntimeError, match=r"attn='flash_attention_2' cannot be had .* take 'sdpa'"):
        open_session(replace(config, attn="flash_attention_2"))
