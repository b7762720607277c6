"""Which objective gives a latent that carries the text: arms trained for equal wall time, measured on the test split.

    python -m tests.benchmarks.latent.study --minutes 5 --corpora tatoeba_eng --arms default,none

Results go to `results.jsonl` beside this file, one line a run; a run that is there already is not repeated, so that a
study which was interrupted goes on. `--table` prints them. Corpora are `$GPTVAE_TEST_DATA/NAME_{train,valid,test}.txt`,
`A+B` both together, `A/3` with every third text of A to train on; of `NAME.txt`, a running text, the paragraphs are
taken, every twentieth to validate and to test. `wikitext2` is the sentences of its published valid and test files: of
the latter the last sixth to test, that before to validate, and all others to train on. Where there are labels of the
test split, a linear probe reads them off the latents, as `gptvae evaluate --labels` does.

Every arm gets one thread of the same processor and as many minutes of its time (not of the clock, so that what else the
machine does hardly matters; start-up counted), or steps where its name says so, the same corpus and seed, the sizes of
`micro` unless it names others, and keeps its best validation. The arm `none` is the same decoder trained without a
latent; the best of its kind, on the same processor, is the baseline of "efficiency". Processors: `AMX` is an Intel Xeon
with AMX, which was slower, as the steps say, when the rows marked "(before)" ran; `AVX512` one without products of
bfloat16, a third as fast, with the dropout that grows with the passes; "before" in its rows is without that growth;
`AVX512_BF16` one whose products of bfloat16 are slow, in float32, nearly twice as fast as the last; `Zen 4` an AMD EPYC
with AVX512_BF16, in bfloat16, in which its steps are nearly twice as fast as in float32.
A `w` behind the number of samples says that half of them were from a wider proposal, see `evaluation.PROPOSAL_WIDTHS`;
without, the NLL of the same model is up to 0.3 nats higher.
Column `z` is how the latent entered the decoder, which is `bos` by default since there is a choice.
Rows of `EPYC` are of an earlier protocol: of the clock, two threads of an older one, encoders of two layers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptvae_cli.config import CONDITIONING, STOCK_RECIPE, DataConfig, SizeConfig, TextConfig, TrainConfig

if TYPE_CHECKING:
    from gptvae_cli.checkpoint import Checkpoint
    from gptvae_cli.config import Unit
    from gptvae_cli.device import Device, Precision
    from gptvae_cli.run import Job

RESULTS = Path(__file__).with_name("results.jsonl")

ARMS: dict[str, dict[str, Any]] = {
    "default": {},
    "token": {"conditioning": "token"},
    "none": {"latents_dropout_prob": 1.0},
    "none, drop 0": {"latents_dropout_prob": 1.0, "dropout": 0.0},
    "none, drop 0.2": {"latents_dropout_prob": 1.0, "dropout": 0.2},
    "none, batch 1024": {"latents_dropout_prob": 1.0, "batch_tokens": 1024},
    "decay 0.15": {"decay": 0.15},
    "none, decay 0.7": {"latents_dropout_prob": 1.0, "decay": 0.7},
    "none, lr 4e-3": {"latents_dropout_prob": 1.0, "lr": 4e-3},
    "stock": {"objective": "stock", "conditioning": "token", **STOCK_RECIPE},
    "plain beta 1": {"target_rate": 0.0, "bag_of_words": 0.0, "on_collapse": "warn"},
    "plain beta 0.5": {"target_rate": 0.0, "bag_of_words": 0.0, "on_collapse": "warn", "vae_kl_loss_weight": 0.5},
    "plain beta 0.2": {"target_rate": 0.0, "bag_of_words": 0.0, "on_collapse": "warn", "vae_kl_loss_weight": 0.2},
    "autoencoder": {"target_rate": 0.0, "bag_of_words": 0.0, "on_collapse": "warn", "vae_kl_loss_weight": 0.0},
    "plain beta 1, treated": {"target_rate": 0.0, "bag_of_words": 0.0},
    "100 steps": {"steps": 100, "max_time": None},
    "100 steps, warned": {"steps": 100, "max_time": None, "on_collapse": "warn"},
    "300 steps": {"steps": 300, "max_time": None},
    "300 steps, warned": {"steps": 300, "max_time": None, "on_collapse": "warn"},
    "floor 0.25": {"vae_kl_div_floor": 0.25, "target_rate": 0.0},
    "floor 0.5": {"vae_kl_div_floor": 0.5, "target_rate": 0.0},
    "rate 3.1": {"target_rate": 3.1},
    "rate 4": {"target_rate": 4.0},
    "rate 5.3": {"target_rate": 5.3},
    "rate 6": {"target_rate": 6.0},
    "rate 16": {"target_rate": 16.0},
    "rate 32": {"target_rate": 32.0},
    "drop 0": {"dropout": 0.0},
    "drop 0.2": {"dropout": 0.2},
    "z drop 0.3": {"latents_dropout_prob": 0.3},
    "z drop 0.5": {"latents_dropout_prob": 0.5},
    "enc 2": {"enc_depth": 2},
    "no bag": {"bag_of_words": 0.0},
    "bag 0.3": {"bag_of_words": 0.3},
    "bag 3": {"bag_of_words": 3.0},
    "ramp 0.05": {"kl_warmup": 0.05},
    "ramp 0.1": {"kl_warmup": 0.1},
    "ramp 0.15": {"kl_warmup": 0.15},
    "ramp 0.1, bag 3": {"kl_warmup": 0.1, "bag_of_words": 3.0},
    "ramp 0.6": {"kl_warmup": 0.6},
    "lr 1e-3": {"lr": 1e-3},
    "lr 4e-3": {"lr": 4e-3},
    "batch 1024": {"batch_tokens": 1024},
    "batch 4096": {"batch_tokens": 4096},
    "vocabulary 1000": {"vocab_size": 1000},
    "vocabulary 4000": {"vocab_size": 4000},
    "none, vocabulary 1000": {"vocab_size": 1000, "latents_dropout_prob": 1.0},
    "none, vocabulary 4000": {"vocab_size": 4000, "latents_dropout_prob": 1.0},
    "nano": {"dim": 64, "depth": 3, "enc_depth": 1, "heads": 2},
    "z 64": {"dim_latent": 64},
    "word drop 0.3": {"word_dropout": 0.3},
    "small": {"dim": 192, "depth": 4, "enc_depth": 2, "heads": 3},
    "small, enc 1": {"dim": 192, "depth": 4, "enc_depth": 1, "heads": 3},
    "small, enc 3": {"dim": 192, "depth": 4, "enc_depth": 3, "heads": 3},
    "small, enc 1, rate 7": {"dim": 192, "depth": 4, "enc_depth": 1, "heads": 3, "target_rate": 7.0},
    "small, rate 32": {"dim": 192, "depth": 4, "enc_depth": 2, "heads": 3, "target_rate": 32.0},
    "small, ramp 0.15": {"dim": 192, "depth": 4, "enc_depth": 2, "heads": 3, "kl_warmup": 0.15},
    "small, token": {"dim": 192, "depth": 4, "enc_depth": 2, "heads": 3, "conditioning": "token"},
    "none, nano": {"latents_dropout_prob": 1.0, "dim": 64, "depth": 3, "enc_depth": 1, "heads": 2},
    "drop 0.3": {"dropout": 0.3},
    "none, drop 0.3": {"latents_dropout_prob": 1.0, "dropout": 0.3},
    "small, drop 0.3": {"dropout": 0.3, "dim": 192, "depth": 4, "enc_depth": 2, "heads": 3},
    "small, drop 0.15": {"dropout": 0.15, "dim": 192, "depth": 4, "enc_depth": 2, "heads": 3},
    "none, small, drop 0.15": {
        "latents_dropout_prob": 1.0,
        "dropout": 0.15,
        "dim": 192,
        "depth": 4,
        "enc_depth": 2,
        "heads": 3,
    },
    "none, small": {"latents_dropout_prob": 1.0, "dim": 192, "depth": 4, "enc_depth": 2, "heads": 3},
}
"""Fields of `TrainConfig`, `ModelConfig` and `DataConfig` that differ from the defaults. `arms.txt` tells of the arms
in the results that won nothing and are no longer in the package, and of those that were defaults."""

SHAPE = ("dim", "depth", "enc_depth", "heads", "dim_latent", "conditioning")
DATA = ("vocab_size",)


def run(
    arm: str, corpus: str, seed: int, minutes: float, *, samples: int, texts: int, keep: Path | None = None
) -> dict[str, Any]:
    """Trains one arm and measures it; the model is copied to the path `keep`, if there is one."""
    import numpy as np
    import torch

    from gptvae_cli.data import batches_of, padded
    from gptvae_cli.device import resolve_device, resolve_dtype, tokens_together, tune_cpu
    from gptvae_cli.evaluation import (
        PROPOSAL_WIDTHS,
        correct_tokens,
        importance_weighted,
        measure,
        reconstruct,
    )
    from gptvae_cli.probe import probe
    from gptvae_cli.sampling import Encoder
    from gptvae_cli.text import read_texts

    train = {name: value for name, value in ARMS[arm].items() if name not in (*SHAPE, *DATA)}
    tune_cpu(1)
    began = time.process_time()
    device = resolve_device("auto")
    precision = resolve_dtype("auto", device.device, training=True)
    folder = Path(tempfile.mkdtemp(prefix="gptvae-study-"))
    try:
        unit, files = splits(corpus, folder)
        job, saved = trained(
            folder / "run",
            [str(files["train"])],
            DataConfig(unit=unit, valid=str(files["valid"]), vocab_size=ARMS[arm].get("vocab_size")),
            TrainConfig(**{"max_time": 60 * minutes, "seed": seed, **train}),
            sizes=SizeConfig(preset="micro", **{name: value for name, value in ARMS[arm].items() if name in SHAPE}),
            device=device,
            precision=precision,
            seconds=lambda: time.process_time() - began,
        )
        if keep is not None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "run" / "model.safetensors", keep)
        test = [text for text in read_texts([str(files["test"])], TextConfig(unit=unit)) if text]
        tokens = list(islice(Encoder(saved, unit).rows(test), texts))
        pad_id, eos_id = saved.header.model.pad_id, saved.header.model.eos_id
        batches, _ = batches_of(tokens, None, pad_id, tokens_together(device.device))
        figures = measure(saved.model, batches, seed=seed, without_latent=job.learner.config.without_latent)
        row: dict[str, Any] = {
            "arm": arm,
            "corpus": corpus,
            "seed": seed,
            "minutes": minutes,
            "steps": job.learner.counters.step,
            "tokens_seen": job.learner.counters.tokens,
            "parameters": sum(p.numel() for p in saved.model.parameters()),
            "conditioning": saved.header.model.conditioning,
            "test": asdict(figures) | {"nll_bound": figures.nll_bound},
        }
        if not arm.startswith("none"):
            nll_N = importance_weighted(saved.model, batches, samples, seed=seed, dtype=precision.dtype)
            error = float(nll_N.std()) / math.sqrt(len(nll_N))
            row["iw_nll"] = {
                "nll": float(nll_N.mean()),
                "standard_error": error,
                "samples": samples,
                "widths": PROPOSAL_WIDTHS,
            }
            some = tokens[:300]
            written = reconstruct(saved.model, padded(some, pad_id))
            plain = [[token for token in row[1:] if token != eos_id] for row in some]
            pairs = list(zip(plain, written, strict=True))
            ends = [tokens[-1] == eos_id for tokens in some]
            correct = sum(correct_tokens(*pair, end) for pair, end in zip(pairs, ends, strict=True))
            row["reconstruction"] = {
                "texts": len(pairs),
                "token_accuracy": correct / sum(len(tokens) - 1 for tokens in some),
                "exact": sum(text == other for text, other in pairs) / len(pairs),
            }
            if files["test"].with_suffix(".labels.txt").exists():
                labels = files["test"].with_suffix(".labels.txt").read_text("utf-8").splitlines()
                means_NZ = np.stack([encoding.mean_Z for encoding in Encoder(saved, unit).encode(test)])
                found = probe(means_NZ, test, labels, seed=seed)
                row["probe"] = {"labels": found.labels, "texts": len(found.latent)} | {
                    name: float(getattr(found, name).mean()) for name in ("latent", "words", "commonest")
                }
            row["examples"] = examples(saved, unit, test)
        row["processor"] = processor()
        row["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        return row
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def processor() -> str:
    """The kind of processor, as /proc/cpuinfo has it: baselines are of the same one."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    found = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    flags = found["flags"].split()
    if "AMD" in found["vendor_id"]:
        return {25: "Zen 4", 26: "Zen 5"}.get(int(found["cpu family"]), "AMD")
    kinds = {"amx_bf16": "AMX", "avx512_bf16": "AVX512_BF16", "avx512f": "AVX512"}
    return next((kind for flag, kind in kinds.items() if flag in flags), found["model name"].strip())


def examples(saved: Checkpoint, unit: Unit, test: Sequence[str]) -> dict[str, list[str]]:
    """The first three texts of a test split, what is written greedily from their latents, and the way from one to the
    next."""
    import numpy as np

    from gptvae_cli.config import SampleConfig
    from gptvae_cli.sampling import Encoder, repeated, walk, write

    points_NZ = np.stack([encoding.mean_Z for encoding in Encoder(saved, unit).encode(test[:3])])
    path_KZ = walk(points_NZ[:2], 6, "slerp")
    requests = repeated([*points_NZ, *path_KZ], 1)
    written = list(write(saved, requests, SampleConfig(greedy=True), unit=unit))
    return {"texts": list(test[:3]), "written": written[:3], "path": written[3:]}


def splits(corpus: str, folder: Path) -> tuple[Unit, dict[str, Path]]:
    """What a text of a corpus is, and the files of its splits; those that are not there yet are written to a folder."""
    data = Path(os.environ["GPTVAE_TEST_DATA"])
    names = ("train", "valid", "test")
    if (data / f"{corpus}_train.txt").exists():
        return "line", {split: data / f"{corpus}_{split}.txt" for split in names}
    files = {split: folder / f"{corpus.replace('/', '-')}_{split}.txt" for split in names}
    if "/" in corpus:
        whole, share = corpus.split("/")
        texts = (data / f"{whole}_train.txt").read_bytes().splitlines(keepends=True)
        files["train"].write_bytes(b"".join(texts[:: int(share)]))
        return "line", files | {split: data / f"{whole}_{split}.txt" for split in names[1:]}
    if "+" in corpus:
        for split, file in files.items():
            file.write_bytes(b"".join((data / f"{part}_{split}.txt").read_bytes() for part in corpus.split("+")))
        return "line", files
    if corpus == "wikitext2":
        first, second = (sentences((data / f"{corpus}_{name}.txt").read_text("utf-8")) for name in names[1:])
        sixth = len(second) // 6
        parts = {"train": first + second[: -2 * sixth], "valid": second[-2 * sixth : -sixth], "test": second[-sixth:]}
        for split, file in files.items():
            file.write_text("\n".join(parts[split]), "utf-8")
        return "line", files
    paragraphs = (data / f"{corpus}.txt").read_text("utf-8").split("\n\n")
    parts = {"valid": paragraphs[9::20], "test": paragraphs[19::20]}
    parts["train"] = [text for place, text in enumerate(paragraphs) if place % 20 not in (9, 19)]
    for split, file in files.items():
        file.write_text("\n\n".join(parts[split]), "utf-8")
    return "paragraph", files


def sentences(text: str) -> list[str]:
    """Of a text like WikiText's, which has a space on either side of every full stop; headings are left out."""
    lines = (line.strip() for line in text.splitlines())
    return [one for line in lines if line and not line.startswith("= ") for one in re.split(r"(?<= \.) ", line)]


def trained(
    folder: Path,
    sources: Sequence[str],
    data: DataConfig,
    config: TrainConfig,
    *,
    sizes: SizeConfig,
    device: Device,
    precision: Precision,
    seconds: Callable[[], float],
) -> tuple[Job, Checkpoint]:
    """Trains to the end of the run, and returns it with its best model.

    Args:
        folder, sources, data, config, sizes, device, precision: as `run.start` takes them.
        seconds: since the run began, on the clock that `max_time` is of.
    """
    from gptvae_cli.checkpoint import load
    from gptvae_cli.folder import claimed
    from gptvae_cli.run import start

    with claimed(folder, resume=False, force=False):
        job = start(folder, sources, data, config, sizes=sizes, device=device, precision=precision)
        for report in job.run(should_stop=lambda: False, seconds=seconds):
            if report.figures is not None:
                print(f"  {report.progress:4.0%} {report.figures}", file=sys.stderr, flush=True)
        job.load_best()
    return job, load(folder / "model.safetensors", device=device.device)


def table(rows: list[dict[str, Any]]) -> str:
    """Results as fixed-width text; efficiency is (baseline - cross-entropy with z) / KL."""
    baselines: dict[tuple[str, float, int, str], float] = {}
    for row in rows:
        if row["arm"].startswith("none"):
            nll = row["test"]["cross_entropy_without"]
            baselines[_setting(row)] = min(nll, baselines.get(_setting(row), math.inf))
    head = (
        "corpus",
        "min",
        "seed",
        "CPU",
        "arm",
        "z",
        "steps",
        "CE z",
        "KL",
        "bound",
        "IW",
        "K",
        "none",
        "MI",
        "MI/max",
        "AU.2",
        "eff",
        "tok",
        "exact",
        "probe",
        "TF-IDF",
    )
    lines = [head]
    for row in sorted(rows, key=lambda row: (*_setting(row), row["arm"], conditioning(row))):
        test = row["test"]
        baseline = baselines.get(_setting(row))
        most = min(test["kl"], math.log(test["texts"]))
        latent = not row["arm"].startswith("none")
        used = latent and test["kl"] > 0.1
        lines.append(
            (
                row["corpus"],
                f"{row['minutes']:g}",
                str(row["seed"]),
                row["processor"],
                row["arm"],
                conditioning(row) if latent else "",
                f"{row['steps']:,}",
                f"{test['cross_entropy']:.2f}" if latent else "",
                f"{test['kl']:.2f}" if latent else "",
                f"{test['nll_bound']:.2f}" if latent else "",
                f"{row['iw_nll']['nll']:.2f}" if latent else "",
                f"{row['iw_nll']['samples']}{' w' if 'widths' in row['iw_nll'] else ''}" if latent else "",
                f"{test['cross_entropy_without']:.2f}",
                f"{test['mutual_information']:.2f}" if latent else "",
                f"{test['mutual_information'] / most:.2f}" if used else "",
                str(test["active_02"]) if latent else "",
                f"{(baseline - test['cross_entropy']) / test['kl']:.2f}" if used and baseline else "",
                f"{row['reconstruction']['token_accuracy']:.2f}" if latent else "",
                f"{row['reconstruction']['exact']:.2f}" if latent else "",
                f"{row['probe']['latent']:.1%}" if "probe" in row else "",
                f"{row['probe']['words']:.1%}" if "probe" in row else "",
            )
        )
    return columns(lines)


def _setting(row: dict[str, Any]) -> tuple[str, float, int, str]:
    """What rows that are compared have in common."""
    return row["corpus"], row["minutes"], row["seed"], row["processor"]


def conditioning(row: Mapping[str, Any]) -> str:
    """How the latent entered a run's decoder; as a token where there was no choice yet."""
    found: str = row.get("conditioning", "token")
    return found


def shown(rows: list[dict[str, Any]]) -> str:
    """Of every run that has them: texts, what is written from their latents, and the way from one to the next."""
    lines = []
    for row in rows:
        if (one := row.get("examples")) is None:
            continue
        lines.append(f"# {row['corpus']}, {row['arm']}, {row['minutes']:g} minutes, seed {row['seed']}")
        for text, written in zip(one["texts"], one["written"], strict=True):
            lines += [f"text    {text}", f"from z  {written}"]
        lines += [*(f"{place}/5     {text}" for place, text in enumerate(one["path"])), ""]
    return "\n".join(line.replace("\n", " / ") for line in lines)


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Lines of as many cells, one below another."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", default="default,none", help="names from ARMS, by commas, or by semicolons")
    parser.add_argument("--corpora", default="tatoeba_eng", help="comma-separated")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the processor, for a run")
    parser.add_argument("--samples", type=int, default=100, help="K of the importance-weighted NLL")
    parser.add_argument("--texts", type=int, default=1000, help="of the test split")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="also keep the models, as CORPUS, ARM, SEED.safetensors"
    )
    parser.add_argument("--table", action="store_true", help="print the results so far, and run nothing")
    parser.add_argument("--examples", action="store_true", help="print what the models wrote, and run nothing")
    asked = parser.parse_args()
    rows = [json.loads(line) for line in RESULTS.read_text("utf-8").splitlines()] if RESULTS.exists() else []
    if asked.table:
        print(table(rows))
        return
    if asked.examples:
        print(shown(rows))
        return
    done = {(row["arm"], conditioning(row), *_setting(row)) for row in rows}
    for corpus in asked.corpora.split(","):
        for seed in map(int, asked.seeds.split(",")):
            for arm in [name.strip() for name in asked.arms.strip(";").split(";" if ";" in asked.arms else ",")]:
                if (arm, ARMS[arm].get("conditioning", CONDITIONING), corpus, asked.minutes, seed, processor()) in done:
                    continue
                print(f"{arm}, {corpus}, seed {seed}, {asked.minutes:g} minutes", file=sys.stderr, flush=True)
                keep = asked.keep and asked.keep / f"{corpus.replace('/', '-')}, {arm}, {seed}.safetensors"
                row = run(arm, corpus, seed, asked.minutes, samples=asked.samples, texts=asked.texts, keep=keep)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
