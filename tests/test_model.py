"""`GPTVAE` against the class whose contract it keeps, and where it does better on purpose.

The reference is `x_transformers.gpt_vae.GPTVAE` itself, with the same weights.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close
from x_transformers import gpt_vae as reference
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.x_transformers import Decoder, TransformerWrapper

from gptvae_cli import fused
from gptvae_cli.config import ModelConfig
from gptvae_cli.errors import CheckpointError, ConfigError, ExitCode
from gptvae_cli.model import GPTVAE, STOCK_DEFAULTS, Posterior

PAD, BOS, EOS = 17, 18, 19
WINDOW = 16
SHAPE: dict[str, Any] = {
    "num_tokens": 20,
    "dim": 32,
    "depth": 2,
    "enc_depth": 1,
    "max_seq_len": WINDOW,
    "dim_latent": 8,
    "heads": 2,
    "attn_dim_head": 16,
    "verbose": False,
}
POSITIONS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "rotary": {"rotary_pos_emb": True},
    "rotary-flash": {"rotary_pos_emb": True, "attn_flash": True},
}
ROTARY = POSITIONS["rotary"]
every_way = pytest.mark.parametrize("conditioning", ["token", "bos"])
every_position = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)

Pair = Callable[..., tuple[Any, GPTVAE]]
Ours = Callable[..., GPTVAE]


@pytest.fixture
def ours(shake: Callable[..., Any]) -> Ours:
    def make(**options: Any) -> GPTVAE:
        torch.manual_seed(0)
        model: GPTVAE = shake(GPTVAE(**{**SHAPE, "pad_id": PAD, **options}))
        return model

    return make


@pytest.fixture
def pair(ours: Ours) -> Pair:
    """Makes the stock class and ours with the same weights."""

    def make(**options: Any) -> tuple[Any, GPTVAE]:
        model = ours(**options)
        stock = reference.GPTVAE(**{**SHAPE, "pad_id": PAD, **options}).eval()
        stock.load_state_dict(model.state_dict())
        return stock, model

    return make


def random_tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, PAD, (rows, length), generator=torch.Generator().manual_seed(seed))


def random_latents(rows: int, seed: int = 0) -> Tensor:
    """Far from the middle of the prior, so that the text shows them."""
    return 3 * torch.randn(rows, SHAPE["dim_latent"], generator=torch.Generator().manual_seed(seed))


def padded(rows: int = 4, length: int = 10, pad_id: int = PAD) -> Tensor:
    tokens_BT = random_tokens(rows, length)
    for row in range(1, rows):
        tokens_BT[row, length - 2 * row :] = pad_id
    return tokens_BT


def forced_logits(model: Any, prompt_T: Tensor, forced: Sequence[int], latent_Z: Tensor, **options: Any) -> Tensor:
    """What a model's `generate` sees at every step while one prompt is continued with tokens of our choice [n V]."""
    seen: list[Tensor] = []

    def record(logits_BV: Tensor) -> Tensor:
        seen.append(logits_BV[0].clone())
        only_BV = torch.full_like(logits_BV, float("-inf"))
        only_BV[:, forced[len(seen) - 1]] = 0
        return only_BV

    text_BT = model.generate(prompt_T[None], len(forced), latents=latent_Z, filter_logits_fn=record, **options)
    assert text_BT[0].tolist() == list(forced)
    return torch.stack(seen)


# The contract ---------------------------------------------------------------------------------------------------------


@every_position
def test_state_dicts_load_strictly_both_ways(positions: dict[str, Any]) -> None:
    stock, model = reference.GPTVAE(**SHAPE, **positions), GPTVAE(**SHAPE, **positions)
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model.load_state_dict(stock.state_dict(), strict=True)
    for tensor in stock.parameters():
        nn.init.zeros_(tensor)
    stock.load_state_dict(model.state_dict(), strict=True)
    assert list(model.state_dict()) == list(before)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_trained_architecture_loads_into_the_stock_class(tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config()
    model = GPTVAE.from_config(config)
    reference.GPTVAE(**SHAPE, **ROTARY).load_state_dict(model.state_dict(), strict=True)
    assert model.config == config
    assert (model.pad_id, model.bos_id) == (PAD, BOS)


def test_the_latent_is_as_wide_as_the_model_by_default() -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "dim_latent"}
    stock, model = reference.GPTVAE(**shape), GPTVAE(**shape)
    model.load_state_dict(stock.state_dict(), strict=True)
    assert model.dim_latent == shape["dim"]


@every_position
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("other_text", [True, False], ids=["seq_for_latents", "itself"])
@pytest.mark.parametrize(
    "options",
    [{}, {"vae_kl_div_floor": 0.4, "vae_kl_loss_weight": 0.3, "latents_dropout_prob": 0.2}],
    ids=["defaults", "floor-weight-dropout"],
)
def test_losses_and_gradients_equal_the_stock_class_after_one_seed(
    pair: Pair, positions: dict[str, Any], training: bool, other_text: bool, options: dict[str, Any]
) -> None:
    """The order of the draws counts: the latent's noise first, then which rows lose their latent."""
    losses, gradients = [], []
    for model in pair(**positions, **options):
        model.train(training)
        torch.manual_seed(5)
        source: dict[str, Any] = {"seq_for_latents": padded(length=12)} if other_text else {}
        total, (ar_loss, kl_loss) = model(padded(), **source, return_all_losses=True)
        losses.append((total, ar_loss, kl_loss))
        gradients.append(torch.autograd.grad(total, list(model.parameters())))
        torch.manual_seed(5)
        assert torch.equal(model(padded(), **source), total)
    assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients[1])


def test_latents_are_dropped_in_training_only(ours: Ours) -> None:
    """Otherwise the equality above could hold because nothing is ever dropped."""
    model = ours(**ROTARY, latents_dropout_prob=0.5)
    losses = {}
    for training in (True, False):
        torch.manual_seed(5)
        losses[training] = model.train(training)(padded(), return_all_losses=True)[1][0]
    assert losses[True] != losses[False]


@every_position
@pytest.mark.parametrize("latents", ["none", "rows", "one", "list", "encoded"])
def test_greedy_text_equals_the_stock_class_up_to_the_window(
    pair: Pair, positions: dict[str, Any], latents: str
) -> None:
    """The last of these tokens is the first that the stock cache would write without its latent, were it one more."""
    stock, model = pair(**positions)
    ways: dict[str, dict[str, Any]] = {
        "none": {},
        "rows": {"latents": random_latents(3)},
        "one": {"latents": random_latents(1)[0]},
        "list": {"latents": random_latents(3).tolist()},
        "encoded": {"seq_for_latents": padded(3)},
    }
    prompts_BT, texts = random_tokens(3, 4), []
    for either in (stock, model):
        torch.manual_seed(3)
        texts.append(either.generate(prompts_BT, WINDOW - 4, temperature=0.0, **ways[latents]))
    assert texts[1].tolist() == texts[0].tolist()
    assert len(set(texts[0].flatten().tolist())) > 3


@every_position
def test_greedy_text_changes_with_the_latent(ours: Ours, positions: dict[str, Any]) -> None:
    """Otherwise every comparison of texts in this file would be empty."""
    model, prompts_BT = ours(**positions), random_tokens(3, 4)
    texts = [model.generate(prompts_BT, 12, latents=z, temperature=0.0) for z in (random_latents(3), None)]
    assert texts[0].tolist() != texts[1].tolist()


@every_position
@pytest.mark.parametrize("with_latent", [True, False])
def test_one_prompt_without_a_batch_gives_one_row(pair: Pair, positions: dict[str, Any], with_latent: bool) -> None:
    stock, model = pair(**positions)
    for latents in (random_latents(1)[0], random_latents(1)) if with_latent else (None,):
        expected, text = (
            m.generate(random_tokens(1, 5)[0], 8, latents=latents, temperature=0.0) for m in (stock, model)
        )
        assert text.shape == (8,)
        assert text.tolist() == expected.tolist()


@every_position
def test_padded_prompts_equal_the_stock_class_without_a_latent(pair: Pair, positions: dict[str, Any]) -> None:
    stock, model = pair(**positions)
    lengths_B = torch.tensor([6, 2, 4])
    expected, text = (
        m.generate(random_tokens(3, 6), 8, prompt_lens=lengths_B, temperature=0.0) for m in (stock, model)
    )
    assert text.tolist() == expected.tolist()


@every_position
def test_prompts_beyond_the_window_start_as_in_the_stock_class(pair: Pair, positions: dict[str, Any]) -> None:
    """Uncached, because the stock cache has nothing to say about absolute positions there."""
    stock, model = pair(**positions)
    options: dict[str, Any] = {"latents": random_latents(3), "temperature": 0.0, "cache_kv": False}
    expected, text = (m.generate(random_tokens(3, WINDOW + 5), 1, **options) for m in (stock, model))
    assert text.tolist() == expected.tolist()


@every_position
def test_text_ends_at_eos_as_in_the_stock_class_and_padding_stands_behind(
    pair: Pair, positions: dict[str, Any]
) -> None:
    """The stock class writes token 0 behind EOS, which may be a letter."""
    stock, model = pair(**positions)
    options: dict[str, Any] = {"latents": random_latents(3), "temperature": 0.0}
    prompts_BT = random_tokens(3, 4)
    free = stock.generate(prompts_BT, 12, **options)[0].tolist()
    eos = next(token for token in free[2:] if token not in prompts_BT)
    expected, text = (m.generate(prompts_BT, 12, eos_token=eos, **options) for m in (stock, model))
    assert text.shape == expected.shape
    ended = 0
    for row, expected_row in zip(text.tolist(), expected.tolist(), strict=True):
        length = row.index(eos) + 1 if eos in row else len(row)
        assert row[:length] == expected_row[:length]
        assert row[length:] == [PAD] * (len(row) - length)
        ended += length < len(row)
    assert ended >= 1


def test_generation_stops_when_every_row_has_ended(ours: Ours) -> None:
    model = ours(**ROTARY)
    free = model.generate(random_tokens(1, 4), 12, temperature=0.0)[0].tolist()
    text = model.generate(random_tokens(1, 4), 12, temperature=0.0, eos_token=free[2])[0].tolist()
    assert text == free[: free.index(free[2]) + 1]


def test_no_new_tokens_can_be_asked_for(pair: Pair) -> None:
    for model in pair(**ROTARY):
        assert model.generate(random_tokens(3, 4), 0).shape == (3, 0)


def test_default_sampling_keeps_a_tenth_of_the_vocabulary(ours: Ours) -> None:
    model, prompts_BT, latents_BZ = ours(**ROTARY), random_tokens(8, 4), random_latents(8)
    new_BT = model.generate(prompts_BT, 12, latents=latents_BZ, generator=torch.Generator().manual_seed(0))
    logits_BTV = model.logits(model.hidden(torch.cat([prompts_BT, new_BT], dim=1), latents_BZ))[:, 3:-1]
    chosen_BT1 = logits_BTV.gather(-1, new_BT[..., None])
    rank_BT = (logits_BTV > chosen_BT1).sum(-1)
    assert set(rank_BT.flatten().tolist()) == {0, 1}  # a tenth of 20 tokens


@pytest.mark.parametrize(
    "options",
    [
        {"filter_kwargs": {"k": 1}},
        {"filter_logits_fn": "top_p", "filter_kwargs": {"thres": 0.0}},
        {"filter_logits_fn": "min_p", "filter_kwargs": {"min_p": 1.0}},
        {"filter_logits_fn": lambda logits_BV: logits_BV.masked_fill(logits_BV < logits_BV.amax(-1, True), -1e9)},
        {"temperature": 1e-4},
    ],
    ids=["top_k", "top_p", "min_p", "function", "temperature"],
)
def test_stock_ways_of_choosing_a_token_are_accepted(ours: Ours, options: dict[str, Any]) -> None:
    """Each of these leaves the likeliest token alone."""
    model, prompts_BT = ours(**ROTARY), random_tokens(3, 4)
    assert torch.equal(model.generate(prompts_BT, 10, **options), model.generate(prompts_BT, 10, temperature=0.0))


def test_foreign_keywords_are_handed_to_x_transformers(pair: Pair, shake: Callable[..., Any]) -> None:
    stock, model = pair(**ROTARY)
    amateur = shake(TransformerWrapper(num_tokens=20, max_seq_len=WINDOW, attn_layers=Decoder(dim=32, depth=1)), 9)
    prompts_BT = random_tokens(3, 4)
    greedy: dict[str, Any] = {"temperature": 0.0, "latents": random_latents(3)}
    contrast: dict[str, Any] = {"amateur_model": amateur, "contrastive_decode_kwargs": {"alpha": 0.01, "beta": 2.0}}
    text_BT = model.generate(prompts_BT, 10, **greedy, **contrast)
    assert torch.equal(text_BT, stock.generate(prompts_BT, 10, **greedy, **contrast))
    assert not torch.equal(text_BT, model.generate(prompts_BT, 10, **greedy))


def test_an_unrestricted_window_is_handed_to_x_transformers(pair: Pair) -> None:
    stock, model = pair(**ROTARY)
    options: dict[str, Any] = {"latents": random_latents(1)[0], "temperature": 0.0, "restrict_to_max_seq_len": False}
    expected, text = (m.generate(random_tokens(3, 4), 2 * WINDOW, **options) for m in (stock, model))
    assert text.tolist() == expected.tolist()


def test_keywords_at_their_defaults_change_nothing(ours: Ours) -> None:
    """x-transformers' loop would forget the latent beyond the window."""
    model, prompts_BT, latents_BZ = ours(**ROTARY), random_tokens(2, 4), random_latents(2)
    options: dict[str, Any] = {"latents": latents_BZ, "temperature": 0.0}
    expected_BT = model.generate(prompts_BT, 3 * WINDOW, **options)
    assert torch.equal(model.generate(prompts_BT, 3 * WINDOW, **options, **STOCK_DEFAULTS), expected_BT)
    with mock.patch.object(model.ar_wrapped_decoder, "generate", side_effect=AssertionError("in the stock loop")):
        for name, value in STOCK_DEFAULTS.items():
            model.generate(prompts_BT, 2, **options, **{name: value})


def test_the_defaults_are_x_transformers() -> None:
    """Its decorators hide them."""
    inner: Any = inspect.unwrap(AutoregressiveWrapper.generate)
    parameters = inspect.signature(inspect.getclosurevars(inner).nonlocals["fn"]).parameters
    own = inspect.signature(GPTVAE.generate).parameters
    foreign = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    assert {name: value for name, value in foreign.items() if name not in own} == STOCK_DEFAULTS
    assert foreign.pop("filter_kwargs") == {}
    assert own["filter_kwargs"].default is None  # none, likewise
    assert all(own[name].default == value for name, value in foreign.items() if name in own)


def test_a_generator_that_would_not_be_heard_is_refused(ours: Ours) -> None:
    model, generator = ours(**ROTARY), torch.Generator()
    with pytest.raises(ConfigError, match="found a generator and restrict_to_max_seq_len, whose tokens") as caught:
        model.generate(random_tokens(2, 4), 3, generator=generator, restrict_to_max_seq_len=False)
    assert caught.value.hint == "leave the generator out, and call torch.manual_seed before"
    options: dict[str, Any] = {"temperature": 0.0, "restrict_to_max_seq_len": False}
    model.generate(random_tokens(2, 4), 3, seq_for_latents=padded(2), generator=generator, **options)


def test_greedy_text_takes_no_random_numbers(pair: Pair) -> None:
    models = pair(**ROTARY)
    before = torch.get_rng_state()
    for model in models:
        model.generate(random_tokens(2, 4), 3, latents=random_latents(2), temperature=0.0)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("prompts", [torch.empty(0, 4, dtype=torch.long), []], ids=["tensor", "list"])
def test_no_prompts_give_no_rows(pair: Pair, prompts: Any) -> None:
    stock, model = pair(**ROTARY)
    assert model.generate(prompts, 3).shape == (0, 3)
    assert model.generate(prompts, 3, latents=torch.empty(0, SHAPE["dim_latent"]), temperature=0.0).shape == (0, 3)
    if isinstance(prompts, Tensor):
        assert stock.generate(prompts, 3).shape == (0, 3)


def test_a_filter_that_is_not_known_is_refused(ours: Ours) -> None:
    allowed = "it must be top_p, top_k, top_a, min_p or a function"
    choices: list[dict[str, Any]] = [{}, {"restrict_to_max_seq_len": False}]
    for options in choices:
        with pytest.raises(ConfigError, match=f"filter_logits_fn is 'top_q', {allowed}"):
            ours(**ROTARY).generate(random_tokens(2, 4), 3, filter_logits_fn="top_q", **options)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([4, 5], "found 5 in prompt_lens, for a prompt of 4 tokens"),
        ([-1, 4], "found -1 in prompt_lens, for a prompt of 4 tokens"),
        ([4], "found 2 prompts and 1 prompt_lens, they must be as many"),
    ],
)
def test_lengths_that_no_prompt_has_are_refused(ours: Ours, lengths: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ours(**ROTARY).generate(random_tokens(2, 4), 3, prompt_lens=torch.tensor(lengths))


@pytest.mark.parametrize("cache_kv", [True, False])
def test_a_token_outside_of_the_vocabulary_is_refused(pair: Pair, cache_kv: bool) -> None:
    for model in pair(**ROTARY):
        for token in (-1, SHAPE["num_tokens"]):
            with pytest.raises(IndexError):
                model.generate(torch.tensor([[3, token]]), 2, cache_kv=cache_kv)


def test_a_filter_may_keep_and_change_what_it_sees(pair: Pair) -> None:
    """Tensors of inference mode can neither be written to outside of it nor be multiplied with weights that learn."""
    for model in pair(**ROTARY):
        kept: list[Tensor] = []

        def keep(logits_BV: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(logits_BV)
            return logits_BV.mul_(2)

        model.generate(random_tokens(2, 4), 3, filter_logits_fn=keep)
        assert not any(logits_BV.is_inference() or logits_BV.requires_grad for logits_BV in kept)
        kept[0].add_(1)
        gain = torch.ones(SHAPE["num_tokens"], requires_grad=True)
        assert torch.equal(torch.autograd.grad((kept[0] * gain).sum(), gain)[0], kept[0].sum(0))


@pytest.mark.parametrize("cache_kv", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_choose_no_token(ours: Ours, cache_kv: bool, temperature: float) -> None:
    model, latents_BZ = ours(**ROTARY), torch.full((2, SHAPE["dim_latent"]), 1e38)
    options: dict[str, Any] = {"cache_kv": cache_kv, "temperature": temperature}
    with pytest.raises(CheckpointError, match="the logits of a token are not finite numbers"):
        model.generate(random_tokens(2, 4), 3, latents=latents_BZ, **options)


# The traps ------------------------------------------------------------------------------------------------------------


def test_the_kl_of_a_posterior_is_raw_whatever_the_floor(ours: Ours) -> None:
    """The stock class reports the excess over its floor, from which no bound can be recovered."""
    model = ours(**ROTARY, vae_kl_div_floor=1e6)
    posterior = model.posterior(padded())
    deviation_BZ = (0.5 * posterior.log_var_BZ).exp()
    expected_BZ = kl_divergence(Normal(posterior.mean_BZ, deviation_BZ), Normal(0.0, 1.0))
    assert_close(posterior.kl_BZ(), expected_BZ, rtol=1e-4, atol=1e-5)
    assert model(padded(), return_all_losses=True)[1][1] == 0


def test_a_posterior_of_bfloat16_is_summed_in_float32() -> None:
    half = Posterior(torch.full((1, 4), 0.3).bfloat16(), torch.full((1, 4), -3.0).bfloat16())
    full = half.in_float32()
    assert full.kl_BZ().dtype == torch.float32
    assert torch.equal(full.mean_BZ.bfloat16(), half.mean_BZ)


@every_position
def test_pad_id_of_minus_one_takes_a_padded_batch(pair: Pair, positions: dict[str, Any]) -> None:
    """The stock class embeds it, and fails."""
    stock, model = pair(**positions, pad_id=-1)
    with pytest.raises(IndexError):
        stock(padded(pad_id=-1))
    assert bool(model(padded(pad_id=-1)).isfinite())


@every_position
@pytest.mark.parametrize("pad_id", [-1, PAD])
def test_padding_does_not_change_the_latent(ours: Ours, positions: dict[str, Any], pad_id: int) -> None:
    model = ours(**positions, pad_id=pad_id)
    tokens_BT = padded(pad_id=pad_id)
    together = model.posterior(tokens_BT)
    for row, tokens_T in enumerate(tokens_BT):
        alone = model.posterior(tokens_T[tokens_T != pad_id][None])
        assert_close(alone.mean_BZ[0], together.mean_BZ[row], rtol=0, atol=1e-5)
        assert_close(alone.log_var_BZ[0], together.log_var_BZ[row], rtol=0, atol=1e-5)


@every_position
@pytest.mark.parametrize("pad_id", [-1, PAD])
def test_padding_does_not_change_the_loss(ours: Ours, positions: dict[str, Any], pad_id: int) -> None:
    model, tokens_BT = ours(**positions, pad_id=pad_id), random_tokens(2, 7)
    longer_BT = torch.nn.functional.pad(tokens_BT, (0, 5), value=pad_id)
    losses = []
    for rows in (tokens_BT, longer_BT):
        torch.manual_seed(2)
        losses.append(model(rows, return_all_losses=True))
    assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompts", [torch.empty(3, 0, dtype=torch.long), [torch.empty(0, dtype=torch.long)] * 3])
def test_an_empty_prompt_starts_from_bos(ours: Ours, prompts: Any) -> None:
    """Token 0 of a text is never predicted, so that a latent alone cannot start one without it."""
    model, latents_BZ = ours(**ROTARY, bos_id=BOS), random_latents(3)
    text_BT = model.generate(prompts, 8, latents=latents_BZ, temperature=0.0)
    started_BT = model.generate(torch.full((3, 1), BOS), 8, latents=latents_BZ, temperature=0.0)
    assert torch.equal(text_BT, started_BT)


def test_an_empty_prompt_without_a_bos_is_refused(ours: Ours) -> None:
    with pytest.raises(ConfigError, match="found an empty prompt, a model without a bos_id needs") as caught:
        ours(**ROTARY).generate(torch.empty(0, dtype=torch.long), 8)
    assert caught.value.exit_code == ExitCode.USAGE


@every_position
@pytest.mark.parametrize("with_latent", [True, False])
def test_a_list_of_prompts_equals_each_alone(ours: Ours, positions: dict[str, Any], with_latent: bool) -> None:
    model = ours(**positions)
    prompts = [random_tokens(1, length, seed=length)[0] for length in (5, 1, 9)]
    latents_BZ = random_latents(3) if with_latent else None
    together_BT = model.generate(prompts, 2 * WINDOW, latents=latents_BZ, temperature=0.0)
    for row, prompt_T in enumerate(prompts):
        latent_Z = None if latents_BZ is None else latents_BZ[row]
        alone_T = model.generate(prompt_T, 2 * WINDOW, latents=latent_Z, temperature=0.0)
        assert together_BT[row].tolist() == alone_T.tolist()


@every_position
def test_prompt_lens_leave_the_latent_in_sight(pair: Pair, positions: dict[str, Any]) -> None:
    """The stock class counts the masked padding from the latent's slot, and masks the latent with it: its effect on
    every prompt but the longest is exactly 0."""
    stock, model = pair(**positions)
    prompts_BT, lengths_B, latents_BZ = random_tokens(2, 6), torch.tensor([6, 3]), random_latents(2)

    def first_logits(either: Any, z_BZ: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def record(logits_BV: Tensor) -> Tensor:
            seen.append(logits_BV.clone())
            return logits_BV

        either.generate(prompts_BT, 1, latents=z_BZ, prompt_lens=lengths_B, filter_logits_fn=record)
        return seen[0]

    stock_effect_B = (first_logits(stock, latents_BZ) - first_logits(stock, -latents_BZ)).abs().amax(-1)
    effect_B = (first_logits(model, latents_BZ) - first_logits(model, -latents_BZ)).abs().amax(-1)
    assert stock_effect_B[0] > 0.1
    assert stock_effect_B[1] == 0
    assert (effect_B > 0.1).all()
    for row, length in enumerate(lengths_B.tolist()):
        alone_1V = forced_logits(model, prompts_BT[row, :length], [0], latents_BZ[row])
        assert_close(first_logits(model, latents_BZ)[row], alone_1V[0], rtol=0, atol=1e-4)


@every_position
@pytest.mark.parametrize("dimensions", [1, 2])
def test_one_prompt_is_repeated_for_many_latents(ours: Ours, positions: dict[str, Any], dimensions: int) -> None:
    model, prompt_T, latents_BZ = ours(**positions), random_tokens(1, 3)[0], random_latents(4)
    text_BT = model.generate(prompt_T if dimensions == 1 else prompt_T[None], 9, latents=latents_BZ, temperature=0.0)
    assert text_BT.shape == (4, 9)
    for row, latent_Z in enumerate(latents_BZ):
        assert torch.equal(text_BT[row], model.generate(prompt_T, 9, latents=latent_Z, temperature=0.0))


def test_prompts_and_latents_that_cannot_be_matched_are_refused(ours: Ours) -> None:
    with pytest.raises(ConfigError, match="found 3 prompts and 2 latents"):
        ours(**ROTARY).generate(random_tokens(3, 4), 2, latents=random_latents(2))
    with pytest.raises(ConfigError, match="found both"):
        ours(**ROTARY).generate(random_tokens(3, 4), 2, latents=random_latents(3), seq_for_latents=padded(3))


@every_position
@every_way
def test_text_beyond_the_window_is_the_same_with_and_without_a_cache(
    ours: Ours, positions: dict[str, Any], conditioning: str
) -> None:
    model, latents_BZ = ours(**positions, conditioning=conditioning), random_latents(2)
    for first, second in ((latents_BZ, latents_BZ), (latents_BZ[0], latents_BZ[1])):
        cached, plain = (
            model.generate(random_tokens(2, 4), 3 * WINDOW, latents=first, temperature=0.0, cache_kv=cache_kv)
            for cache_kv in (True, False)
        )
        assert cached.tolist() == plain.tolist()
        other = model.generate(random_tokens(2, 4), 3 * WINDOW, latents=-second, temperature=0.0)
        assert other[:, WINDOW:].tolist() != cached[:, WINDOW:].tolist()


KEPT: list[dict[str, Any]] = [
    {},
    {"alibi_pos_bias": True, "ff_no_bias": True, "pre_norm": False},
    {"rel_pos_bias": True, "ff_relu_squared": True, "use_scalenorm": True},
    {"disable_abs_pos_emb": True, "attn_qk_norm": True, "sandwich_norm": True, "use_simple_rmsnorm": True},
    {"rotary_pos_emb": True, "rotary_emb_dim": 8, "rotary_interpolation_factor": 2.0, "attn_one_kv_head": True},
    {"attn_flash": True, "attn_kv_heads": 1, "ff_glu": True, "ff_swish": True, "ff_mult": 2, "use_rmsnorm": True},
    {"attn_dropout": 0.2, "ff_dropout": 0.2, "layer_dropout": 0.2},
]


@pytest.mark.parametrize("options", KEPT, ids=lambda options: "-".join(options) or "defaults")
@every_way
def test_keys_that_x_transformers_keeps_change_no_text(ours: Ours, options: dict[str, Any], conditioning: str) -> None:
    """With and without latents, for rows that end one after another and beyond the window."""
    model, prompts_BT = ours(**options, conditioning=conditioning), random_tokens(3, 3)
    assert model.fused_decoder is None
    assert model.keeps_keys
    for latents_BZ in (None, random_latents(3)):
        texts, logits = [], []
        for cache_kv in (True, False):
            seen: list[Tensor] = []

            def keep(logits_BV: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(logits_BV)
                return logits_BV

            generator = torch.Generator().manual_seed(1)
            choice: dict[str, Any] = {"eos_token": 5, "filter_logits_fn": keep, "generator": generator}
            texts.append(
                model.generate(prompts_BT, 2 * WINDOW + 5, latents=latents_BZ, cache_kv=cache_kv, **choice).tolist()
            )
            logits.append(torch.cat(seen))
        assert texts[0] == texts[1]
        assert_close(logits[0], logits[1], rtol=0, atol=1e-3)


def test_only_tokens_that_are_new_are_read_where_keys_are_kept(ours: Ours) -> None:
    model, read = ours(), []
    layer = model.decoder.attn_layers.layers[1][1]
    layer.register_forward_hook(lambda module, inputs, output: read.append(output.shape[1]))
    model.generate(random_tokens(2, 4), 6, latents=random_latents(2), temperature=0.0)
    assert read == [5, 1, 1, 1, 1, 1]
    read.clear()
    model.generate(random_tokens(2, 4), 3, latents=random_latents(2), temperature=0.0, cache_kv=False)
    assert read == [5, 6, 7]


@pytest.mark.parametrize(
    "options", [{"shift_tokens": 1}, {"orthog_residual": True}, {"dec_kwargs": {"attn_selective": True}}]
)
def test_keys_are_not_kept_where_that_would_change_the_text(ours: Ours, options: dict[str, Any]) -> None:
    model = ours(**options)
    assert not model.keeps_keys
    prompts_BT, latents_BZ = random_tokens(2, 4), random_latents(2)
    cached_BT, plain_BT = (
        model.generate(prompts_BT, 9, latents=latents_BZ, temperature=0.0, cache_kv=cache_kv)
        for cache_kv in (True, False)
    )
    assert torch.equal(cached_BT, plain_BT)


@pytest.mark.parametrize("positions", [ROTARY, POSITIONS["rotary-flash"]], ids=["rotary", "rotary-flash"])
def test_the_latent_is_heard_after_the_window_has_moved(pair: Pair, positions: dict[str, Any]) -> None:
    """The stock cache evicts the latent's keys and values there. What earlier tokens heard of it lives on in their
    own values for a window a layer, and then its effect is exactly 0."""
    stock, model = pair(**positions)
    latent_Z, prompt_T = random_latents(1)[0], random_tokens(1, 4)[0]
    forced = random_tokens(1, 4 * WINDOW, seed=1)[0].tolist()
    effect = {
        name: (forced_logits(either, prompt_T, forced, latent_Z) - forced_logits(either, prompt_T, forced, -latent_Z))
        .abs()
        .amax(-1)
        for name, either in (("stock", stock), ("ours", model))
    }
    assert (effect["stock"][:8] > 0.01).all()
    assert (effect["stock"][-8:] == 0).all()
    assert (effect["ours"] > 0.01).all()


class MeanOfEmbeddings(nn.Module):
    """The least that can stand in for the encoder."""

    def __init__(self, pad_id: int = PAD) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(SHAPE["num_tokens"], SHAPE["dim"])

    def forward(self, seq: Tensor, mask: Tensor) -> Tensor:
        weight_BT1 = (mask / mask.sum(dim=1, keepdim=True))[..., None]
        # It gets what it is given in the stock class, which is what a text was padded with.
        assert torch.equal(seq == self.pad_id, ~mask)
        mean_BD: Tensor = (self.embedding(seq.clamp(min=0)) * weight_BT1).sum(dim=1)
        return mean_BD


@pytest.mark.parametrize("pad_id", [-1, PAD])
def test_a_custom_encoder_takes_the_place_of_ours(ours: Ours, pad_id: int) -> None:
    encoder = MeanOfEmbeddings(pad_id)
    model, tokens_BT = ours(**ROTARY, encoder=encoder, pad_id=pad_id), padded(pad_id=pad_id)
    rows = [encoder.embedding(row[row != pad_id]).mean(dim=0) for row in tokens_BT]
    expected_BZ = model.to_latent_mean_log_variance[0](torch.stack(rows))[:, : SHAPE["dim_latent"]]
    assert_close(model.encode_to_latents(tokens_BT, sample=False), expected_BZ, rtol=1e-5, atol=1e-5)
    assert model.encoder is encoder
    gradient = torch.autograd.grad(model(tokens_BT), encoder.embedding.weight)[0]
    assert gradient.abs().sum() > 0


def test_the_stored_encoding_is_the_mean_and_does_not_depend_on_the_batch(ours: Ours) -> None:
    model, tokens_BT = ours(**ROTARY), padded()
    latents_BZ, (mean_BZ, _) = model.encode_to_latents(tokens_BT, return_mean_log_var=True, sample=False)
    assert torch.equal(latents_BZ, mean_BZ)
    assert torch.equal(latents_BZ, model.encode_to_latents(tokens_BT, sample=False))
    for rows in (tokens_BT[:1], tokens_BT[2:], tokens_BT.flip(0)[:3]):
        where = [tokens_BT.tolist().index(row) for row in rows.tolist()]
        assert_close(model.encode_to_latents(rows, sample=False), latents_BZ[where], rtol=0, atol=1e-5)


def test_a_sampled_encoding_equals_the_stock_class(pair: Pair) -> None:
    results = []
    for model in pair(**ROTARY):
        torch.manual_seed(4)
        results.append(model.encode_to_latents(padded(), return_mean_log_var=True))
    assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)
    assert not torch.equal(results[1][0], results[1][1][0])


@pytest.mark.parametrize("call", ["encode_to_latents", "forward", "generate"])
def test_a_generator_makes_every_call_reproducible_and_leaves_torch_alone(ours: Ours, call: str) -> None:
    model = ours(**ROTARY).train()
    calls: dict[str, Callable[[torch.Generator], Tensor]] = {
        "encode_to_latents": lambda g: model.encode_to_latents(padded(), generator=g),
        "forward": lambda g: model(padded(), generator=g),
        "generate": lambda g: model.generate(random_tokens(4, 2), 12, seq_for_latents=padded(), generator=g),
    }
    before = torch.get_rng_state()
    first, again, other = (calls[call](torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_drops_latents_at_their_rate(ours: Ours) -> None:
    model = ours(**ROTARY, latents_dropout_prob=0.25).train()
    dropped_B = model._drop_latents(4000, model.device, torch.Generator().manual_seed(0))
    assert abs(float(dropped_B.float().mean()) - 0.25) < 0.03
    assert not model.eval()._drop_latents(100, model.device, torch.Generator().manual_seed(0)).any()


def test_generate_restores_the_mode_of_every_part(ours: Ours) -> None:
    """The stock class leaves the encoder in training mode, and a frozen encoder is not to be woken."""
    model = ours(**ROTARY).train()
    model.encoder.eval()
    model.generate(random_tokens(2, 3), 2, seq_for_latents=padded(2))
    with pytest.raises(ConfigError):
        model.generate(random_tokens(2, 0), 2)
    assert model.training
    assert model.decoder.training
    assert not any(part.training for part in model.encoder.modules())
    model.train()
    model.generate(random_tokens(2, 3), 2)
    assert all(part.training for part in model.modules())


def test_generate_encodes_without_dropout(ours: Ours) -> None:
    """The stock class encodes with the encoder in whatever mode it is, so that dropout changes the text."""
    model = ours(**ROTARY, enc_kwargs={"attn_dropout": 0.5, "ff_dropout": 0.5})
    latents_BZ = model.encode_to_latents(padded(), generator=torch.Generator().manual_seed(1))
    expected = model.generate(random_tokens(4, 3), 10, latents=latents_BZ, temperature=0.0)
    for _ in range(3):
        generator = torch.Generator().manual_seed(1)
        text_BT = model.train().generate(
            random_tokens(4, 3), 10, seq_for_latents=padded(), generator=generator, temperature=0.0
        )
        assert torch.equal(text_BT, expected)


def test_enc_kwargs_and_dec_kwargs_override_shared_ones() -> None:
    """The stock class fails on a keyword that is given twice."""
    options: dict[str, Any] = {
        "ff_mult": 4,
        "enc_kwargs": {"ff_mult": 1, "heads": 1, "attn_project_out": True},
        "dec_kwargs": {"ff_mult": 2},
    }
    with pytest.raises(TypeError, match="multiple values"):
        reference.GPTVAE(**SHAPE, **options)
    model = GPTVAE(**SHAPE, **options)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes["encoder.attn_layers.layers.0.1.to_q.weight"] == (1 * 16, 32)
    assert shapes["encoder.attn_layers.layers.1.1.ff.2.weight"] == (32, 1 * 32)
    assert shapes["decoder.attn_layers.layers.1.1.ff.2.weight"] == (32, 2 * 32)


@pytest.mark.parametrize("positions", [ROTARY, POSITIONS["rotary-flash"]], ids=["rotary", "rotary-flash"])
def test_a_rotary_row_that_lost_its_latent_equals_one_that_never_had_one(ours: Ours, positions: dict[str, Any]) -> None:
    model, tokens_BT = ours(**positions), random_tokens(3, 10)
    keep_B = torch.tensor([False, True, False])
    masked_BTD = model.hidden(tokens_BT, random_latents(3), keep_B)
    bare_BTD = model.decoder(tokens_BT, return_embeddings=True)
    assert_close(masked_BTD[~keep_B], bare_BTD[~keep_B], rtol=0, atol=5e-6)
    assert_close(model.hidden(tokens_BT, None), bare_BTD, rtol=0, atol=5e-6)
    assert (masked_BTD[1] - bare_BTD[1]).abs().amax() > 0.1


@pytest.mark.parametrize("heads", [{}, {"heads": 1, "attn_dim_head": 32}], ids=["heads", "one-head"])
@pytest.mark.parametrize("keep", [None, [True, False, True, False], [False] * 4], ids=["all", "some", "none"])
@every_way
def test_the_fused_layers_equal_x_transformers(
    ours: Ours, keep: list[bool] | None, heads: dict[str, int], conditioning: str
) -> None:
    """Values and gradients, over padded rows; a single head has no output product."""
    model = ours(**POSITIONS["rotary-flash"], **heads, conditioning=conditioning)
    tokens_BT, latents_BZ = padded(), random_latents(4)
    assert model.fused_encoder is not None
    assert model.fused_decoder is not None
    real_BT = tokens_BT != PAD
    results = []
    for plain in (True, False):
        posterior = model.posterior(tokens_BT, plain=plain)
        hidden_BTD = model.hidden(tokens_BT, latents_BZ, None if keep is None else torch.tensor(keep), plain=plain)
        hidden_ND = hidden_BTD[real_BT]
        loss = posterior.kl_BZ().mean() + hidden_ND.square().mean() + hidden_ND.sin().mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        results.append((posterior.mean_BZ, posterior.log_var_BZ, hidden_ND, [g for g in gradients if g is not None]))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_row_of_nothing_but_padding_has_a_finite_posterior(tiny_model: Callable[..., GPTVAE]) -> None:
    """That of x-transformers, trained or not; the rows beside it do not notice."""
    model = tiny_model()
    tokens_BT = torch.tensor([[18, 3, 4, 19], [PAD] * 4])
    expected = model.posterior(tokens_BT, plain=True)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            found = model.posterior(tokens_BT)
        assert_close(found.mean_BZ, expected.mean_BZ, rtol=1e-4, atol=1e-5)
        assert_close(found.log_var_BZ, expected.log_var_BZ, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_a_row_of_nothing_but_padding_stays_finite_under_autocast(
    tiny_model: Callable[..., GPTVAE], dtype: torch.dtype, grad: bool
) -> None:
    """What is as good as minus infinity in float32 is infinite in float16."""
    model, tokens_BT = tiny_model(), torch.tensor([[18, 3, 4, 19], [PAD] * 4])
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
        assert model.posterior(tokens_BT).in_float32().kl_BZ().isfinite().all()


@pytest.mark.parametrize("width", [16, 64])
def test_rotations_have_the_gradients_that_differences_find(ours: Ours, width: int) -> None:
    """Half of the pairs of a head turn."""
    stack = ours(**ROTARY, attn_dim_head=width).fused_decoder
    assert stack is not None
    turns_TC = stack.turns(2)
    assert int((turns_TC[1] != 1).sum()) == width // 4
    random = torch.Generator().manual_seed(0)
    qkv_BTXHK = torch.randn(1, 2, 3, 1, width, generator=random, dtype=torch.float64, requires_grad=True)
    rotate: Any = fused._Rotation.apply
    assert torch.autograd.gradcheck(lambda qkv: rotate(qkv, turns_TC), (qkv_BTXHK,))


def scale(wrapper: Any, factors_LBD: torch.Tensor) -> None:
    """Multiplies the embeddings of x-transformers' model, and what every block adds to the residual stream."""
    wrapper.token_emb.register_forward_hook(lambda module, inputs, output: output * factors_LBD[0][:, None])
    for block, factors_BD in zip(wrapper.attn_layers.layers, factors_LBD[1:], strict=True):

        def scaled(module: Any, inputs: Any, output: Any, factors_BD: torch.Tensor = factors_BD) -> Any:
            if isinstance(output, tuple):  # of attention, with what it remembers
                return (output[0] * factors_BD[:, None], *output[1:])
            return output * factors_BD[:, None]

        block[1].register_forward_hook(scaled)


@pytest.mark.parametrize("keep", [None, [True, False, True, False]], ids=["all", "some"])
@every_way
def test_dropout_scales_tokens_what_each_block_adds_and_the_hidden_states(
    ours: Ours, keep: list[bool] | None, conditioning: str
) -> None:
    model = ours(**POSITIONS["rotary-flash"], conditioning=conditioning)
    tokens_BT, latents_BZ = padded(), random_latents(4)
    real_BT = tokens_BT != PAD
    keep_B = None if keep is None else torch.tensor(keep)
    torch.manual_seed(1)
    drop_LBD = torch.rand(6, 4, 32)
    undropped_BTD = model.hidden(tokens_BT, latents_BZ, keep_B)
    found_BTD = model.hidden(tokens_BT, latents_BZ, keep_B, drop_LBD)
    scale(model.decoder, drop_LBD[:-1])
    expected_BTD = model.hidden(tokens_BT, latents_BZ, keep_B, plain=True) * drop_LBD[-1][:, None]
    assert_close(found_BTD[real_BT], expected_BTD[real_BT], rtol=1e-4, atol=1e-5)
    assert (undropped_BTD - found_BTD)[real_BT].abs().amax() > 0.1


@pytest.mark.parametrize("keep", [None, [True, False, True, False]], ids=["all", "some"])
@every_way
@torch.no_grad()
def test_the_fused_layers_equal_x_transformers_without_gradients(
    ours: Ours, keep: list[bool] | None, conditioning: str
) -> None:
    """Where nothing flows back another path computes, in place."""
    model = ours(**POSITIONS["rotary-flash"], conditioning=conditioning)
    tokens_BT, latents_BZ = padded(), random_latents(4)
    keep_B, real_BT = None if keep is None else torch.tensor(keep), tokens_BT != PAD
    for _ in range(2):
        (mean, log_var, hidden), (plain_mean, plain_log_var, plain_hidden) = (
            (
                *vars(model.posterior(tokens_BT, plain=plain)).values(),
                model.hidden(tokens_BT, latents_BZ, keep_B, plain=plain),
            )
            for plain in (False, True)
        )
        assert_close(
            (mean, log_var, hidden[real_BT]), (plain_mean, plain_log_var, plain_hidden[real_BT]), rtol=0, atol=2e-5
        )


@torch.no_grad()
def test_frozen_passes_without_gradients_read_the_weights_once(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only they, and only within: a pass with gradients sees the weights as they are, and so does what follows."""
    model, tokens_BT, latents_BZ = ours(**ROTARY), padded(), random_latents(4)
    reads, read = [], fused.Stack.read

    def counted(stack: fused.Stack) -> list[fused.Layer]:
        reads.append(stack)
        return read(stack)

    monkeypatch.setattr(fused.Stack, "read", counted)

    def assert_passes_equal_x_transformers() -> None:
        fast, plain = (
            (model.posterior(tokens_BT, plain=plain).mean_BZ, model.hidden(tokens_BT, latents_BZ, plain=plain))
            for plain in (False, True)
        )
        assert_close(fast[0], plain[0], rtol=0, atol=2e-5)
        assert_close(fast[1][tokens_BT != PAD], plain[1][tokens_BT != PAD], rtol=0, atol=2e-5)

    for _ in range(2):
        with model.frozen():
            for _ in range(3):
                assert_passes_equal_x_transformers()
            assert reads == [model.fused_encoder, model.fused_decoder]
            with torch.enable_grad():
                assert_passes_equal_x_transformers()
            assert len(reads) == 4
        for parameter in model.parameters():
            parameter.mul_(-0.5)
        assert_passes_equal_x_transformers()
        reads.clear()


@torch.no_grad()
def test_frozen_weights_are_the_threads_that_froze_them(ours: Ours) -> None:
    """Another may compute in another type at the same time."""
    model, tokens_BT = ours(**ROTARY), padded()
    expected = model.posterior(tokens_BT).mean_BZ
    with ThreadPoolExecutor(1) as other:
        with model.frozen(), torch.autocast("cpu", torch.bfloat16):
            rough = model.posterior(tokens_BT).mean_BZ

            @torch.no_grad()
            def beside() -> Tensor:
                with model.frozen():
                    return model.posterior(tokens_BT).mean_BZ

            assert torch.equal(other.submit(beside).result(), expected)
            assert torch.equal(model.posterior(tokens_BT).mean_BZ, rough)
        assert not torch.equal(rough, expected)
        assert torch.equal(model.posterior(tokens_BT).mean_BZ, expected)


@torch.no_grad()
def test_freezing_what_is_frozen_changes_nothing(ours: Ours, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that froze the model around us goes on with its own copy."""
    model, tokens_BT = ours(**ROTARY), padded()
    with model.frozen():
        expected = model.posterior(tokens_BT).mean_BZ
        monkeypatch.setattr(fused.Stack, "read", None)
        with model.frozen():
            assert torch.equal(model.posterior(tokens_BT).mean_BZ, expected)
        assert torch.equal(model.posterior(tokens_BT).mean_BZ, expected)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_frozen_model_is_not_frozen(ours: Ours, duplicate: Callable[[GPTVAE], GPTVAE]) -> None:
    model, tokens_BT = ours(**ROTARY), padded()
    with model.frozen():
        model.posterior(tokens_BT)
        other = duplicate(model)
        assert other.fused_encoder is not None
        assert other.fused_encoder is not model.fused_encoder
        for parameter in other.parameters():
            parameter.mul_(-0.5)
        assert_close(
            other.posterior(tokens_BT).mean_BZ, other.posterior(tokens_BT, plain=True).mean_BZ, rtol=0, atol=2e-5
        )


@torch.no_grad()
def test_a_pass_without_gradients_leaves_its_input_as_it_is(ours: Ours) -> None:
    stack = ours(**ROTARY).fused_decoder
    assert stack is not None
    x_BTD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    before = x_BTD.clone()
    assert not torch.equal(stack(x_BTD), x_BTD)
    assert torch.equal(x_BTD, before)


class Adapter(nn.Module):
    """What LoRA puts in a layer's place, whose weight it gives for its own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + self.up(self.down(x))
        return adapted


def linears(model: GPTVAE) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Those of the layers and of the logits, with where they are held."""
    return [
        (parent, name, child)
        for part in (model.encoder, model.decoder)
        for parent in part.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


def adapt(model: GPTVAE) -> None:
    for parent, name, linear in linears(model):
        setattr(parent, name, Adapter(linear))


def quantise(model: GPTVAE) -> None:
    """As dynamic quantisation does: by a module that holds no float weight."""
    for parent, name, linear in linears(model):
        coarse = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        coarse.load_state_dict({key: (8 * tensor).round() / 8 for key, tensor in linear.state_dict().items()})
        setattr(parent, name, nn.Sequential(coarse))


def prune_half(model: GPTVAE) -> None:
    for _, _, linear in linears(model):
        prune.l1_unstructured(linear, "weight", 0.5)  # type: ignore[no-untyped-call]


def normalise(model: GPTVAE) -> None:
    for _, _, linear in linears(model):
        parametrizations.weight_norm(linear).parametrizations.weight.original0.data.mul_(1.5)


def hook(model: GPTVAE) -> None:
    for part in (model.encoder, model.decoder):
        part.get_submodule("attn_layers.layers.1.1").register_forward_hook(lambda module, inputs, output: 2 * output)


def interpolate(model: GPTVAE) -> None:
    for part in (model.encoder, model.decoder):
        rotary: Any = part.get_submodule("attn_layers.rotary_pos_emb")
        rotary.interpolation_factor = 4.0


def replace_parts(model: GPTVAE) -> None:
    model.encoder = MeanOfEmbeddings()
    biased = nn.Linear(SHAPE["dim"], SHAPE["num_tokens"])
    biased.load_state_dict({"weight": model.decoder.to_logits.weight, "bias": 3 * torch.randn(SHAPE["num_tokens"])})
    model.decoder.to_logits = biased


@pytest.mark.parametrize("change", [adapt, quantise, prune_half, normalise, hook, interpolate, replace_parts])
def test_a_changed_part_computes_as_it_was_changed(ours: Ours, change: Callable[[GPTVAE], None]) -> None:
    """The fused path reads weights, and would not notice."""
    model = ours(**ROTARY)
    tokens_BT, latents_BZ = random_tokens(3, 10), random_latents(3)

    def found() -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
        model.eval()
        text_BT = model.generate(tokens_BT[:, :3], 10, latents=latents_BZ, temperature=0.0)
        logits_BTV = model.logits(model.hidden(tokens_BT, latents_BZ))
        torch.manual_seed(3)
        return model.posterior(tokens_BT).mean_BZ, logits_BTV, model(tokens_BT), text_BT.tolist()

    before = found()
    torch.manual_seed(1)
    change(model)
    mean_BZ, logits_BTV, loss, text = found()
    with mock.patch.object(fused, "Frozen", side_effect=AssertionError), mock.patch.object(fused.Stack, "read", None):
        expected = found()
    assert_close((mean_BZ, logits_BTV, loss), expected[:3], rtol=0, atol=0)
    assert text == expected[3]
    assert not torch.equal(mean_BZ, before[0])
    assert (logits_BTV - before[1]).abs().max() > 0.1
    assert text != before[3]


def test_dropout_that_was_set_later_drops_in_training_alone(ours: Ours) -> None:
    model, tokens_BT = ours(**ROTARY), padded()
    for module in model.encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    assert model.fused_encoder is not None
    expected_BZ = model.posterior(tokens_BT).mean_BZ
    first_BZ, second_BZ = (model.train().posterior(tokens_BT).mean_BZ for _ in range(2))
    assert not torch.equal(first_BZ, second_BZ)
    assert torch.equal(model.eval().posterior(tokens_BT).mean_BZ, expected_BZ)


@pytest.mark.parametrize("grad", [True, False])
def test_frequencies_that_were_loaded_count(ours: Ours, grad: bool) -> None:
    """They are in the state dict, and what is made of them is kept from pass to pass."""
    model, tokens_BT, latents_BZ = ours(**ROTARY), padded(), random_latents(4)
    with torch.set_grad_enabled(grad):
        before_BTD = model.hidden(tokens_BT, latents_BZ)
        changed = {name: 0.3 * t if "inv_freq" in name else t for name, t in model.state_dict().items()}
        model.load_state_dict(changed)
        found_BTD, plain_BTD = (model.hidden(tokens_BT, latents_BZ, plain=plain) for plain in (False, True))
    assert model.fused_decoder is not None
    assert (found_BTD - before_BTD).abs().max() > 0.1
    assert_close(found_BTD[tokens_BT != PAD], plain_BTD[tokens_BT != PAD], rtol=0, atol=2e-5)


def test_a_replica_computes_with_its_own_weights(ours: Ours) -> None:
    """`DataParallel` copies every module for a device, and all else is shared."""

    def replicate(module: Any) -> Any:
        """As torch's `replicate` does, which asks for a GPU: weights are no parameters there."""
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(replica, name, replicate(child))
        for name, parameter in module._parameters.items():
            replica.__dict__[name] = None if parameter is None else -0.5 * parameter
        return replica

    model = ours(**ROTARY)
    replica, negative = replicate(model), copy.deepcopy(model)
    for parameter in negative.parameters():
        parameter.data.mul_(-0.5)
    losses = []
    for each in (replica, negative, model):
        torch.manual_seed(3)
        losses.append(each(padded()))
    assert_close(losses[0], losses[1])
    assert abs(losses[0] - losses[2]) > 0.1


def test_dropout_as_factors_is_refused_where_it_would_be_lost(ours: Ours) -> None:
    model = ours(**ROTARY)
    hook(model)
    with pytest.raises(ConfigError, match="dropout as factors, which only the fused layers take"):
        model.hidden(padded(), random_latents(4), None, torch.ones(6, 4, SHAPE["dim"]))


def test_heads_of_an_odd_width_go_through_x_transformers(ours: Ours) -> None:
    """The fused layers compute in pairs of a head's numbers."""
    model = ours(**ROTARY, attn_dim_head=9)
    assert model.fused_encoder is model.fused_decoder is None
    text_BT = model.generate(random_tokens(2, 3), 6, latents=random_latents(2), temperature=0.0)
    assert text_BT.shape == (2, 6)


def test_latents_take_the_number_type_of_the_model(ours: Ours) -> None:
    model, latents_BZ = ours(**ROTARY), random_latents(2)
    for dtype in (torch.float64, torch.bfloat16):
        model = model.to(dtype)
        choices: list[dict[str, Any]] = [{}, {"cache_kv": False}, {"restrict_to_max_seq_len": False}]
        for options in choices:
            text_BT = model.generate(random_tokens(2, 3), 6, latents=latents_BZ, temperature=0.0, **options)
            assert text_BT.shape == (2, 6)


@torch.no_grad()
def test_a_fixed_model_keeps_its_figures(ours: Ours) -> None:
    """Releases of x-transformers, and of torch-einops-utils with its losses and means, come weekly; one that computes
    something else shows here."""
    model = ours(**ROTARY)
    for number, parameter in enumerate(model.parameters()):
        steps = torch.arange(parameter.numel(), dtype=torch.float64).view(parameter.shape)
        parameter.copy_(0.4 * torch.sin(0.7 * steps + number))
    tokens_BT = torch.arange(8).view(2, 4) % PAD
    posterior = model.posterior(tokens_BT, plain=True)
    logits_BTV = model.logits(model.hidden(tokens_BT, posterior.mean_BZ, plain=True))
    figures = [posterior.mean_BZ.square().mean(), posterior.log_var_BZ.square().mean(), logits_BTV.square().mean()]
    assert [float(figure) for figure in figures] == pytest.approx([0.377555, 0.385526, 0.433956], rel=1e-4)
    tokens_BT[1, 2:] = PAD
    with mock.patch.object(torch, "randn_like", torch.zeros_like):
        total, (ar_loss, kl_loss) = model(tokens_BT, return_all_losses=True)
    assert [float(loss) for loss in (total, ar_loss, kl_loss)] == pytest.approx(
        [5.036933, 2.536817, 2.500116], rel=1e-4
    )


def test_rotations_are_as_many_as_were_asked_for_whatever_another_thread_does(ours: Ours) -> None:
    """One that reads a shorter text may put its own in their place at any moment."""
    stack = ours(**ROTARY).fused_decoder
    assert stack is not None

    class Raced(type(stack)):  # type: ignore[misc]
        def __setattr__(self, name: str, value: Any) -> None:
            short = isinstance(value, fused.Turns)
            super().__setattr__(name, value._replace(turns_SC=value.turns_SC[:64]) if short else value)

    stack.__class__ = Raced
    assert len(stack.turns(100)) == 100
    assert len(stack.turns(100)) == 100
