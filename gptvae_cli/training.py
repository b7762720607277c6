"""The training loop: a generator of reports. Saving, logging and the display are its consumer's business.

Everything random is a pure function of seed, step and row, and the order of the data of (seed, epoch). A run that was
interrupted and resumed therefore takes the very steps that an undisturbed one takes; on a GPU, whose kernels add up in
any order, but for rounding.

Shapes: B batch, T tokens, D model width, Z latent width, L places of dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from statistics import median

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from gptvae_cli.config import ModelConfig, TrainConfig
from gptvae_cli.data import Epoch, Rows, fixed_batches
from gptvae_cli.device import autocast, tokens_together
from gptvae_cli.doctor import diagnosis, treatable, treatment
from gptvae_cli.evaluation import Figures, measure
from gptvae_cli.learner import Counters, Learner, diverged
from gptvae_cli.model import GPTVAE
from gptvae_cli.noise import Purpose, row_bits, row_normals, row_uniforms
from gptvae_cli.objective import Batch, Noise, mean_kl, objective
from gptvae_cli.schedule import UNTREATED, Dropout, Recipe, dropout_shares, learning_rate_factor, recipe

VALIDATIONS = (0.05, *(tenth / 10 for tenth in range(1, 11)))
"""Progress at which a run is validated: a first look, early enough to mend what goes wrong, then every tenth."""
FIRST_PROGRESS = 0.001
"""Least progress that the warm-up counts: at 0 the first step would have a learning rate of 0."""
EARLIEST_BEST = 0.1
"""Progress before which no model is the best: one that has hardly begun has a latent that may only look alive."""
VALIDATION_TEXTS = 1000
REST = 9
"""How many times as long as a validation took the next one waits, where time is what ends a run: a slow machine would
have none left to learn."""
REPORT_SECONDS = 0.5
_TRIAL_STEPS = 5
"""Steps by which speed is measured, their median, as the first ones are slow."""


@dataclass(frozen=True)
class StepReport:
    """What happened since the report before.

    Args:
        step: optimizer steps taken in all.
        progress: share of the run that is done, in [0, 1].
        seconds: since the run began, all sessions counted.
        tokens_per_second, texts_per_second: trained since the report before; validation is not counted.
        learning_rate, beta: of the last step.
        cross_entropy_per_token, bag_of_words_per_token: nats.
        kl: raw, nats per text.
        gradient_norm: of the last step, before clipping.
        figures: of the held-out texts, when this report ends with a validation.
        diagnosis: what these say is wrong with the use of the latent, see `doctor.py`.
        treatment: what is done about it from here on.
        improved: whether this is the best model so far.
        done: whether the run is at its end.
    """

    step: int
    progress: float
    seconds: float
    tokens_per_second: float
    texts_per_second: float
    learning_rate: float
    beta: float
    cross_entropy_per_token: float
    kl: float
    bag_of_words_per_token: float
    gradient_norm: float
    figures: Figures | None = None
    diagnosis: str | None = None
    treatment: str | None = None
    improved: bool = False
    done: bool = False


@dataclass
class _Sums:
    """Sums since the last report, kept on the device so that a step does not wait for it."""

    began: float
    tokens: int = 0
    texts: int = 0
    terms: list[Tensor] = field(default_factory=list)


def train(
    learner: Learner,
    rows: Rows,
    valid: Rows,
    *,
    dtype: torch.dtype,
    should_stop: Callable[[], bool] = lambda: False,
    seconds: Callable[[], float] | None = None,
) -> Iterator[StepReport]:
    """Trains until the first of the limits in the learner's configuration, and reports about twice a second.

    Args:
        learner: is changed in place.
        rows: to train on.
        valid: held out.
        dtype: bfloat16 computes under autocast; weights stay float32.
        should_stop: asked after every step; True ends the loop early, at a step's end.
        seconds: since this session began, start-up included; by default since this call.

    Raises:
        DivergedError: when the loss or the gradient is no longer finite.
    """
    config, counters, model = learner.config, learner.counters, learner.model
    began = time.monotonic()
    held_out = fixed_batches(valid, tokens_together(model.device, dtype), VALIDATION_TEXTS)
    clock = _Clock(learner, len(rows), seconds or (lambda: time.monotonic() - began))
    weights_per_token = model.decoder.get_parameter("token_emb.emb.weight").numel() / rows.store.count
    model.train()
    if clock.progress >= 1:
        return
    sums = _Sums(time.monotonic())
    for micro_batches in _batches_of_steps(learner, rows):
        dropout = dropout_shares(config.dropout, counters.texts / len(rows), weights_per_token)
        beta, learning_rate, norm = _step(learner, micro_batches, clock.progress, dropout, dtype, sums)
        clock.tick()
        done, stop = clock.progress >= 1, should_stop()
        due = done or clock.validation_is_due()
        if not (due or stop or time.monotonic() - sums.began >= REPORT_SECONDS):
            continue
        cross_entropy, kl, bag_of_words, gradient_norm = _read(sums, norm, counters.step)
        elapsed = max(1e-9, time.monotonic() - sums.began)
        clock.tick()
        report = StepReport(
            step=counters.step,
            progress=clock.progress,
            seconds=counters.seconds,
            tokens_per_second=sums.tokens / elapsed,
            texts_per_second=sums.texts / elapsed,
            learning_rate=learning_rate,
            beta=beta,
            cross_entropy_per_token=cross_entropy / sums.tokens,
            kl=kl / sums.texts,
            bag_of_words_per_token=bag_of_words / sums.tokens,
            gradient_norm=gradient_norm,
            done=done,
        )
        yield _validated(report, learner, held_out, dtype, clock) if due else report
        if done or stop:
            return
        sums = _Sums(time.monotonic())


def _batches_of_steps(learner: Learner, rows: Rows) -> Iterator[list[Batch]]:
    """The micro-batches of each step from where the run stands, epoch after epoch without end. The last step of an
    epoch may have fewer of them than the others."""
    config, counters = learner.config, learner.counters
    micro_tokens = max(1, config.batch_tokens // config.accumulate)
    while True:
        epoch = Epoch(rows, micro_tokens, config.seed, counters.epoch)
        batches = epoch.batches(counters.texts - counters.epoch * len(rows))
        while micro_batches := list(islice(batches, config.accumulate)):
            yield micro_batches
        counters.epoch += 1


class _Clock:
    """The time of a run: its seconds, all sessions counted, its progress, and when it is validated next.

    Args:
        learner: whose counters keep the seconds.
        texts: of a pass over the corpus.
        session: seconds since this session began.
    """

    def __init__(self, learner: Learner, texts: int, session: Callable[[], float]) -> None:
        self.config, self.counters, self.texts, self.session = learner.config, learner.counters, texts, session
        if self.counters.step == 0:
            self.counters.start_up = session()
        self.earlier = self.counters.seconds
        self.progress = share_done(self.config, self.counters, texts)
        self.next, self.rested = self._next(), 0.0

    def tick(self) -> None:
        """Looks at the time."""
        self.counters.seconds = self.earlier + self.session()
        # It never goes back, though a validation may turn out faster than the one before.
        self.progress = max(self.progress, share_done(self.config, self.counters, self.texts))

    def validation_is_due(self) -> bool:
        """Whether the next of `VALIDATIONS` is reached, and the last one long enough ago."""
        return self.progress >= self.next and self.counters.seconds >= self.rested

    def validated(self) -> None:
        """Looks at the time after a validation, which has taken all of it since the last look."""
        self.counters.validation = self.earlier + self.session() - self.counters.seconds
        self.tick()
        self.next = self._next()
        if self.config.max_time is not None:  # or what a run comes to would depend on its speed
            self.rested = self.counters.seconds + REST * self.counters.validation

    def _next(self) -> float:
        # Where validating takes long, validations that were missed are not made up for.
        return min((progress for progress in VALIDATIONS if progress > self.progress), default=math.inf)


def _validated(
    report: StepReport, learner: Learner, held_out: Sequence[Batch], dtype: torch.dtype, clock: _Clock
) -> StepReport:
    """A report of this moment, and what the held-out texts say; a latent that is not being used is treated.

    Raises:
        DivergedError: where a figure is not finite.
    """
    config, counters = learner.config, learner.counters
    without = config.without_latent
    figures = measure(learner.model, held_out, seed=config.seed, dtype=dtype, without_latent=without)
    if not all(math.isfinite(value) for value in asdict(figures).values()):
        raise diverged("validation is not finite", counters.step)
    improved = _is_best(learner, figures, clock.progress)
    clock.validated()
    wrong = None if without else diagnosis(figures, config)
    cure = None
    if wrong is not None and not report.done and treatable(config, counters.step, clock.progress, counters.treated_at):
        cure = treatment(config, again=counters.treated_at != UNTREATED)
        counters.treated_at = clock.progress
    return replace(
        report,
        progress=clock.progress,
        seconds=counters.seconds,
        figures=figures,
        diagnosis=wrong,
        treatment=cure,
        improved=improved,
    )


def _is_best(learner: Learner, figures: Figures, progress: float) -> bool:
    """Whether a model is the best so far, whose score it then keeps. Before beta has reached its final value, as it has
    at the end, a model is not comparable with later ones; without a latent it weighs nothing."""
    config, counters, found = learner.config, learner.counters, score(figures, learner.config)
    final = config.without_latent or recipe(config, progress, counters.treated_at).beta_is_final
    if not final or progress < EARLIEST_BEST or found >= counters.best:
        return False
    counters.best = found
    return True


def share_done(config: TrainConfig, counters: Counters, texts: int) -> float:
    """Share of a run that is done, in [0, 1], by that of its limits which it is nearest to.

    Of time it is a share of what was left for learning as the first step began: a schedule is not over because a corpus
    took long to read. Time is kept for the last validation, and a few texts to show: twice as long as the validation
    before took.

    Args:
        config: has the limits.
        counters: of the run.
        texts: of a pass over its corpus.
    """
    if counters.step == 0:  # one is taken, however late it is
        return 0.0
    shares = []
    if config.steps is not None:
        shares.append(counters.step / config.steps)
    if config.epochs is not None:
        shares.append(counters.texts / texts / config.epochs)
    if config.max_time is not None:
        learning = config.max_time - counters.start_up
        spent = counters.seconds - counters.start_up + 2 * counters.validation
        shares.append(spent / learning if learning > 0 else 1.0)
    return min(1.0, max(shares))


def tokens_per_second(
    model: ModelConfig, config: TrainConfig, rows: Rows, device: torch.device, dtype: torch.dtype
) -> float:
    """How fast a model of these sizes would learn here: the median of a few steps of one that is thrown away."""
    learner = Learner(GPTVAE.from_config(model).to(device), config)
    micro_tokens = max(1, config.batch_tokens // config.accumulate)
    speeds = []
    for batch in islice(Epoch(rows, micro_tokens, config.seed, 0).batches(), _TRIAL_STEPS):
        sums = _Sums(time.monotonic())
        norm = _step(learner, [batch], 0.0, Dropout(0.0, 0.0), dtype, sums)[2]
        _read(sums, norm, learner.counters.step)
        speeds.append(batch.target_tokens / (time.monotonic() - sums.began))
    return median(speeds)


def score(figures: Figures, config: TrainConfig) -> float:
    """What the best model has least of: cross-entropy and beta times KL of held-out texts, nats per text, at the final
    beta and whatever the objective is, free bits counted. A model whose latent is not being used is never better than
    one whose latent is, before a treatment or after it."""
    if config.without_latent:
        return figures.cross_entropy_without
    value = figures.cross_entropy + config.vae_kl_loss_weight * figures.kl
    return value if diagnosis(figures, config) is None else value + 1e9


def _step(
    learner: Learner,
    batches: Sequence[Batch],
    progress: float,
    dropout: Dropout,
    dtype: torch.dtype,
    sums: _Sums,
) -> tuple[float, float, Tensor]:
    """One optimizer step; returns beta, learning rate and the gradient's norm, which stays on the device."""
    config, counters, model = learner.config, learner.counters, learner.model
    assert model.config is not None
    device = model.device
    now = recipe(config, progress, counters.treated_at)
    weights = now.weights
    rising = max(progress, FIRST_PROGRESS)
    learning_rate = learner.lr * learning_rate_factor(rising, warmup=config.warmup, decay=config.decay)
    for group in learner.optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    step_tokens, step_rows = sum(batch.target_tokens for batch in batches), sum(len(b.tokens_BT) for b in batches)
    step_kl_Z = None
    parts, rows = [], range(0)
    for batch in batches:
        rows = range(rows.stop, rows.stop + len(batch.tokens_BT))
        length = batch.tokens_BT.shape[1]
        noise = training_noise(now, counters.step, rows, length, model.config, dropout)
        parts.append((batch.to(device), noise.to(device)))
    if len(parts) > 1 and weights.have_free_bits:
        with autocast(device, dtype):
            step_kl_Z = mean_kl(model, parts)
    for batch, noise in parts:
        with autocast(device, dtype):
            terms = objective(
                model,
                learner.bag_of_words,
                batch,
                noise,
                weights,
                step_tokens=step_tokens,
                step_rows=step_rows,
                step_kl_Z=step_kl_Z,
            )
        terms.total.backward()  # type: ignore[no-untyped-call]
        sums.terms.append(torch.stack([terms.cross_entropy, terms.kl, terms.bag_of_words]))
    norm = torch.nn.utils.clip_grad_norm_(learner.named.values(), config.clip)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    sums.tokens += step_tokens
    sums.texts += step_rows
    counters.step += 1
    counters.tokens += step_tokens
    counters.texts += step_rows
    return weights.beta, learning_rate, norm


def training_noise(recipe: Recipe, step: int, rows: range, length: int, model: ModelConfig, dropout: Dropout) -> Noise:
    """The noise of some rows of a step, which is for each a pure function of seed, step and the row's number in it.

    Args:
        rows: their numbers among all of the step, which may be cut into parts.
        length: of their longest text, in tokens; what is hidden of the others' padding does not matter.
    """
    seed = recipe.config.seed
    latent_BZ = row_normals(seed, Purpose.TRAINING_LATENT, step, rows, model.dim_latent)
    keep_B = hide_BT = drop_LBD = None
    if recipe.latents_dropout > 0:
        uniform_B1 = row_uniforms(seed, Purpose.TRAINING_KEEP, step, rows, 1)
        keep_B = torch.from_numpy(uniform_B1[:, 0] >= recipe.latents_dropout)
    if recipe.word_dropout > 0:
        uniform_BT = row_uniforms(seed, Purpose.TRAINING_HIDE, step, rows, model.max_seq_len)
        hide_BT = torch.from_numpy(uniform_BT[:, :length] < recipe.word_dropout)
    if dropout.blocks > 0:
        shares = [dropout.ends, *[dropout.blocks] * 2 * model.depth, dropout.ends]
        shares_L11 = np.array(shares, dtype="float32")[:, None, None]
        bits_BW = row_bits(seed, Purpose.TRAINING_DROP, step, rows, len(shares) * model.dim)
        kept_LBD = rearrange(bits_BW, "b (l d) -> l b d", l=len(shares)) >= np.round(2**16 * shares_L11)
        drop_LBD = torch.from_numpy(kept_LBD / (1 - shares_L11))
    return Noise(torch.from_numpy(latent_BZ), keep_B, hide_BT, drop_LBD)


def _read(sums: _Sums, norm: Tensor, step: int) -> list[float]:
    """The sums and the last gradient norm as numbers: the one place where a step waits for the device.

    Raises:
        DivergedError: where one is not finite.
    """
    values = [*torch.stack(sums.terms).double().sum(dim=0).tolist(), float(norm)]
    names = ("cross-entropy", "KL", "bag-of-words loss", "gradient norm")
    for name, value in zip(names, values, strict=True):
        if not math.isfinite(value):
            raise diverged(f"the {name} is {value}", step)
    return values
