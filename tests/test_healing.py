"""Prompts that end where no token does, against an enumeration of all ways to go on with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptvae_cli import healing, sampling
from gptvae_cli.checkpoint import Checkpoint, load
from gptvae_cli.config import SampleConfig
from gptvae_cli.constraint import Constraint
from gptvae_cli.decoding import Request, decode
from gptvae_cli.engines import PlainDecoder, Row, last_states
from gptvae_cli.healing import Healing, take_back
from gptvae_cli.sampling import prior, repeated, write
from gptvae_cli.tokenizer import Tokenizer
from tests.cli.conftest import LONGEST, WIDTH, make_model

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = SampleConfig(greedy=True)
PROMPTS = ["was weath", "was we", "th", "they didn'", "the", "they ", "was there, weathere"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    words = Tokenizer.train_bpe(["the weather was there, weathered and wet, they didn't weave"] * 20, 330)
    path = make_model(tmp_path_factory.mktemp("healing") / "model.safetensors", tokenizer=words)
    return load(path, device=torch.device("cpu"))


def latents(count: int) -> list[Tensor]:
    return [torch.tensor(3 * latent_Z) for latent_Z in prior(1, count, WIDTH)]


@torch.no_grad()
def log_shares(checkpoint: Checkpoint, context: list[int], latent_Z: Tensor | None, rule: Constraint) -> Tensor:
    """Of the next token, through x-transformers, among those that the rule allows [V]."""
    row = Row(0, [checkpoint.header.model.bos_id, *context], latent_Z, 1)
    barred_V = torch.from_numpy(~rule.allowed_SV[rule.behind(context)])
    logits_V = PlainDecoder(checkpoint.model).step([row])[0].double()
    return logits_V.masked_fill(barred_V, -math.inf).log_softmax(-1)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_its_tokens_and_others_begin_with_what_is_left_of_it(checkpoint: Checkpoint, prompt: str) -> None:
    tokenizer = checkpoint.tokenizer
    kept, endings = take_back(tokenizer, prompt, tokenizer.constraint("line"))
    own = [ending[0] for ending in endings]
    assert [*kept, *own] == tokenizer.encode_batch([prompt])[0]
    texts = [tokenizer.decode([i]) for i in range(tokenizer.pad_id)]
    for place, (_, *others) in enumerate(endings):
        rest = tokenizer.decode(own[place:])
        assert others == [i for i, text in enumerate(texts) if text.startswith(rest) and i != own[place]]
    assert len(endings[0]) > 1, "no more than is needed"
    for before in range(1, len(kept) + 1):
        rest = tokenizer.decode([*kept[-before:], *own])
        assert not any(text.startswith(rest) for text in texts), "all that is needed"


def assert_ways_are_weighed(checkpoint: Checkpoint, prompt: str, *, latent: bool) -> None:
    rule = checkpoint.tokenizer.constraint("line")
    kept, endings = take_back(checkpoint.tokenizer, prompt, rule)
    own = [ending[0] for ending in endings]
    ways = [[*own[:place], other] for place, (_, *others) in enumerate(endings) for other in others] + [own]
    assert len(ways) > 1
    both = [latents(1)[0] if latent else None, latents(2)[1] if latent else None]
    weigh = Healing(checkpoint.model, endings, rule)
    for latent_Z in both:
        expected, found = [], []
        for way in ways:
            # A neighbour that went another way must not matter.
            neighbour = Row(1, [checkpoint.header.model.bos_id, *kept], both[1], 9)
            row = Row(0, [checkpoint.header.model.bos_id, *kept], latent_Z, 9)
            expected.append(0.0)
            found.append(0.0)
            for place, token in enumerate(way):
                context = [*kept, *way[:place]]
                shares_BV = torch.stack([log_shares(checkpoint, context, z_Z, rule) for z_Z in (latent_Z, both[1])])
                expected[-1] += float(shares_BV[0, token])
                weighed_BV = weigh(shares_BV.clone(), [row, neighbour]).log_softmax(-1)
                found[-1] += float(weighed_BV[0, token])
                row.new.append(token)
                neighbour.new.append(ways[0][0] if place == 0 else token)
        shares = torch.tensor(expected).softmax(0)
        torch.testing.assert_close(torch.tensor(found).exp(), shares, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("latent", [True, False], ids=["latent", "none"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_way_to_spell_a_prompt_is_as_likely_as_the_model_has_it(
    checkpoint: Checkpoint, prompt: str, latent: bool
) -> None:
    """Its share of all ways. Without a look ahead "was we" would most often be the word "we" and then "ath"."""
    assert_ways_are_weighed(checkpoint, prompt, latent=latent)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_texts_begin_with_their_prompt(checkpoint: Checkpoint, prompt: str) -> None:
    requests = list(repeated([z_Z.numpy() for z_Z in latents(20)], 2))
    for sample in (GREEDY, SampleConfig(seed=3, temperature=3.0), SampleConfig(seed=3, max_tokens=1)):
        pieces: list[str] = []
        written = list(write(checkpoint, requests, sample, unit="line", prompt=prompt))
        assert all(text.startswith(prompt) for text in written)
        streamed = write(checkpoint, requests, sample, unit="line", prompt=prompt, on_text=pieces.append)
        assert (list(streamed), "".join(pieces)) == (written, "".join(written))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "plain"])
def test_the_rest_of_a_prompt_is_not_what_is_asked_for(checkpoint: Checkpoint, cached: bool) -> None:
    """`max_tokens` are those behind the ones that spell it, whichever way they do."""
    tokenizer, rule = checkpoint.tokenizer, checkpoint.tokenizer.constraint("line")
    never = [tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id]
    endless = Constraint([b""] * tokenizer.num_tokens, never=never, eos_id=tokenizer.eos_id)
    kept, endings = take_back(tokenizer, "was weath", rule)
    own = [ending[0] for ending in endings]
    assert len(own) > 1
    requests = [Request(row, 0, latent_Z, kept) for row, latent_Z in enumerate(latents(60))]
    ways = set()
    for most in (1, 3):
        sample = SampleConfig(seed=1, temperature=2.0, max_tokens=most)
        for ids in decode(checkpoint.model, requests, sample, constraint=endless, endings=endings, cached=cached):
            spelled = next(count for count in range(1, 9) if ids[:count] == own or ids[:count] != own[:count])
            ways.add(tuple(ids[:spelled]))
            assert len(ids) == spelled + most
            assert tokenizer.decode([*kept, *ids[:spelled]]).startswith("was weath")
    assert len(ways) > 1


def test_what_a_rule_forbids_stands_in_for_nothing(checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    (weather,) = tokenizer.encode_batch([" weather"])[0]
    others = Constraint([b""] * tokenizer.num_tokens, never=[weather], eos_id=tokenizer.eos_id)
    for rule, allowed in ((others, False), (tokenizer.constraint("line"), True)):
        _, endings = take_back(tokenizer, "was weath", rule)
        assert any(weather in ending for ending in endings) is allowed


def test_bytes_leave_nothing_to_heal() -> None:
    tokenizer = Tokenizer.bytes()
    assert take_back(tokenizer, "was weath", tokenizer.constraint("line")) == ([*b"was weath"], [])


@pytest.mark.parametrize("longest", [1, 2])
def test_no_more_is_taken_back_than_the_decoder_sees_at_once(checkpoint: Checkpoint, longest: int) -> None:
    """Of what it does not see it could not tell how likely it is."""
    rule, prompt = checkpoint.tokenizer.constraint("line"), "was weath"
    whole, endings = take_back(checkpoint.tokenizer, prompt, rule)
    kept, fewer = take_back(checkpoint.tokenizer, prompt, rule, longest=longest)
    assert len(endings) > longest
    assert fewer == endings[-longest:]
    assert [*kept, *(ending[0] for ending in fewer)] == [*whole, *(ending[0] for ending in endings)]


def test_a_prompt_is_taken_back_within_what_the_model_reads(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def record(*about: Any, longest: int) -> Any:
        asked.append(longest)
        return take_back(*about, longest=longest)

    monkeypatch.setattr(sampling, "take_back", record)
    assert list(write(checkpoint, [], SampleConfig(), unit="line", prompt="the")) == []
    assert asked == [LONGEST]


def test_parts_of_a_character_are_weighed_by_what_may_follow_them(tmp_path: Path) -> None:
    """ "早" alone is two tokens, neither of them a character; "早朝" is one."""
    words = Tokenizer.train_bpe(["早朝 日本 早朝"] * 20, 290)
    found = load(make_model(tmp_path / "model.safetensors", tokenizer=words), device=torch.device("cpu"))
    _, endings = take_back(words, "早", words.constraint("line"))
    assert [len(ending) > 1 for ending in endings] == [True, False]
    assert_ways_are_weighed(found, "早", latent=True)


def test_a_prompt_longer_than_the_model_reads_is_healed_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = Tokenizer.train_bpe(["the weather was there"] * 20, 300)
    path = make_model(tmp_path / "model.safetensors", tokenizer=words)
    found = sampling.open_model(path, device="cpu").checkpoint
    prompt = "the weather was there " * LONGEST + "weath"
    requests = list(repeated([z_Z.numpy() for z_Z in latents(4)], 1))
    seen: list[int] = []

    def states(model: Any, contexts: Sequence[Sequence[int]], *rest: Any) -> Tensor:
        seen.extend(map(len, contexts))
        return last_states(model, contexts, *rest)

    monkeypatch.setattr(healing, "last_states", states)
    for text in write(found, requests, SampleConfig(seed=1, max_tokens=3), unit="line", prompt=prompt):
        assert text.startswith(prompt)
    assert seen == [LONGEST] * 4, "the look ahead keeps to what the model reads"
