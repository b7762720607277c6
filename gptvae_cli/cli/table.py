"""The report of `gptvae evaluate` for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptvae_cli.report import Report

_NATS = "nats/text"
_SOME_WORDS = 3
"""Words of a text on average, its end counted, from which on it consists of words."""


def table(about: dict[str, Any], report: Report) -> Iterator[str]:
    """The lines of a report, in 80 columns where names are short; `about` is what was asked for, as `--json` has it."""
    from gptvae_cli import bootstrap

    values, intervals = report.values, report.intervals

    def line(name: str, key: str, form: str = "{:.2f}", unit: str = "") -> str:
        return _line(name, values[key], intervals.get(key, ()), form, unit)

    unit = about["unit"]
    names = ("standard input" if name == "-" else name for name in about["corpus"])
    kind = "held-out texts" if about["held_out"] else "texts"
    yield f"{values['texts']:,} {kind} ({unit}) of {', '.join(names)}"
    yield f"  {values['tokens']:,} tokens, {values['words']:,} words, {values['bytes']:,} bytes, ends counted"
    if about["texts_cut"] or values["empty"]:
        yield f"  {about['texts_cut']:,} of them cut, {values['empty']:,} empty"
    yield f"{about['model']}, seed {values['seed']}"
    yield f"in brackets {bootstrap.LEVEL:.0%} intervals, from {bootstrap.RESAMPLES:,} resamples of the texts"
    yield ""
    if values["nll_samples"] is None:
        yield "likelihood; the model has no latent, it was trained without one"
    else:
        yield f"likelihood, importance-weighted with {values['nll_samples']:,} samples a text"
    yield line("NLL", "nll_nats_per_text", unit=_NATS)
    for each in ("token", "word") if values["words"] >= _SOME_WORDS * values["texts"] else ("token",):
        key = f"perplexity_per_{each}"
        yield line(f"perplexity per {each}", key, "{:.2f}" if intervals[key][1] < 1e5 else "{:.1e}")
    yield line("bits per byte", "bits_per_byte", "{:.3f}")
    if about["baseline"] is not None:
        yield f"baseline {about['baseline']}"
        yield line("its NLL", "baseline_nll_nats_per_text", unit=_NATS)
        yield line("NLL minus the baseline's", "nll_above_baseline_nats_per_text", unit=_NATS)
        if "efficiency_nats_per_nat" in values:
            yield line("efficiency", "efficiency_nats_per_nat", unit="nats per nat of KL")
    if values["nll_samples"] is None:
        return
    yield "bound of the NLL by one sample"
    yield line("cross-entropy + KL", "nll_bound_nats_per_text", unit=_NATS)
    yield line("KL", "kl_nats_per_text", unit=_NATS)
    yield "cross-entropy"
    yield line("with the right z", "cross_entropy_nats_per_text", unit=_NATS)
    if values["latent_used"] is not None:
        yield line("with another text's z", "cross_entropy_shuffled_nats_per_text", unit=_NATS)
    yield line("with no z", "cross_entropy_without_nats_per_text", unit=_NATS)
    seen = values["mutual_information_texts"]
    yield f"latent of {values['dim_latent']} dimensions"
    yield line("information", "mutual_information_nats", unit=_NATS)
    most = values["mutual_information_most_nats"]
    share = values["information_share"]
    yield f"    at most {most:.2f} can show on {seen:,} texts" + (
        "" if share is None else f"; {share:.0%} of min(KL, that)"
    )
    yield line("dimensions active", "active_001", "{:d}", f"{values['active_02']} strongly")
    guided = "" if about["guidance"] == 1 else f", guidance {about['guidance']:g}"
    source = "a refined latent" if about["refine"] else "the mean"
    yield f"greedy reconstruction from {source}{guided}"
    yield line("tokens in place", "token_accuracy", "{:.1%}")
    yield line("texts whole", "exact_match", "{:.1%}")
    if values["bleu"] is not None:
        yield line("BLEU", "bleu", "{:.1f}")
        yield f"    {values['bleu_signature']}"
    if "probe" in values:
        yield from _probe_lines(about["labels"], values, intervals)
    if values["collapsed"]:
        yield "collapsed: the latent carries next to nothing"
    elif values["latent_used"] is False:
        yield "not used: the decoder writes as well from another text's latent"


def _line(name: str, value: float, interval: Sequence[float], form: str, unit: str = "") -> str:
    """A figure, its interval and its unit."""
    ends = "[" + ", ".join(map(form.format, interval)) + "]" if interval else ""
    return f"  {name:<28}{form.format(value):>8}  {ends:<18}  {unit}".rstrip()


def _probe_lines(labels: str, values: dict[str, Any], intervals: dict[str, tuple[float, float]]) -> Iterator[str]:
    texts, probe = values["texts"], values["probe"]

    def line(name: str, key: str) -> str:
        return _line(name, probe[key], intervals.get(f"probe.{key}", ()), "{:.1%}")

    yield f"labels of {labels}: {probe['labels']}, on {probe['held_out_texts']:,} of {probe['texts']:,} texts held out"
    if probe["texts"] < texts:
        more = " or beyond the most that are used" if texts > values["mutual_information_texts"] else ""
        yield f"  {texts - probe['texts']:,} left out: repeats, of a rare label or of none{more}"
    yield line("from z", "z_accuracy")
    yield line("from TF-IDF + SVD", "words_accuracy")
    yield line("the same, of what is written", "reconstruction_words_accuracy")
    yield line("the commonest label", "commonest_label_accuracy")
