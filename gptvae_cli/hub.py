"""What lies beside `model.safetensors` so that the Hugging Face Hub, its libraries and people can read a run folder.

RUN/config.json      the architecture and the special tokens
RUN/tokenizer.json   the tokenizer, for the `tokenizers` library: it gives the very ids that the model reads
RUN/README.md        the model card

gptvae reads none of them: the header of `model.safetensors` says it all, and it wins where they differ. The folder
may be a user's own, with files of these names in it, and a card wants to be edited: only what gptvae wrote, and nobody
has edited since, is replaced or removed. The first two are known by the model beside them, whose header has their
digests; the card has its own.

Source: https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gptvae_cli.config import TrainConfig, from_dict
from gptvae_cli.errors import GPTVAEError
from gptvae_cli.evaluation import Figures
from gptvae_cli.files import remove_file, write_atomically
from gptvae_cli.header import MODEL_NAME, ModelHeader, read_header

CONFIG_NAME, TOKENIZER_NAME, CARD_NAME = "config.json", "tokenizer.json", "README.md"
COMPANION_NAMES = (CONFIG_NAME, TOKENIZER_NAME, CARD_NAME)
_BOS, _EOS = "<gptvae:bos>", "<gptvae:eos>"
"""What `tokenizers` calls the special tokens. They are no entries of the vocabulary, so no text can spell one."""
_SIGNATURE = re.compile(r"<!-- gptvae keeps this page up to date until it is edited \((\w+)\) -->\n?\Z")
_UNITS = {
    "line": "a line",
    "paragraph": "a paragraph (lines without a blank one between them)",
    "file": "a file",
    "window": "a window of a running text",
}
_WAYS = {"token": "a token before the text", "bos": "added to the first token, BOS"}


# The folder -----------------------------------------------------------------------------------------------------------


def with_digests(header: ModelHeader) -> ModelHeader:
    """A header by which `config.json` and `tokenizer.json` beside the model are known again, also by a later gptvae
    that writes them otherwise."""
    digests = {CONFIG_NAME: _digest(config_json(header)), TOKENIZER_NAME: _digest(tokenizer_json(header))}
    return replace(header, training={**header.training, "companions": digests})


def write_companions(folder: Path, header: ModelHeader, foreign: Sequence[str], *, parameters: int) -> None:
    """Writes these files, each in one step, but for those that are somebody else's.

    Args:
        header: of the model that lies there, `with_digests`.
        foreign: the `foreign_companions` of the model that lay there before.

    Raises:
        GPTVAEError: where one cannot be written; one that was there is unchanged.
    """
    contents = {
        CONFIG_NAME: config_json(header),
        TOKENIZER_NAME: tokenizer_json(header),
        CARD_NAME: model_card(header, parameters=parameters),
    }
    for name, content in contents.items():
        if name not in foreign:
            _write(folder / name, content)


def remove_companions(folder: Path) -> None:
    """Removes those of these files that gptvae wrote."""
    foreign = foreign_companions(folder)
    for name in COMPANION_NAMES:
        if name not in foreign:
            remove_file(folder / name)


def foreign_companions(folder: Path) -> list[str]:
    """The names of these files under which there is something that is not ours, or no longer."""
    try:
        header = read_header(folder / MODEL_NAME)
    except GPTVAEError:
        header = None
    return [name for name in COMPANION_NAMES if (folder / name).exists() and not _is_ours(folder / name, header)]


def _write(path: Path, content: str) -> None:
    write_atomically(path, lambda new: new.write_bytes(content.encode("utf-8")))


def _is_ours(path: Path, header: ModelHeader | None) -> bool:
    """Whether a file is what gptvae wrote beside the model with this header."""
    try:
        text = path.read_text("utf-8")
    except (OSError, ValueError):
        return False
    if path.name == CARD_NAME:
        signature = _SIGNATURE.search(text)
        return signature is not None and signature[1] == _digest(text[: signature.start()])
    digests = None if header is None else header.training.get("companions")
    return isinstance(digests, dict) and digests.get(path.name) == _digest(text)


# The files ------------------------------------------------------------------------------------------------------------


def config_json(header: ModelHeader) -> str:
    """The architecture, under the names of `ModelConfig` and, where the Hub has other names, under those as well.

    Nothing of the corpus is in it: a file that is published should not tell where its author keeps texts.
    """
    model = header.model
    values = {
        "model_type": "gptvae",
        "architectures": ["GPTVAE"],
        "gptvae_version": header.training["gptvae"],
        "format_version": header.format_version,
        "unit": header.data.unit,
        **asdict(model),
        "vocab_size": model.num_tokens,
        "max_position_embeddings": model.max_seq_len,
        "pad_token_id": model.pad_id,
        "bos_token_id": model.bos_id,
        "eos_token_id": model.eos_id,
    }
    return json.dumps(values, indent=2) + "\n"


def tokenizer_json(header: ModelHeader) -> str:
    """The tokenizer with a post-processor that puts BOS and EOS around a text, or BOS alone around a window.

    `tokenizers.Tokenizer.from_file(...).encode(text).ids` is what the model reads of a text that is not too long.
    """
    values = json.loads(header.tokenizer)
    bos, eos = ({"SpecialToken": {"id": name, "type_id": 0}} for name in (_BOS, _EOS))
    single, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = [] if header.data.unit == "window" else [eos]
    ids = {_BOS: header.model.bos_id, _EOS: header.model.eos_id}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, single, *end],
        "pair": [bos, single, *end, bos, second, *end],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ids.items()},
    }
    return json.dumps(values, ensure_ascii=False, indent=2) + "\n"


def model_card(header: ModelHeader, *, parameters: int) -> str:
    """The page that the Hub shows: numbers only, neither text nor names nor paths of the corpus."""
    model, training = header.model, header.training
    verdict = training["verdict"]
    summary = f"{verdict[0].upper()}{verdict[1:]}.\n\n" if verdict else ""
    page = f"""---
library_name: gptvae
pipeline_tag: text-generation
tags:
- gptvae
- vae
- text-generation
---

# A GPT with a Gaussian latent

An encoder turns a text, here {_UNITS[header.data.unit]}, into a latent of {model.dim_latent} numbers; a decoder writes
texts from latents.

{summary}## How to use it

With gptvae {training["gptvae"]} or newer, and this folder as `FOLDER`:

```
gptvae encode texts.txt --model FOLDER > z.npy
gptvae generate --latent z.npy --model FOLDER
gptvae interpolate --from "one text" --to "another" --model FOLDER
```

```python
from gptvae_cli import load

model = load("FOLDER")
z = model.encode(["one text", "another"])
texts = model.generate(z)
```

`model.safetensors` alone is the model. `config.json` and `tokenizer.json` repeat parts of its header for other
programs.

## Sizes

{_table(_sizes(header, parameters))}
## Training

{_table(_training(header))}
"""
    if training["validation"] is not None:
        page += f"## On held-out texts\n\n{_validation(training)}\n"
    return f"{page}<!-- gptvae keeps this page up to date until it is edited ({_digest(page)}) -->\n"


def _sizes(header: ModelHeader, parameters: int) -> Iterator[tuple[str, str]]:
    model = header.model
    yield "parameters", f"{parameters:,}"
    yield "layers", f"{model.enc_depth} in the encoder, {model.depth} in the decoder"
    yield "width", f"{model.dim:,}, {model.heads} heads of {model.attn_dim_head}"
    yield "latent", f"{model.dim_latent:,} dimensions, {_WAYS[model.conditioning]}"
    yield "vocabulary", f"{model.num_tokens:,} tokens, 3 special ones among them"
    yield "longest text", f"{model.max_seq_len:,} tokens, 2 special ones among them"


def _training(header: ModelHeader) -> Iterator[tuple[str, str]]:
    training = header.training
    config, corpus = from_dict(TrainConfig, training["train"]), training["corpus"]
    treatment = training["treatment"]
    held_out = "among them" if header.data.valid_file is None else "in a file of their own"
    yield "corpus", f"{corpus['texts']:,} texts of {corpus['characters']:,} characters, held-out ones {held_out}"
    yield "objective", f"{config.objective}, beta {config.vae_kl_loss_weight:g}"
    yield "free bits", f"{config.target_rate:g} nats per text, {config.vae_kl_div_floor:g} nats per dimension"
    if treatment is not None:
        yield "treatment, as the latent was not being used", treatment
    yield "latent dropout", f"{config.latents_dropout_prob:g}"
    yield (
        "steps",
        f"{training['steps']:,} of {config.batch_tokens:,} tokens with padding, {training['epochs']:,g} epochs",
    )
    yield "time", f"{training['seconds']:,.0f} s on {training['device']}, {training['precision']}"
    yield "learning rate, seed", f"{training['learning_rate']:.2g}, {config.seed}"


def _validation(training: Mapping[str, Any]) -> str:
    config, figures = from_dict(TrainConfig, training["train"]), Figures(**training["validation"])
    intro = f"{figures.texts:,} texts of {figures.tokens:,} tokens, the ends of texts counted"
    if config.without_latent:
        rows = [("cross-entropy without a latent", f"{figures.cross_entropy_without:.2f} nats/text")]
        return f"{intro}.\n\n{_table(rows)}"
    rows = [
        ("NLL, bound: cross-entropy + KL", f"{figures.nll_bound:.2f} nats/text"),
        ("cross-entropy with the text's own latent", f"{figures.cross_entropy:.2f} nats/text"),
        ("cross-entropy with another text's latent", f"{figures.cross_entropy_shuffled:.2f} nats/text"),
        ("cross-entropy without a latent", f"{figures.cross_entropy_without:.2f} nats/text"),
        ("KL", f"{figures.kl:.2f} nats/text"),
        ("information", f"{figures.mutual_information:.2f} nats/text, of at most {figures.entropy:.2f}"),
        ("active dimensions", f"{figures.active_001}, {figures.active_02} strongly"),
    ]
    return f"{intro}; one sample of each posterior, seed {config.seed}.\n\n{_table(rows)}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "".join(["| | |\n|---|---|\n", *(f"| {name} | {value} |\n" for name, value in rows)])


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]
