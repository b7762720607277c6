"""The files beside the model: what they say, that they are never believed, and whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from typer.testing import CliRunner

from gptvae_cli.checkpoint import load, save_model
from gptvae_cli.cli.app import app
from gptvae_cli.config import DataConfig, ModelConfig, TrainConfig, from_dict
from gptvae_cli.doctor import verdict
from gptvae_cli.errors import GPTVAEError
from gptvae_cli.evaluation import Figures
from gptvae_cli.header import FORMAT_VERSION, ModelHeader, read_header
from gptvae_cli.hub import (
    config_json,
    foreign_companions,
    model_card,
    remove_companions,
    tokenizer_json,
    with_digests,
    write_companions,
)
from gptvae_cli.model import GPTVAE
from gptvae_cli.sampling import Encoder
from gptvae_cli.tokenizer import Tokenizer
from tests.conftest import LINES
from tests.test_run import FIGURES, TINY, begin, finish, go_on, names

NAMES = {"config.json", "tokenizer.json", "README.md"}
TEXTS = [
    "",
    "cat number 7",
    "naïve 日本 😀",
    "<gptvae:bos>",
    "a <gptvae:eos> b",
    "<|endoftext|> [CLS] <unk>",
    " two  spaces ",
]

pytestmark = pytest.mark.usefixtures("one_thread")


def words() -> Tokenizer:
    """A user's own: words, with special tokens and a post-processor that a model of ours has no use for."""
    vocab = {"[UNK]": 0, "[CLS]": 1, "cat": 2, "number": 3, "7": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[CLS]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", 1)]
    )
    return Tokenizer.from_json(tokenizer.to_str())


def header(
    tokenizer: Tokenizer | None = None, *, unit: str = "line", figures: Figures | None = FIGURES, **train: Any
) -> ModelHeader:
    """Of a model that nobody trained."""
    tokenizer = tokenizer or Tokenizer.bytes()
    specials: dict[str, Any] = {"pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    model = ModelConfig(num_tokens=tokenizer.num_tokens, max_seq_len=24, conditioning="token", **TINY, **specials)
    training = {
        "gptvae": "0.1.0",
        "torch": "2",
        "train": asdict(TrainConfig(**train)),
        "learning_rate": 0.002,
        "device": "cpu",
        "precision": "float32",
        "corpus": {
            "texts": 1234,
            "empty": 0,
            "characters": 56789,
            "digest": "d",
            "tokenizer_reason": "read from /home/me/t",
        },
        "steps": 4321,
        "epochs": 1.25,
        "seconds": 598.7,
        "tokens_seen": 999,
        "validation": None if figures is None else asdict(figures),
        "treatment": None,
        "verdict": None if figures is None else "the latent carries 3.2 nats",
    }
    data = from_dict(DataConfig, {"unit": unit, "valid": "/home/me/valid.txt", "tokenizer": "/home/me/t.json"})
    return ModelHeader(FORMAT_VERSION, model, data, tokenizer.to_json(), training)


# tokenizer.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["line", "window"])
@pytest.mark.parametrize(
    "kind", [Tokenizer.bytes, lambda: Tokenizer.train_bpe(LINES, 300), words], ids=["bytes", "bpe", "words"]
)
def test_the_tokenizers_library_gives_what_the_model_reads(kind: Callable[[], Tokenizer], unit: str) -> None:
    """The special tokens are in the post-processor and not in the vocabulary, where a text could spell them."""
    ours = kind()
    theirs = tokenizers.Tokenizer.from_str(tokenizer_json(header(ours, unit=unit)))
    for text in TEXTS:
        ids = ours.encode_batch([text])[0]
        end = [ours.eos_id] if unit == "line" else []
        assert theirs.encode(text).ids == [ours.bos_id, *ids, *end], text
        assert theirs.encode(text, add_special_tokens=False).ids == ids
        assert theirs.decode(theirs.encode(text).ids, skip_special_tokens=False) == ours.decode(ids)
    assert theirs.get_vocab_size() == ours.num_tokens - 3


@pytest.mark.parametrize("unit", ["line", "window"])
def test_the_file_of_a_run_gives_what_its_model_reads(folder: Path, corpus: str, unit: str) -> None:
    finish(begin(folder, [corpus], data={"unit": unit}), until=1)
    encoder = Encoder(load(folder / "model.safetensors", device=torch.device("cpu")), unit)  # type: ignore[arg-type]
    read = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert [read.encode(text).ids for text in LINES[:5]] == list(encoder.rows(LINES[:5]))


def test_a_model_may_be_trained_with_the_tokenizer_of_another() -> None:
    ours = Tokenizer.train_bpe(LINES, 300)
    again = Tokenizer.from_json(tokenizer_json(header(ours)))
    assert json.loads(again.to_json()) == json.loads(ours.to_json())


# config.json ----------------------------------------------------------------------------------------------------------


def test_the_configuration_has_our_names_and_those_of_the_hub() -> None:
    values = json.loads(config_json(header()))
    model = header().model
    assert values["model_type"] == "gptvae"
    assert {name: values[name] for name in asdict(model)} == asdict(model)
    assert (values["pad_token_id"], values["bos_token_id"], values["eos_token_id"]) == (256, 257, 258)
    assert (values["vocab_size"], values["max_position_embeddings"]) == (259, 24)


# README.md ------------------------------------------------------------------------------------------------------------


def test_the_card_is_one_that_the_hub_reads() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="it reads the front matter")
    card = hub.ModelCard(model_card(header(), parameters=1))
    data = card.data.to_dict()
    assert data["library_name"] == "gptvae"
    assert data["pipeline_tag"] == "text-generation"
    assert {"gptvae", "vae"} <= set(data["tags"])
    assert "license" not in data, "only the author can say which"
    assert card.text.lstrip().startswith("# A GPT with a Gaussian latent\n")


def test_the_card_says_whether_held_out_texts_are_among_the_others() -> None:
    file, share = header(), replace(header(), data=DataConfig(valid="0.1"))
    pages = [model_card(each, parameters=1) for each in (file, share)]
    assert ["held-out ones among them" in page for page in pages] == [False, True]


def test_the_card_says_every_figure_with_its_unit() -> None:
    page = model_card(header(target_rate=6.0, seed=3), parameters=1_966_912)
    for part in (
        "into a latent of 8 numbers",
        "The latent carries 3.2 nats.\n",
        "| parameters | 1,966,912 |",
        "| layers | 1 in the encoder, 1 in the decoder |",
        "| longest text | 24 tokens, 2 special ones among them |",
        "| corpus | 1,234 texts of 56,789 characters, held-out ones in a file of their own |",
        "| objective | elbo, beta 1 |",
        "| free bits | 6 nats per text, 0 nats per dimension |",
        "| steps | 4,321 of 2,048 tokens with padding, 1.25 epochs |",
        "| time | 599 s on cpu, float32 |",
        "100 texts of 1,000 tokens, the ends of texts counted; one sample of each posterior, seed 3.",
        "| NLL, bound: cross-entropy + KL | 25.00 nats/text |",
        "| cross-entropy with another text's latent | 25.00 nats/text |",
        "| cross-entropy without a latent | 24.50 nats/text |",
        "| KL | 5.00 nats/text |",
        "| information | 3.20 nats/text, of at most 4.61 |",
        "| active dimensions | 8, 4 strongly |",
    ):
        assert part in page, part
    assert "On held-out texts" not in model_card(header(figures=None), parameters=1)
    baseline = model_card(header(latents_dropout_prob=1.0), parameters=1)
    assert "| cross-entropy without a latent | 24.50 nats/text |" in baseline
    assert "information" not in baseline, "it never learnt what a latent is"


def test_nothing_private_is_in_what_people_publish(folder: Path, corpus: str, tmp_path: Path) -> None:
    """Neither where the corpus lies nor what it says (of which a trained tokenizer would hold words)."""
    (tmp_path / "bytes.json").write_text(Tokenizer.bytes().to_json())
    (tmp_path / "valid.txt").write_text("cat number 700\n")
    data = {"valid": str(tmp_path / "valid.txt"), "tokenizer": str(tmp_path / "bytes.json"), "field": "diagnosis"}
    finish(begin(folder, [corpus], data=data))
    for name in NAMES:
        text = (folder / name).read_text()
        for private in (str(tmp_path), "corpus.txt", "valid.txt", "bytes.json", "diagnosis", "cat number", "a bird"):
            assert private not in text, f"{private} is in {name}"


def test_the_card_is_that_of_the_model_beside_it(folder: Path, corpus: str) -> None:
    job = finish(begin(folder, [corpus]))
    found = read_header(folder / "model.safetensors")
    page = (folder / "README.md").read_text()
    assert job.figures is not None
    assert f"| KL | {job.figures.kl:.2f} nats/text |" in page
    assert f"| steps | {found.training['steps']:,} of 256 tokens" in page
    count = sum(p.numel() for p in job.learner.model.parameters())
    assert f"| parameters | {count:,} |" in page
    assert f"{verdict(job.figures, job.learner.config)[1:]}.\n" in page
    assert json.loads((folder / "config.json").read_text())["dim_latent"] == 8


# The header wins, and a folder needs no more --------------------------------------------------------------------------


def test_a_downloaded_folder_is_a_model_whatever_lies_beside_it(folder: Path, corpus: str, tmp_path: Path) -> None:
    """The Hub's cache has links to the files; neither states nor logs nor the corpus come along."""
    finish(begin(folder, [corpus]), until=2)
    download = tmp_path / "download"
    download.mkdir()
    for name in (*NAMES, "model.safetensors"):
        (download / name).symlink_to(folder / name)

    def generated(model: Path) -> str:
        options = ["--text", "cat", "--seed", "1", "-n", "3", "--device", "cpu", "--model", str(model)]
        result = CliRunner().invoke(app, ["generate", *options])
        assert result.exit_code == 0, result.stderr
        return result.stdout

    expected = generated(folder / "model.safetensors")
    assert generated(download) == expected
    (folder / "config.json").write_text(json.dumps({"model_type": "gptvae", "dim_latent": 999, "num_tokens": 5}))
    other = header(Tokenizer.train_bpe(["no such words"], 260))
    (folder / "tokenizer.json").write_text(tokenizer_json(other))
    assert generated(folder) == expected, "the header wins"
    (folder / "config.json").write_text("{")
    (folder / "tokenizer.json").unlink()
    assert generated(folder) == expected


def test_a_crash_behind_the_model_leaves_a_model(folder: Path, corpus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, write: object) -> None:
        raise GPTVAEError(f"cannot write {path}: disk full")

    monkeypatch.setattr("gptvae_cli.hub.write_atomically", fail)
    with pytest.raises(GPTVAEError, match="disk full"):
        finish(begin(folder, [corpus]))
    assert not NAMES & names(folder)
    load(folder / "model.safetensors", device=torch.device("cpu"))


# Whose they are -------------------------------------------------------------------------------------------------------


def write(folder: Path, header: ModelHeader, *, parameters: int = 1) -> None:
    """A model that nobody trained, and what lies beside it."""
    header = with_digests(header)
    foreign = foreign_companions(folder)
    save_model(folder / "model.safetensors", GPTVAE.from_config(header.model), header)
    write_companions(folder, header, foreign, parameters=parameters)


def test_files_of_ours_are_replaced_and_removed(folder: Path) -> None:
    write(folder, header())
    assert names(folder) == {"model.safetensors", *NAMES}
    assert foreign_companions(folder) == []
    later = header(figures=None)
    later.training["gptvae"] = "0.2.0"
    write(folder, later, parameters=2)
    assert json.loads((folder / "config.json").read_text())["gptvae_version"] == "0.2.0"
    assert (folder / "README.md").read_text() == model_card(later, parameters=2)
    remove_companions(folder)
    assert names(folder) == {"model.safetensors"}
    remove_companions(folder)


def test_files_of_an_earlier_version_are_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which wrote them in another way."""
    with monkeypatch.context() as earlier:
        earlier.setattr("gptvae_cli.hub.config_json", lambda header: "{}\n")
        earlier.setattr("gptvae_cli.hub.tokenizer_json", lambda header: "[]\n")
        write(folder, header())
    assert (folder / "config.json").read_text() == "{}\n"
    assert foreign_companions(folder) == []
    write(folder, header())
    assert (folder / "config.json").read_text() == config_json(header())
    assert (folder / "tokenizer.json").read_text() == tokenizer_json(header())


def test_a_link_to_a_file_of_ours_is_kept(folder: Path, tmp_path: Path) -> None:
    for name in NAMES:
        (folder / name).symlink_to(tmp_path / name)
    write(folder, header())
    assert all((folder / name).is_symlink() and (tmp_path / name).is_file() for name in NAMES)
    remove_companions(folder)
    assert all((folder / name).is_symlink() and not (tmp_path / name).exists() for name in NAMES)


FOREIGN = [
    ("README.md", b"# My project\n"),
    ("README.md", b"\xff\xfe"),
    ("config.json", b"{}"),
    ("config.json", b'{"model_type": "gpt2"}'),
    ("config.json", b"[1, 2]"),
    ("config.json", b"[" * 100_000),
    ("tokenizer.json", b'{"model_type": "gptvae"}'),
    ("tokenizer.json", b'{"post_processor": {"special_tokens": {"[CLS]": {}}}}'),
    ("tokenizer.json", Tokenizer.bytes().to_json().encode()),
    ("config.json", config_json(header()).replace("{", '{ "note": "mine",', 1).encode()),
    ("tokenizer.json", tokenizer_json(header()).replace(" ", "", 1).encode()),
]


@pytest.mark.parametrize(("name", "content"), FOREIGN, ids=[f"{name}-{i}" for i, (name, _) in enumerate(FOREIGN)])
def test_files_of_others_stay_as_they_are(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    write(folder, header())
    assert names(folder) == {"model.safetensors", *NAMES}, "the others are written all the same"
    remove_companions(folder)
    assert names(folder) == {"model.safetensors", name}
    assert (folder / name).read_bytes() == content


def test_a_folder_of_that_name_stays_too(folder: Path) -> None:
    (folder / "README.md").mkdir()
    write(folder, header())
    remove_companions(folder)
    assert names(folder) == {"model.safetensors", "README.md"}


def test_an_edited_card_belongs_to_who_edited_it(folder: Path, corpus: str) -> None:
    """An author adds the licence, and goes on training: the card is theirs, whatever replaces the model."""
    finish(begin(folder, [corpus]), until=1)
    card = folder / "README.md"
    edited = card.read_text().replace("library_name: gptvae\n", "library_name: gptvae\nlicense: mit\n")
    card.write_text(edited)
    job = finish(go_on(folder))
    assert f"{card} is not gptvae's, or was edited, and stays as it is" in job.notes
    assert card.read_text() == edited
    job = finish(begin(folder, [corpus]))
    assert card.read_text() == edited
    assert f"{card} is not gptvae's, or was edited, and stays as it is" in job.notes
    card.unlink()
    assert not any("stays as it is" in note for note in begin(folder, [corpus]).notes)
