"""The training objective, recomputed row by row from x-transformers' own modules and `torch.distributions`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence
from torch.testing import assert_close

from gptvae_cli.model import GPTVAE
from gptvae_cli.objective import (
    _LOGITS_TOGETHER,
    BagOfWords,
    Batch,
    Noise,
    Terms,
    cross_entropy_BT,
    mean_kl,
    objective,
    summed_cross_entropy,
)
from gptvae_cli.schedule import Weights
from tests.conftest import stock_of

PAD, BOS, EOS = 17, 18, 19
ROWS, WIDTH = 5, 8
ELBO = Weights(objective="elbo", beta=1.0, floor=0.0, bag_of_words=0.0)

TinyModel = Callable[..., GPTVAE]


def texts(seed: int = 0) -> list[list[int]]:
    """Rows `BOS text EOS` of 0 to 9 plain tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (3, 0, 9, 5, 1)
    return [[BOS, *torch.randint(0, PAD, (n,), generator=generator).tolist(), EOS] for n in lengths]


def batch_of(rows: Sequence[Sequence[int]], source: Sequence[Sequence[int]] | None = None, extra: int = 0) -> Batch:
    """These rows, padded to the longest and `extra` more."""

    def padded(lists: Sequence[Sequence[int]]) -> Tensor:
        width = max(map(len, lists)) + extra
        return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in lists])

    tokens = sum(len(row) - 1 for row in rows)
    return Batch(padded(rows), None if source is None else padded(source), tokens)


def latent_noise(rows: int = ROWS, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def log_prob(logits: Tensor, token: Tensor) -> Tensor:
    found: Tensor = Categorical(logits=logits).log_prob(token)  # type: ignore[no-untyped-call]
    return found


@torch.no_grad()
def reference_sums(
    stock: Any, rows: Sequence[list[int]], source: Sequence[list[int]], noise_BZ: Tensor, keep: Sequence[bool]
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Cross-entropy of each row, KL [B Z] and latents [B Z], one unpadded row at a time."""
    nats, kls, latents = [], [], []
    for row, read, noise_Z, kept in zip(rows, source, noise_BZ, keep, strict=True):
        mean_1Z, log_var_1Z = stock.to_latent_mean_log_variance(stock.encoder(torch.tensor([read])))
        posterior = Normal(mean_1Z, (log_var_1Z / 2).exp())
        z_1Z = posterior.loc + posterior.scale * noise_Z
        kls.append(kl_divergence(posterior, Normal(0.0, 1.0))[0])
        latents.append(z_1Z[0])
        inputs_1T, targets_T = torch.tensor([row[:-1]]), torch.tensor(row[1:])
        # A row without its latent is one that never had one.
        prepended = stock.from_latent_to_prepend_token(z_1Z) if kept else None
        logits_TV = stock.decoder(inputs_1T, prepend_embeds=prepended)[0, -len(targets_T) :]
        nats.append(-log_prob(logits_TV, targets_T).sum())
    return nats, torch.stack(kls), torch.stack(latents)


def gradients(total: Tensor, model: GPTVAE) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), found, strict=True)}


@pytest.mark.parametrize("keep", [None, (True, False, True, True, False), (False,) * ROWS], ids=str)
@pytest.mark.parametrize("weights", [ELBO, Weights("elbo", 0.3, 0.6, 0.0), Weights("elbo", 1.0, 50.0, 0.0)], ids=str)
@pytest.mark.parametrize("other_text", [False, True], ids=["itself", "latents-from"])
def test_the_elbo_objective_is_the_formula_of_the_design(
    tiny_model: TinyModel, keep: tuple[bool, ...] | None, weights: Weights, other_text: bool
) -> None:
    """The floor is under the batch mean of a dimension, over the rows that kept their latent, and in nats per text:
    so it is counted once for each of these rows."""
    model = tiny_model()
    rows = texts()
    source = texts(seed=5) if other_text else rows
    keep_B = None if keep is None else torch.tensor(keep)
    noise = Noise(latent_noise(), keep_B)
    nats, kl_BZ, _ = reference_sums(stock_of(model), rows, source, noise.latent_BZ, keep or (True,) * ROWS)
    tokens = sum(len(row) - 1 for row in rows)
    kept_kl = 0.0
    kept = [i for i in range(ROWS) if keep is None or keep[i]]
    for z in range(WIDTH):
        mean = sum(float(kl_BZ[i, z]) for i in kept) / max(1, len(kept))
        kept_kl += len(kept) * max(mean, weights.floor)
    expected = (sum(map(float, nats)) + weights.beta * kept_kl) / tokens

    found = objective(model, None, batch_of(rows, source if other_text else None), noise, weights)

    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    assert found.cross_entropy.item() == pytest.approx(sum(map(float, nats)), rel=1e-5)
    assert found.kl.item() == pytest.approx(kl_BZ.sum().item(), rel=1e-5), "the raw KL, of all rows"
    assert found.bag_of_words == 0
    assert not found.cross_entropy.requires_grad
    assert not found.kl.requires_grad


def test_the_floor_lies_under_the_batch_mean_and_not_under_every_row(tiny_model: TinyModel) -> None:
    """A floor for each row would cost a batch in which one row has all the KL of a dimension."""
    model = tiny_model()
    batch, noise = batch_of(texts()), Noise(latent_noise())
    kl_BZ = model.posterior(batch.tokens_BT).kl_BZ().detach()
    floor = float(kl_BZ.mean(dim=0).median())
    with_floor = objective(model, None, batch, noise, replace(ELBO, floor=floor))
    without = objective(model, None, batch, noise, ELBO)
    per_row = (kl_BZ.clamp(min=floor).sum() - kl_BZ.sum()) / batch.target_tokens
    per_mean = ROWS * (kl_BZ.mean(0).clamp(min=floor) - kl_BZ.mean(0)).sum() / batch.target_tokens
    assert_close(with_floor.total - without.total, per_mean, rtol=1e-3, atol=1e-5)
    assert float(per_row) > 1.05 * float(per_mean)


@pytest.mark.parametrize(("floor", "beta"), [(0.0, 1.0), (0.4, 0.3)])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_stock_units_give_the_total_of_the_stock_class(
    tiny_model: TinyModel, floor: float, beta: float, dropout: float
) -> None:
    """Noise in the stock order: the latent's first, then what is dropped."""
    model = tiny_model()
    stock = stock_of(model)
    stock.vae_kl_div_floor, stock.vae_kl_loss_weight, stock.latents_dropout.p = floor, beta, dropout
    batch = batch_of(texts())
    torch.manual_seed(3)
    expected = stock.train()(batch.tokens_BT)
    torch.manual_seed(3)
    latent_BZ = torch.randn(ROWS, WIDTH)
    keep_B = torch.nn.functional.dropout(torch.ones(ROWS), dropout).bool()
    found = objective(model, None, batch, Noise(latent_BZ, keep_B), Weights("stock", beta, floor, 0.0))
    assert_close(found.total, expected, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(expected, list(stock.parameters()), allow_unused=True)
    for (name, ours), other in zip(gradients(found.total, model).items(), theirs, strict=True):
        assert_close(ours, torch.zeros_like(ours) if other is None else other, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("kind", "floor", "rate"),
    [
        ("elbo", 0.0, 0.0),
        ("stock", 0.0, 0.0),
        ("elbo", 0.0, 0.9),
        ("elbo", 0.0, 1.1),
        ("elbo", 0.5, 0.0),
        ("elbo", 1.0, 1.01),
    ],
)
def test_micro_batches_add_up_to_the_step_that_one_batch_takes(
    tiny_model: TinyModel, kind: Any, floor: float, rate: float
) -> None:
    """With parts of unequal numbers of tokens and rows. Free bits, here of the KL's size, are those of all parts."""
    model = tiny_model()
    head = BagOfWords(WIDTH, 20)
    rows = texts()
    keep_B = torch.tensor([True, False, True, True, False][: len(rows)])
    latent_BZ = latent_noise(len(rows))
    inputs = [(batch_of(rows[part]), Noise(latent_BZ[part], keep_B[part])) for part in (slice(0, 2), slice(2, None))]
    kl_Z = mean_kl(model, inputs)
    expected_BZ = model.posterior(batch_of(rows).encoder_BT).kl_BZ()[keep_B]
    assert_close(kl_Z, expected_BZ.mean(dim=0), rtol=1e-4, atol=1e-5)
    weights = Weights(kind, 0.7, floor * float(kl_Z.mean()), 0.5, rate * float(kl_Z.sum()))
    whole = objective(model, head, batch_of(rows), Noise(latent_BZ, keep_B), weights)
    tokens = batch_of(rows).target_tokens
    whole_step: dict[str, Any] = {"step_tokens": tokens, "step_rows": len(rows), "step_kl_Z": kl_Z}
    parts: list[Terms] = [objective(model, head, *each, weights, **whole_step) for each in inputs]
    total = parts[0].total + parts[1].total
    assert_close(total, whole.total, rtol=1e-5, atol=1e-6)
    expected, found = gradients(whole.total, model), gradients(total, model)
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)
    for term in ("cross_entropy", "kl", "bag_of_words"):
        assert_close(sum(getattr(p, term) for p in parts), getattr(whole, term), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["elbo", "stock"])
def test_padding_changes_neither_the_loss_nor_the_gradient(tiny_model: TinyModel, kind: Any) -> None:
    model, head = tiny_model(), BagOfWords(WIDTH, 20)
    noise = Noise(latent_noise(), torch.tensor([True, True, False, True, True]))
    weights = Weights(kind, 1.0, 0.1, 1.0)
    tight = objective(model, head, batch_of(texts(), texts(3)), noise, weights)
    loose = objective(model, head, batch_of(texts(), texts(3), extra=4), noise, weights)
    for term in ("total", "cross_entropy", "kl", "bag_of_words"):
        assert_close(getattr(loose, term), getattr(tight, term), rtol=1e-5, atol=1e-5, msg=term)
    expected, found = gradients(tight.total, model), gradients(loose.total, model)
    for name in expected:
        assert_close(found[name], expected[name], rtol=1e-3, atol=1e-6, msg=name)


def test_the_loss_of_a_row_does_not_depend_on_its_neighbours(tiny_model: TinyModel) -> None:
    model, rows, noise_BZ = tiny_model(), texts(), latent_noise()
    together = objective(model, None, batch_of(rows), Noise(noise_BZ), ELBO)
    alone = [objective(model, None, batch_of([row]), Noise(noise_BZ[i : i + 1]), ELBO) for i, row in enumerate(rows)]
    assert_close(sum(terms.cross_entropy for terms in alone), together.cross_entropy, rtol=1e-5, atol=1e-4)


def test_word_dropout_hides_inputs_but_never_bos_nor_a_target(tiny_model: TinyModel) -> None:
    """BOS says that a text begins. Hiding everything leaves a decoder that sees BOS, the latent and the places."""
    model, rows = tiny_model(), texts()
    batch, latents_BZ = batch_of(rows), latent_noise()
    plain, shown = (
        summed_cross_entropy(model, batch.tokens_BT, latents_BZ, Noise(latents_BZ, hide_BT=hide_BT))
        for hide_BT in (None, torch.zeros_like(batch.tokens_BT, dtype=torch.bool))
    )
    assert_close(shown, plain, rtol=0, atol=0)
    # Hidden inputs are all the same token, whatever the text, while the targets are the text's own.
    other = [[BOS, *[(token + 1) % PAD for token in rows[2][1:-1]], EOS]]
    inputs = torch.tensor([[BOS, *[PAD] * 9]])
    logits_1TV = model.logits(model.hidden(inputs, latents_BZ[2:3]))
    for row, z in ((rows[2], 2), (other[0], 0)):
        noise = Noise(latents_BZ[2:3], hide_BT=torch.ones(1, 11, dtype=torch.bool))
        found = summed_cross_entropy(model, torch.tensor([row]), latents_BZ[2:3], noise)
        expected_T = -log_prob(logits_1TV[0], torch.tensor(row[1:]))
        assert_close(found, expected_T.sum(), rtol=1e-5, atol=1e-5, msg=str(z))


def test_hiding_leaves_the_callers_noise_as_it_was(tiny_model: TinyModel) -> None:
    model, batch = tiny_model(), batch_of(texts())
    hide_BT = torch.ones_like(batch.tokens_BT, dtype=torch.bool)
    objective(model, None, batch, Noise(latent_noise(), hide_BT=hide_BT), ELBO)
    assert hide_BT.all()


@pytest.mark.parametrize(
    ("product_rows", "few_rows"), [(1, 1), (7, 3), (1000, 1000)], ids=["row by row", "in parts", "at once"]
)
def test_the_summed_cross_entropy_and_its_gradients_are_those_of_torch(
    tiny_model: TinyModel, product_rows: int, few_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding included, whose targets count for nothing. The hidden states are scaled, so the loss is far from ln V."""
    model, batch, latents_BZ = tiny_model().double(), batch_of(texts()), latent_noise().double()
    with torch.no_grad():
        model.decoder.to_logits.weight.mul_(20)
    monkeypatch.setitem(_LOGITS_TOGETHER, "cpu", (product_rows * 20, few_rows * 20))
    plain = cross_entropy_BT(model, batch.tokens_BT, latents_BZ).sum()
    expected = gradients(3 * plain, model)
    found = summed_cross_entropy(model, batch.tokens_BT, latents_BZ, Noise(latents_BZ))
    assert_close(found, plain, rtol=1e-12, atol=0)
    found_gradients = gradients(3 * found, model)
    for name in expected:
        assert_close(found_gradients[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)


def test_logits_may_be_made_in_parts(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, latents_BZ = tiny_model(), batch_of(texts()), latent_noise()
    at_once_BT = cross_entropy_BT(model, batch.tokens_BT, latents_BZ)
    made: list[int] = []

    def logits(hidden_CD: Tensor) -> Tensor:
        made.append(len(hidden_CD))
        return GPTVAE.logits(model, hidden_CD)

    monkeypatch.setattr(model, "logits", logits)
    monkeypatch.setitem(_LOGITS_TOGETHER, "cpu", (7 * 20, 3 * 20))
    assert_close(cross_entropy_BT(model, batch.tokens_BT, latents_BZ), at_once_BT)
    assert max(made) == 7


def test_the_summed_cross_entropy_is_that_of_torch_under_autocast(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_LOGITS_TOGETHER, "cpu", (7 * 20, 3 * 20))
    model, batch, latents_BZ = tiny_model(), batch_of(texts()), latent_noise()
    with torch.autocast("cpu", torch.bfloat16):
        plain = cross_entropy_BT(model, batch.tokens_BT, latents_BZ).sum()
        found = summed_cross_entropy(model, batch.tokens_BT, latents_BZ, Noise(latents_BZ))
    assert_close(found, plain, rtol=1e-3, atol=0)
    expected, found_gradients = gradients(plain, model), gradients(found, model)
    for name in expected:
        assert found_gradients[name].dtype == expected[name].dtype
        assert_close(found_gradients[name], expected[name], rtol=0.05, atol=0.05, msg=name)


def test_a_dropped_row_gets_no_gradient_from_the_decoder(tiny_model: TinyModel) -> None:
    model, batch = tiny_model(), batch_of(texts())
    latents_BZ = latent_noise().requires_grad_()
    keep_B = torch.tensor([True, False, True, False, True])
    nats_BT = cross_entropy_BT(model, batch.tokens_BT, latents_BZ, keep_B=keep_B)
    (gradient_BZ,) = torch.autograd.grad(nats_BT.sum(), latents_BZ)
    assert (gradient_BZ[~keep_B] == 0).all()
    assert (gradient_BZ[keep_B].abs().sum(-1) > 0).all()


def test_a_step_whose_rows_all_lost_their_latent_teaches_the_encoder_nothing(tiny_model: TinyModel) -> None:
    """Neither through the decoder nor through the KL, which would otherwise pull every text to the prior."""
    model = tiny_model()
    noise = Noise(latent_noise(), torch.zeros(ROWS, dtype=torch.bool))
    terms = objective(model, None, batch_of(texts()), noise, replace(ELBO, floor=0.1))
    assert terms.total.isfinite()
    for name, gradient in gradients(terms.total, model).items():
        if name.startswith(("encoder.", "to_latent")):
            assert (gradient == 0).all(), name


def test_bag_of_words_counts_every_plain_token_once_for_each_time_it_occurs(tiny_model: TinyModel) -> None:
    model, rows, head = tiny_model(), texts(), BagOfWords(WIDTH, 20)
    noise = Noise(latent_noise(), torch.tensor([True, False, True, True, True]))
    _, _, latents_BZ = reference_sums(stock_of(model), rows, rows, noise.latent_BZ, [True] * ROWS)
    expected = 0.0
    for row, z_Z in zip(rows, latents_BZ, strict=True):
        for token in row:
            if token not in (PAD, BOS, EOS):
                expected -= log_prob(head.to_logits(z_Z).detach(), torch.tensor(token)).item()
    plain = objective(model, head, batch_of(rows), noise, ELBO)
    taught = objective(model, head, batch_of(rows), noise, replace(ELBO, bag_of_words=0.25))
    assert taught.bag_of_words.item() == pytest.approx(expected, rel=1e-5)
    assert plain.bag_of_words == 0
    tokens = sum(len(row) - 1 for row in rows)
    assert (taught.total - plain.total).item() == pytest.approx(0.25 * expected / tokens, rel=1e-3)
    assert gradients(taught.total, model)["to_latent_mean_log_variance.0.weight"].abs().sum() > 0


def test_the_encoder_alone_reads_the_other_text(tiny_model: TinyModel) -> None:
    """`--latents-from`: the decoder never sees a token of the source, and the words to predict are the target's."""
    model, head = tiny_model(), BagOfWords(WIDTH, 20)
    noise = Noise(torch.zeros(ROWS, WIDTH))
    rows, source = texts(), texts(seed=9)
    paired = objective(model, head, batch_of(rows, source), noise, replace(ELBO, bag_of_words=1.0))
    mean_BZ = model.posterior(batch_of(source).tokens_BT).mean_BZ
    nats_BT = cross_entropy_BT(model, batch_of(rows).tokens_BT, mean_BZ)
    assert_close(paired.cross_entropy, nats_BT.sum(), rtol=1e-5, atol=1e-4)
    assert_close(paired.bag_of_words, head(mean_BZ, batch_of(rows).tokens_BT, (PAD, BOS, EOS)), rtol=1e-5, atol=1e-4)
    assert batch_of(rows, source).encoder_BT.tolist() == batch_of(source).tokens_BT.tolist()


@pytest.mark.requires_cuda
def test_the_objective_on_a_gpu_is_the_one_on_the_cpu(tiny_model: TinyModel) -> None:
    model, head = tiny_model(), BagOfWords(WIDTH, 20)
    noise = Noise(latent_noise(), torch.tensor([True, False, True, True, False]))
    weights = Weights("elbo", 0.7, 0.2, 1.0)
    expected = objective(model, head, batch_of(texts(), texts(4)), noise, weights)
    device = torch.device("cuda")
    found = objective(
        model.to(device), head.to(device), batch_of(texts(), texts(4)).to(device), noise.to(device), weights
    )
    for term in ("total", "cross_entropy", "kl", "bag_of_words"):
        assert_close(getattr(found, term).cpu(), getattr(expected, term), rtol=1e-3, atol=1e-3)


def test_a_target_rate_is_a_floor_under_the_whole_kl(tiny_model: TinyModel) -> None:
    """Below it the KL costs nothing, however it is spread over the dimensions; above it the loss is the ELBO's."""
    model, batch, noise = tiny_model(), batch_of(texts()), Noise(latent_noise())
    plain = objective(model, None, batch, noise, ELBO)
    kl = float(plain.kl) / ROWS
    above = objective(model, None, batch, noise, replace(ELBO, rate=kl - 1))
    assert_close(above.total, plain.total)
    below = objective(model, None, batch, noise, replace(ELBO, rate=kl + 1))
    assert_close(below.total, plain.total + ROWS / batch.target_tokens)
    free = gradients(below.total, model)
    reconstruction = gradients(objective(model, None, batch, noise, replace(ELBO, beta=0.0)).total, model)
    for name, gradient in free.items():
        assert_close(gradient, reconstruction[name])


def test_a_language_model_is_the_decoder_without_a_latent(tiny_model: TinyModel) -> None:
    model, rows = tiny_model(), texts()
    terms = objective(model, None, batch_of(rows), Noise(latent_noise()), replace(ELBO, language_model=True))
    nats, _, _ = reference_sums(stock_of(model), rows, rows, latent_noise(), (False,) * ROWS)
    assert_close(terms.cross_entropy, torch.stack(nats).sum(), rtol=1e-4, atol=1e-4)
    assert float(terms.kl) == 0
    touched = {name for name, gradient in gradients(terms.total, model).items() if bool(gradient.any())}
    assert touched and all(name.startswith("decoder.") for name in touched)
