"""Everything `evaluate` says of a model: its figures, and their intervals.

Shapes: N texts, all or those of the sample, Z latent width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gptvae_cli import bleu, bootstrap
from gptvae_cli.errors import CheckpointError, ConfigError
from gptvae_cli.latent import LEAST_NATS, active_dimensions, entropy, has_collapsed, pointwise_information
from gptvae_cli.measuring import NGRAMS, Gathered, Posteriors
from gptvae_cli.probe import PROTOCOL, probe

_COUNTS = ("texts", "empty", "tokens", "words", "bytes")
_LEAST_KL = 0.1
"""Nats per text that a latent costs at least, if what it gains is told as a share of them."""


@dataclass(frozen=True)
class Report:
    """Figures by name, which says their unit, and the intervals of those that have one."""

    values: dict[str, Any]
    intervals: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.values,
            "intervals_95": {name: list(ends) for name, ends in self.intervals.items()},
            "intervals_resamples": bootstrap.RESAMPLES,
            "intervals_seed": bootstrap.SEED,
        }


def report(
    model: Gathered, baseline: Gathered | None = None, *, labels: Sequence[str] | None = None, samples: int, seed: int
) -> Report:
    """All figures of a model, `samples` and `seed` as in `measuring.measured`.

    Args:
        baseline: the same texts by a model to compare with.
        labels: of the texts, in their order.

    Raises:
        CheckpointError: for figures that are not finite.
        ConfigError: where the baseline did not read the same texts: it cuts long ones elsewhere, or changes them.
        DataError, ConfigError: as `probe.probe`.
    """
    order = model.order()
    table = model.table(order)
    if baseline is not None:
        table["baseline"] = _baseline_column(model, baseline, order)
    if not all(np.isfinite(column_N).all() for column_N in table.values()):
        raise CheckpointError("a figure is not a finite number: the weights of the model are too large")
    error = float(table["nll"].std(ddof=1) / math.sqrt(model.texts))
    values: dict[str, Any] = {name: round(table[name].sum()) for name in _COUNTS}
    values |= {"seed": seed, **figures(bootstrap.totals(table)), "nll_standard_error_nats_per_text": error}
    intervals = bootstrap.intervals(table, figures)
    if "exact" in table:
        intervals["exact_match"] = bootstrap.of_share(round(table["exact"].sum()), model.texts)
    cheap = values.get("kl_nats_per_text", 0.0) < _LEAST_KL
    if cheap or (baseline is not None and baseline.sample is not None):
        # A share of next to nothing would be noise, and what saves a baseline with a latent of its own is not known.
        values.pop("efficiency_nats_per_nat", None)
        intervals.pop("efficiency_nats_per_nat", None)
    sample = model.sample
    if sample is None:
        return Report(values | {"nll_samples": None}, intervals)
    if not table[NGRAMS[bleu.ORDER * 2 - 1]].any():
        # Nothing as long as four words was written: BLEU is 0 by convention, and says nothing.
        values["bleu"] = None
        del intervals["bleu"]
    values |= {"nll_samples": samples, "bleu_signature": bleu.SIGNATURE}
    information_N = pointwise_information(*map(torch.from_numpy, (sample.mean_NZ, sample.log_var_NZ, sample.sample_NZ)))
    # An estimate of nothing may be below it.
    values |= _information(model, sample, max(0.0, float(information_N.mean())), values["kl_nats_per_text"])
    lost = values["cross_entropy_shuffled_nats_per_text"] - values["cross_entropy_nats_per_text"]
    values["latent_used"] = not values["collapsed"] and lost >= LEAST_NATS
    if values["mutual_information_most_nats"] == 0:  # equal texts have no other to be told from
        values["latent_used"] = None
    # Of the texts' own terms alone, beside the same posteriors: a text that is drawn twice cannot be told from itself.
    intervals |= bootstrap.intervals(
        {"texts": np.ones(len(information_N)), "nats": information_N.numpy()},
        lambda sums: {"mutual_information_nats": max(0.0, sums["nats"] / sums["texts"])},
    )
    if labels is not None:
        values["probe"], more = _probe(sample, labels, seed)
        intervals |= {f"probe.{name}": interval for name, interval in more.items()}
    return Report(values, intervals)


def _baseline_column(model: Gathered, baseline: Gathered, order: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The NLL of every text by the baseline."""
    different = model.texts
    if baseline.texts == model.texts:
        different = int((np.concatenate(baseline.hashes) != np.concatenate(model.hashes)).sum())
    if different:
        raise ConfigError(
            f"model and baseline read {different:,} of {model.texts:,} texts differently: they cut or change others",
            hint="leave out what either model cuts: texts longer than its max_seq_len, see gptvae info",
        )
    return baseline.table(order)["nll"]


def figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Every figure that is a function of sums over the texts: of all of them, or of a resample."""
    texts, nll = sums["texts"], sums["nll"]
    found = {
        "nll_nats_per_text": nll / texts,
        "perplexity_per_token": math.exp(min(700.0, nll / sums["tokens"])),
        "perplexity_per_word": math.exp(min(700.0, nll / max(1.0, sums["words"]))),
        "bits_per_byte": nll / sums["bytes"] / math.log(2),
    }
    if "baseline" in sums:
        found["baseline_nll_nats_per_text"] = sums["baseline"] / texts
        found["nll_above_baseline_nats_per_text"] = (nll - sums["baseline"]) / texts
    if "kl" not in sums:
        return found
    if "baseline" in sums:
        found["efficiency_nats_per_nat"] = (sums["baseline"] - sums["cross_entropy"]) / max(1e-9, sums["kl"])
    return found | {
        "nll_bound_nats_per_text": (sums["cross_entropy"] + sums["kl"]) / texts,
        "cross_entropy_nats_per_text": sums["cross_entropy"] / texts,
        "cross_entropy_shuffled_nats_per_text": sums["cross_entropy_shuffled"] / texts,
        "cross_entropy_without_nats_per_text": sums["cross_entropy_without"] / texts,
        "kl_nats_per_text": sums["kl"] / texts,
        "token_accuracy": sums["correct"] / sums["tokens"],
        "exact_match": sums["exact"] / texts,
        "bleu": bleu.score([sums[name] for name in NGRAMS]),
    }


def _information(model: Gathered, sample: Posteriors, information: float, kl: float) -> dict[str, Any]:
    """What the latent carries."""
    texts, most = len(sample.texts_N), entropy(sample.read_N)
    mean_NZ = torch.from_numpy(np.concatenate(model.means))
    return {
        "mutual_information_nats": information,
        "mutual_information_texts": texts,
        "mutual_information_most_nats": most,
        "information_share": information / min(kl, most) if min(kl, most) >= _LEAST_KL else None,
        "collapsed": has_collapsed(information, most),
        "dim_latent": mean_NZ.shape[1],
        "active_001": active_dimensions(mean_NZ, 0.01),
        "active_02": active_dimensions(mean_NZ, 0.2),
    }


def _probe(
    sample: Posteriors, labels: Sequence[str], seed: int
) -> tuple[dict[str, Any], dict[str, tuple[float, float]]]:
    """The probes' figures, and the intervals of the accuracies over the held-out texts."""
    texts, read, written = (column_N.tolist() for column_N in (sample.texts_N, sample.read_N, sample.written_N))
    labels = [labels[place] for place in sample.places_N]
    found = probe(sample.mean_NZ, texts, labels, seed=seed, read=read, written=written)
    assert found.written is not None
    held_out = len(found.latent)
    right = {
        "z_accuracy": found.latent,
        "words_accuracy": found.words,
        "reconstruction_words_accuracy": found.written,
    }
    values = {
        **{name: float(flags.mean()) for name, flags in right.items()},
        "words_features": f"TF-IDF of {found.unit}, SVD to the width of z",
        "commonest_label_accuracy": float(found.commonest.mean()),
        "labels": found.labels,
        "texts": found.texts,
        "held_out_texts": held_out,
        "protocol": PROTOCOL,
        "seed": seed,
    }
    return values, {name: bootstrap.of_share(int(flags.sum()), held_out) for name, flags in right.items()}
