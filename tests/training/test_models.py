"""The embedded model is the one that was trained; adapters sit where they should, fp32, fixed by the seed."""

import json
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from ffkernels.training.models import (
    EMBEDDED,
    add_adapter,
    attention_targets,
    load_model,
    load_tokenizer,
    train_weights,
)
from ffkernels.training.tokenizer import ByteTokenizer

SENTENCE = "It was a bright morning, and she walked to the village with her sister."


def loss_on(model, tokenizer, text):
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def random_model(kind, **sizes):
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config)


LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@given(st.text())
@example("a\ud800b")  # a lone surrogate
def test_bytes_decode_to_the_text_they_encode(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8", "surrogatepass"))
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.long)) == text


def test_special_tokens():
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (256, 257, 258)
    assert len(tokenizer) == 258
    assert tokenizer.encode("é", add_special_tokens=True) == [0xC3, 0xA9, 257]
    assert tokenizer.decode([104, 105, 257, 256]) == "hi"
    assert tokenizer.decode([104, 105, 257, 256], skip_special_tokens=False) == "hi<eos><pad>"
    assert tokenizer.decode([0xC3]) == "\ufffd"  # a character cut in half
    with pytest.raises(ValueError, match=r"258 .* 0 … 257"):
        tokenizer.decode([258])
    with pytest.raises(TypeError, match="not list"):
        tokenizer.encode(["a"])


def test_the_embedded_model_has_learnt_english_and_no_python():
    model, tokenizer = load_model("tiny")
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 859_392
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == tokenizer.vocab_size
    assert loss_on(model, tokenizer, SENTENCE) == pytest.approx(1.1518, abs=2e-3)
    assert loss_on(model, tokenizer, "def _is_valid(self, **kwargs):\n    if not self._x:\n") > 3.0


def test_plain_transformers_loads_the_same_weights():
    ours, _ = load_model("tiny")
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(EMBEDDED["tiny"], dtype=torch.float32)
    states = ours.state_dict(), theirs.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_the_weights_fit_in_the_package():
    assert (EMBEDDED["tiny"] / "model.safetensors").stat().st_size <= 4 * 2**20
    config = json.loads((EMBEDDED["tiny"] / "config.json").read_text())
    assert "transformers_version" not in config


def test_dtype_and_attention_are_as_asked():
    for dtype in (torch.bfloat16, "bfloat16"):
        model, _ = load_model("tiny", dtype=dtype, attn="eager")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.config._attn_implementation == "eager"
    for wrong in ("int8", "nonsense", 16):
        with pytest.raises(ValueError, match="dtype="):
            load_model("tiny", dtype=wrong)


def test_a_saved_copy_loads_from_its_directory(tmp_path):
    model, _ = load_model("tiny")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.5)
    model.save_pretrained(tmp_path)
    again, tokenizer = load_model(str(tmp_path))
    assert isinstance(tokenizer, ByteTokenizer)
    assert torch.equal(again.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_what_cannot_be_loaded_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_model(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"(?s)/no/such/model.*\(tiny\).*name its directory"):
        load_model("/no/such/model")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_adapter_sits_on_every_attention_projection(method):
    model, tokenizer = load_model("tiny")
    before = loss_on(model, tokenizer, SENTENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = add_adapter(model, method=method, rank=8, alpha=16, seed=0)
    names = trainable(adapted)
    assert {name.split(".lora_")[0].split("gpt_neox.")[1] for name in names} == {
        f"layers.{layer}.attention.{target}" for layer in range(4) for target in ("query_key_value", "dense")
    }
    # Per layer 8·(128 + 384) and 8·(128 + 128); DoRA adds a magnitude per output.
    expected = 4 * 8 * (512 + 256) + (4 * (384 + 128) if method == "dora" else 0)
    assert sum(p.numel() for p in names.values()) == expected
    assert loss_on(adapted, tokenizer, SENTENCE) == pytest.approx(before, abs=1e-5)  # B is zero at first


def test_adapters_of_a_16_bit_base_are_fp32():
    model, _ = load_model("tiny", dtype="bfloat16")
    for method in ("lora", "dora"):
        adapted = add_adapter(model, method=method, seed=0)
        assert {p.dtype for p in trainable(adapted).values()} == {torch.float32}
        frozen = {p.dtype for p in adapted.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16}
        model = adapted.unload()


def test_the_seed_fixes_the_adapter_and_touches_nothing_else():
    def adapter(seed):
        return trainable(add_adapter(load_model("tiny")[0], seed=seed))

    torch.manual_seed(5)
    first = adapter(3)
    drawn = torch.rand(4)
    second, other = adapter(3), adapter(4)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(4))
    # Without a seed the global generator decides.
    torch.manual_seed(3)
    third = trainable(add_adapter(load_model("tiny")[0]))
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_targets_by_architecture():
    assert attention_targets(random_model("Llama", **LLAMA)) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    gpt2 = random_model("GPT2", n_embd=32, n_layer=1, n_head=2)
    assert attention_targets(gpt2) is None
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        adapted = add_adapter(gpt2, seed=0)  # PEFT's own default
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(adapted)} == {"c_attn"}
    llama = add_adapter(random_model("Llama", **LLAMA), targets=["down_proj"], seed=0)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(llama)} == {"down_proj"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(method="qlora"), r"method='qlora'; allowed are lora, dora"),
        (dict(rank=0), r"rank=0"),
        (dict(rank=2.5), r"rank=2\.5"),
        (dict(alpha=0), r"alpha=0"),
        (dict(dropout=1.0), r"dropout=1\.0"),
        (dict(targets=["q_proj"]), r"q_proj.*Linear modules.*query_key_value"),
        (
            dict(targets=["dense", "query_key"]),
            r"no module named 'query_key'\. Linear modules.*query_key_value",
        ),
        (dict(targets="nothing.*"), r"PEFT could not place.*nothing.*Linear modules.*query_key_value"),
    ],
)
def test_wrong_adapters_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        add_adapter(load_model("tiny")[0], **wrong)


def test_a_target_may_be_a_longer_suffix():
    adapted = add_adapter(load_model("tiny")[0], targets=["0.attention.dense", "query_key_value"], seed=0)
    dense = [n for n, p in adapted.named_parameters() if "attention.dense.lora_A" in n]
    assert len(dense) == 1 and ".layers.0." in dense[0]


def test_offline_it_is_said_why_the_hub_was_not_asked(monkeypatch):
    monkeypatch.setattr("ffkernels.training.models.require", _without_network)
    for load in (load_model, load_tokenizer):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(RuntimeError, match=r"model 'some/model' could not .* HF_HUB_OFFLINE is set"):
            load("some/model")
        monkeypatch.delenv("HF_HUB_OFFLINE")
        with pytest.raises(RuntimeError, match=r"check the spelling.*name its directory"):
            load("some/model")


def _without_network(package):
    """transformers, but for what would ask the network."""
    real = __import__(package)

    class Unreachable:
        @staticmethod
        def from_pretrained(*args, **options):
            raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    names = {"AutoModelForCausalLM": Unreachable, "AutoConfig": Unreachable, "utils": real.utils}
    return SimpleNamespace(**names)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "nonesuch"}, "is there, but transformers .*`nonesuch`"),
        ({}, "is there, but transformers .*`model_type`"),
        ({"model_type": "t5"}, "is there, but transformers .*T5Config"),
        ({"model_type": "llama", **LLAMA}, "this directory cannot be loaded .*model.safetensors"),
    ],
)
def test_a_directory_that_is_no_causal_language_model_is_named(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(RuntimeError, match=message):
        load_model(str(tmp_path))


def test_a_damaged_file_of_weights_is_named(tmp_path):
    shutil.copytree(EMBEDDED["tiny"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(RuntimeError, match=r"is there, but transformers .*header"):
        load_model(str(tmp_path))


def test_a_tokenizer_without_its_model():
    assert load_tokenizer("tiny").encode("ab") == [97, 98]
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_tokenizer(str(Path(__file__).parent))


def test_all_weights_train_or_those_of_the_named_modules():
    model, _ = load_model("tiny")
    assert all(p.requires_grad for p in train_weights(model).parameters())
    train_weights(model, ["dense"])
    training = [name for name, p in model.named_parameters() if p.requires_grad]
    assert training and all(".attention.dense." in name for name in training)
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        train_weights(model, ["dense", "nowhere"])
