"""Decoders and tokenizers from wherever `transformers` can load them: a folder, a hub name, a GGUF file, a
package.

A decoder here is the bare stack of layers: no language-model head is ever built.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hllm.errors import ConfigError
from hllm.models.common.settings import Decoder

PACKAGE = "package:"
BLOCKS, BLOCK = 16, 1 << 16
FORMS = "A backbone is a local folder, a reachable hub name, a .gguf file, or package:NAME/FILE."


@dataclass(frozen=True)
class Source:
    """Where a backbone is loaded from: what `from_pretrained` takes."""

    name: str
    gguf_file: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Never code from a model's folder, whatever its configuration asks for."""
        found: dict[str, Any] = {"trust_remote_code": False}
        return found | ({"gguf_file": self.gguf_file} if self.gguf_file else {})

    @property
    def files(self) -> list[Path]:
        """The backbone's files where it is a local file or folder; nothing for a hub name."""
        if self.gguf_file:
            return [Path(self.name) / self.gguf_file]
        return sorted(path for path in Path(self.name).glob("*") if path.is_file())


def find(backbone: str) -> Source:
    """The source that a setting names.

    Raises:
        ConfigError: the package or the file is not there.
    """
    if backbone.startswith(PACKAGE):
        package, _, inside = backbone.removeprefix(PACKAGE).partition("/")
        if not package or not inside:
            raise ConfigError(
                "is not of the form package:NAME/FILE", where=f"backbone {backbone}", remedy=FORMS
            )
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # of a dotted name, the part before the dot
            spec = None
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"the Python package {package} is not installed",
                where="backbone",
                remedy=f"Install it, or change the setting. {FORMS}",
            )
        backbone = str(Path(spec.submodule_search_locations[0]) / inside)
    if backbone.endswith(".gguf"):
        path = Path(backbone)
        if not path.is_file():
            raise ConfigError(
                "no such file", where=f"backbone {backbone}", remedy=f"Looked in {path.resolve()}."
            )
        return Source(str(path.parent), path.name)
    return Source(backbone)


def fingerprint(backbone: str) -> str:
    """What a backbone is known by, so that other weights under the same name are other weights: every local
    file's name, size and sixteen blocks of its content. A hub name is known by its name alone."""
    if not backbone:
        return ""
    digest = hashlib.sha256(backbone.encode())
    for path in find(backbone).files:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for part in range(BLOCKS):
                file.seek(max(size - BLOCK, 0) * part // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


READ_RIGHT = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "bert")
"""Families that tests compare with their own library. The attention of others may see neighbouring texts or
coming events, or they have dropout of their own: refused rather than read a little wrongly."""
TESTED = "Llama, Mistral, Qwen 2 and 3, Gemma 3 and SmolLM2 are tested, and BERT (MiniLM) as the Item tower."

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "hidden_dropout")
"""What families call it in their configurations."""


class ByteTokenizer:
    """UTF-8 bytes, for decoders that start from nothing."""

    vocabulary = 256
    frame: tuple[list[int], list[int]] = ([], [])

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("utf-8", errors="replace")) for text in texts]


class PretrainedTokenizer:
    """The tokenizer that belongs to a backbone, without any special tokens added."""

    def __init__(self, source: Source) -> None:
        from transformers import AutoTokenizer

        with _plain_errors(source):
            self._tokenizer = AutoTokenizer.from_pretrained(source.name, **source.arguments)
        self.vocabulary = len(self._tokenizer)
        first, last = self._tokenizer.cls_token_id, self._tokenizer.sep_token_id
        self.frame = ([first], [last]) if first is not None and last is not None else ([], [])
        """What an encoder wants around every text ([CLS], [SEP]); decoders want nothing."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        found = self._tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # "[SEP]" in a title is what somebody wrote, and means nothing
            return_attention_mask=False,
            verbose=False,
        )
        return found["input_ids"]


def tokenizer_for(backbone: str) -> ByteTokenizer | PretrainedTokenizer:
    """The tokenizer of a backbone; bytes when no backbone is named."""
    if not backbone:
        return ByteTokenizer()
    require_readable(backbone, weights=False, tokenizer=True)
    return PretrainedTokenizer(find(backbone))


def build_decoder(settings: Decoder, vocabulary: int) -> Any:
    """A decoder stack (for items also an encoder: HLLM, table 5) with its word embeddings, pretrained if the
    settings say so (table 2), cut to its first layers.

    Returns a `transformers` model whose attention understands packed sequences
    (`hllm.models.common.packing`).

    Raises:
        ConfigError: the backbone is not there, or of a family that no test reads.
    """
    if not settings.backbone:
        return _empty(random_config(settings, vocabulary))
    source = find(settings.backbone)
    config = require_readable(settings.backbone, weights=settings.pretrained)
    if not settings.pretrained:
        config.num_hidden_layers = _layers(settings, config)
        return _empty(config)
    whole = load_whole(source)
    config = type(whole.config).from_dict(whole.config.to_dict())
    config.num_hidden_layers = _layers(settings, config)
    decoder = _empty(config)
    wanted = decoder.state_dict()
    weights = {name: value for name, value in whole.state_dict().items() if name in wanted}
    missing = wanted.keys() - weights.keys()
    if missing:
        raise ConfigError(
            "the backbone lacks weights of its own shape", where=settings.backbone, examples=sorted(missing)
        )
    decoder.load_state_dict(weights)
    return decoder


def sees_ahead(decoder: Any) -> bool:
    """Whether it is an encoder: positions see what comes after them."""
    return any(getattr(module, "is_causal", True) is False for module in decoder.modules())


def layers_of(decoder: Any) -> Any:
    """The stack of layers of a decoder, or of BERT."""
    return decoder.encoder.layer if hasattr(decoder, "encoder") else decoder.layers


def compile_layers(decoder: Any, backend: Any = "inductor") -> None:
    """Let `torch.compile` make one program of each layer's work on single positions, for any number of them.
    Attention stays as it is: where sequences end is different in every batch."""
    import torch
    from transformers import AttentionInterface

    from hllm.models.common.packing import attend_within_sequences, packed_attention

    apart = torch.compiler.disable(attend_within_sequences)
    AttentionInterface.register(packed_attention(), apart)
    for layer in layers_of(decoder):
        layer.compile(dynamic=True, backend=backend)


def word_vectors(decoder: Any) -> Any:
    """(V, D) the word embeddings as the decoder's first layer receives them: some families (Gemma) scale
    them on the way, which a decoder fed with vectors does not do."""
    embeddings = decoder.get_input_embeddings()
    return embeddings.weight.detach() * getattr(embeddings, "embed_scale", 1.0)


@cache
def load_whole(source: Source) -> Any:
    """The backbone with all layers, loaded once per process (both towers usually share it)."""
    import torch
    from transformers import AutoModel

    with _plain_errors(source), _quiet():
        whole = AutoModel.from_pretrained(
            source.name,
            dtype=torch.float32,
            # Left to itself, transformers falls back on pickles.
            use_safetensors=None if source.gguf_file else True,
            **source.arguments,
        )
    return getattr(whole, "language_model", whole)  # of a model that also sees (Gemma 3 from 4B on)


def shape_of(source: Source) -> Any:
    """The backbone's configuration without its weights."""
    from transformers import AutoConfig

    with _plain_errors(source), _quiet():
        return AutoConfig.from_pretrained(source.name, **source.arguments).get_text_config()


def require_readable(backbone: str, weights: bool = True, tokenizer: bool = False) -> Any:
    """The configuration of a backbone that a training would take. `hllm doctor`, `prepare` and `train` ask
    the same: what one of them refuses, none calls good. `weights`, `tokenizer`: whether these are needed.

    Raises:
        ConfigError: its family is not read, its files are damaged, pickles or of a newer kind, or its
            tokenizer knows tokens that the model has no embedding for.
    """
    source, where = find(backbone), f"backbone {backbone}"
    config = shape_of(source)
    if config.model_type not in READ_RIGHT:
        raise ConfigError(
            f"nobody has checked that {config.model_type} is read as its own library reads it",
            where=where,
            remedy=TESTED,
        )
    if weights and not source.gguf_file and Path(source.name).is_dir():
        _require_weights(Path(source.name))
    known = PretrainedTokenizer(source).vocabulary if tokenizer else 0
    if known > config.vocab_size:
        raise ConfigError(
            f"its tokenizer knows {known:,} tokens, its model has embeddings of {config.vocab_size:,}",
            where=where,
            remedy="Take the tokenizer that belongs to the model.",
        )
    return config


def _require_weights(folder: Path) -> None:
    """The headers of all weights can be read: half a file and a pointer to one cannot."""
    from safetensors import SafetensorError, safe_open

    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickles = [path.name for path in folder.glob("*.bin")]
        raise ConfigError(
            "its weights are pickles, which are not read" if pickles else "there are no weights in it",
            where=f"backbone {folder}",
            examples=pickles,
            remedy="Save it with transformers' save_pretrained, which writes safetensors.",
        )
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as file:
                file.keys()
        except (SafetensorError, OSError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"is no whole safetensors file: {said}",
                where=str(path),
                remedy="Copy it again (half a copy, or a Git LFS pointer: `git lfs pull`).",
            ) from None


def random_config(settings: Decoder, vocabulary: int) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.width * 4,
        num_hidden_layers=settings.layers or 2,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=2048,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )


def decoder_from_config(config: dict[str, Any]) -> Any:
    """The empty shell of a saved decoder, to be filled with saved weights."""
    from transformers import AutoConfig

    values = {name: value for name, value in config.items() if not name.endswith("_token_id")}
    # A family's own defaults may lie beyond a vocabulary that is cut to what the user model needs: none.
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return _empty(AutoConfig.for_model(values.pop("model_type"), **values, **none))


def _empty(config: Any) -> Any:
    """A random model of this shape, without head and pooler, whose attention understands packed sequences."""
    import torch
    from transformers import AutoModel

    from hllm.models.common.packing import packed_attention

    model = AutoModel.from_config(_cut(config), attn_implementation=packed_attention(), dtype=torch.float32)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def _layers(settings: Decoder, config: Any) -> int:
    """How many layers are kept."""
    if settings.layers > config.num_hidden_layers:
        raise ConfigError(
            f"asks for {settings.layers} layers of {config.num_hidden_layers}", where="model.*.layers"
        )
    return settings.layers or int(config.num_hidden_layers)


def _cut(config: Any) -> Any:
    """A configuration without quantisation (weights are plain), with per-layer lists as long as the stack,
    and without dropout of its own (BERT has some): an item must be the same vector while it is trained,
    remembered, cached and served. `hllm.dropout` is the User LLM's, and put where it says."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    for name in DROPOUTS:
        if getattr(config, name, None):
            setattr(config, name, 0.0)
    config.use_cache = False
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None  # nothing is padded or generated
    return config


@contextlib.contextmanager
def _plain_errors(source: Source):  # type: ignore[no-untyped-def]
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(
            f"transformers cannot load it: {str(error).splitlines()[0]}",
            where=f"backbone {source.name}",
            remedy=FORMS,
        ) from None


@contextlib.contextmanager
def _quiet():  # type: ignore[no-untyped-def]
    """transformers draws progress bars and warns of the head we do not want."""
    from transformers.utils import logging as library

    level = logging.getLogger("transformers").level
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        logging.getLogger("transformers").setLevel(level)


def plain_config(config: Any) -> dict[str, Any]:
    """The shape of a decoder as plain values; the vocabulary's size is that of the saved words."""
    values = config.to_diff_dict()
    values["model_type"] = config.model_type
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and name not in ("architectures", "dtype", "torch_dtype")
    }
