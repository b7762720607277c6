"""A training run in a folder: starting it, keeping its files, and resuming it."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

# Before torch, which would import it from C, and drop the interrupt of somebody who has changed their mind meanwhile.
import numpy  # noqa: F401
import torch

from gptvae_cli import __version__
from gptvae_cli.checkpoint import load, load_state, load_tokenizer, save_model, save_state
from gptvae_cli.config import DataConfig, ModelConfig, SizeConfig, TrainConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.data import Epoch, Rows, padding_share
from gptvae_cli.device import Device, Precision
from gptvae_cli.doctor import treatment, verdict
from gptvae_cli.errors import CheckpointError, DataError
from gptvae_cli.evaluation import Figures, reconstruct
from gptvae_cli.files import NO_ROOM, writing
from gptvae_cli.folder import NEW_CACHE_NAME, place_cache, remove_run
from gptvae_cli.header import CACHE_NAME, FORMAT_VERSION, MODEL_NAME, STATE_NAME, ModelHeader, reading, stored_config
from gptvae_cli.hub import foreign_companions, with_digests, write_companions
from gptvae_cli.learner import Learner, check_weights, counters_dict
from gptvae_cli.log import EVENTS_NAME, open_log, require_log, trim_log
from gptvae_cli.model import GPTVAE
from gptvae_cli.schedule import UNTREATED
from gptvae_cli.sizing import fit_preset, fit_sizes
from gptvae_cli.text import Repairs
from gptvae_cli.tokenizer import Tokenizer
from gptvae_cli.training import StepReport, share_done, train

STATE_SECONDS = 60.0
METRICS_SECONDS = 5.0
_SAMPLE_BATCHES = 256
"""Batches that padding is told of, and their number estimated by."""
_MANY = 20
"""Texts of which a twentieth can be held out."""


@dataclass
class Job:
    """A training run: what it learns from, what it learns, and the folder that keeps it."""

    folder: Path
    corpus: Corpus
    data: DataConfig
    learner: Learner
    precision: Precision
    notes: list[str]
    figures: Figures | None = None
    """Of the held-out texts, and of the model that `model.safetensors` holds."""
    last_figures: Figures | None = None
    """Of the same texts, and of the weights when they were last validated."""

    def __post_init__(self) -> None:
        if self.learner.config.log is not None:
            self.notes.append(f"log: tensorboard --logdir {shlex.quote(str(self.folder / EVENTS_NAME))}")
        self.notes += [
            f"{self.folder / name} is not gptvae's, or was edited, and stays as it is"
            for name in foreign_companions(self.folder)
        ]
        corpus, config, window = self.corpus, self.model_config, self.data.unit == "window"
        self.rows = Rows(corpus.train, config, window=window, source=corpus.train_source)
        self.valid = Rows(corpus.valid, config, window=window, source=corpus.valid_source)

    @property
    def model_config(self) -> ModelConfig:
        config = self.learner.model.config
        assert config is not None
        return config

    @property
    def epochs(self) -> float:
        """Passes over the corpus so far."""
        return self.learner.counters.texts / len(self.rows)

    def run(self, *, should_stop: Callable[[], bool], seconds: Callable[[], float]) -> Iterator[StepReport]:
        """Trains, keeps the files, and passes the reports on.

        Args:
            seconds: since this session of the run began.
        """
        saved = logged = time.monotonic()
        dtype = self.precision.dtype
        steps = train(self.learner, self.rows, self.valid, dtype=dtype, should_stop=should_stop, seconds=seconds)
        report = None
        with open_log(self.folder, self.learner.config.log, step=self.learner.counters.step) as write_log:
            for report in steps:
                self.last_figures = report.figures or self.last_figures
                # A model of any kind is better than none; once there is a best one, only better ones take its place.
                if report.figures is not None and (report.improved or self.learner.counters.best == float("inf")):
                    self.figures = report.figures
                    self.save_model()
                if report.figures is not None or time.monotonic() - logged > METRICS_SECONDS:
                    write_log(report)
                    logged = time.monotonic()
                if report.done or time.monotonic() - saved > STATE_SECONDS:
                    self.save_state()
                    saved = time.monotonic()
                yield report
        if report is not None and not report.done:
            self.save_state()
        if not (self.folder / MODEL_NAME).exists():
            self.save_model()

    def load_best(self) -> ModelHeader:
        """Puts the weights of `model.safetensors` in place of the last ones, and returns what that says of itself."""
        best = load(self.folder / MODEL_NAME, device=self.learner.model.device)
        self.learner.model.load_state_dict(best.model.state_dict())
        values = best.header.training["validation"]
        self.figures = Figures(**values) if values else None
        return best.header

    def save_model(self) -> None:
        """Writes the weights as they are now to `model.safetensors`, and what lies beside it.

        The model comes first: whatever happens behind it, it can be used alone.

        Raises:
            DivergedError: where the weights are not finite; the files are unchanged.
            GPTVAEError: where one cannot be written; it is unchanged.
        """
        self.learner.check_finite()
        header, model = with_digests(self.header()), self.learner.model
        foreign = foreign_companions(self.folder)
        save_model(self.folder / MODEL_NAME, model, header)
        write_companions(self.folder, header, foreign, parameters=sum(p.numel() for p in model.parameters()))

    def save_state(self) -> None:
        """Writes all that resuming needs to `state.safetensors`.

        Raises:
            DivergedError: where a weight is not finite; the files are unchanged.
            GPTVAEError: where it cannot be written; likewise.
        """
        self.learner.check_finite()
        metadata = {
            "model": asdict(self.model_config),
            "data": asdict(self.data),
            "train": asdict(self.learner.config),
            "tokenizer": self.corpus.tokenizer.to_json(),
            "counters": counters_dict(self.learner.counters),
            "precision": self.precision.name,
            "corpus": self.corpus.facts.digest,
        }
        save_state(self.folder / STATE_NAME, self.learner.tensors(), metadata)

    def header(self) -> ModelHeader:
        """What the model file says about itself."""
        counters = self.learner.counters
        training = {
            "gptvae": __version__,
            "torch": torch.__version__,
            "train": asdict(self.learner.config),
            "learning_rate": self.learner.lr,
            "device": self.learner.model.device.type,
            "precision": self.precision.name,
            "threads": torch.get_num_threads(),
            "corpus": asdict(self.corpus.facts),
            "share_done": round(share_done(self.learner.config, counters, len(self.rows)), 3),
            "steps": counters.step,
            "epochs": round(self.epochs, 2),
            "seconds": round(counters.seconds, 1),
            "tokens_seen": counters.tokens,
            "treatment": self._treatment(),
            "validation": None if self.figures is None else asdict(self.figures),
            "verdict": None if self.figures is None else verdict(self.figures, self.learner.config),
        }
        return ModelHeader(FORMAT_VERSION, self.model_config, self.data, self.corpus.tokenizer.to_json(), training)

    def reconstructions(self, count: int, *, start: int = 0) -> list[tuple[str, str]]:
        """Held-out texts, spread over all of them from one on, beside the greedy decode of their posterior mean."""
        index = (self.valid.spread(count) + start) % len(self.valid)
        tokenizer = self.corpus.tokenizer
        batch = self.valid.batch(self.valid.spans(index))
        constraint = tokenizer.constraint(self.data.unit)
        written = reconstruct(self.learner.model, batch.encoder_BT, constraint=constraint)
        pairs = zip(batch.encoder_BT.tolist(), written, strict=True)
        return [(tokenizer.decode(row), tokenizer.decode(ids)) for row, ids in pairs]

    def _treatment(self) -> str | None:
        """When a treatment began and what it does; None where there was none."""
        began, config = self.learner.counters.treated_at, self.learner.config
        return None if began == UNTREATED else f"from {began:.0%} of the run on: {treatment(config, again=False)}"


def start(
    folder: Path,
    sources: Sequence[str],
    data: DataConfig,
    config: TrainConfig,
    *,
    sizes: SizeConfig,
    device: Device,
    precision: Precision,
    on_progress: Callable[[int], None] | None = None,
) -> Job:
    """A new run: reads the corpus, fits the sizes that were not given, and builds the model.

    Args:
        folder: claimed, see `folder.claimed`.
        data, config, sizes: as they were asked for; sizes that were not are fitted.
        on_progress: called with the characters read so far.

    Raises:
        GPTVAEError: for a log that cannot be written here; an earlier run is then still there.
        ConfigError: for sizes that cannot be; likewise.
        DataError: for a corpus that cannot be used; likewise.
        GPTVAEError: for a disk that cannot take the corpus; likewise.
    """
    require_log(folder, config.log)
    new_cache = folder / NEW_CACHE_NAME
    earlier = Corpus.recall(folder / CACHE_NAME, sources, data)
    try:
        with writing(new_cache, NO_ROOM):  # of reading, `text` makes errors of its own
            corpus = earlier or Corpus.build(sources, data, new_cache, on_progress=on_progress)
        preset, reason = str(sizes.preset), "asked for"
        if preset == "auto":
            preset, reason = fit_preset(corpus, data, config, sizes, device, precision)
        fitted = fit_sizes(corpus, data, preset, sizes)
        torch.manual_seed(config.seed)
        model = GPTVAE.from_config(fitted).to(device.device)
        # Only now, with a corpus and a model in hand, does an earlier run have to go, and its model later still.
        remove_run(folder, replaced=True)
        if earlier is None:
            place_cache(new_cache, folder)
    except BaseException:
        shutil.rmtree(new_cache, ignore_errors=True)
        raise
    notes = [*_notes_on_corpus(corpus, data)]
    if earlier is not None:
        notes.append(f"its tokens were in {folder / CACHE_NAME}, and were not made again")
    job = Job(folder, corpus, data, Learner(model, config), precision, notes)
    # From here on the run can be resumed, without its corpus: that may have been a pipe, and have taken hours.
    job.save_state()
    job.notes += [
        f"model: {preset} ({reason}): {sum(p.numel() for p in model.parameters()):,} parameters,"
        f" encoder {fitted.enc_depth} and decoder {fitted.depth} layers of {fitted.dim},"
        f" latent {fitted.dim_latent}, up to {fitted.max_seq_len} tokens",
        _note_on_batches(job.rows, config),
        _place(device, precision),
    ]
    if note := Repairs(corpus.facts.replaced, corpus.facts.records).note:
        job.notes.append(note)
    if cut := job.rows.count_cut():
        texts = (
            "1 text is longer than the model and is"
            if cut == 1
            else f"{cut:,} of {len(job.rows):,} texts are longer than the model and are"
        )
        job.notes.append(f"{texts} cut; --max-seq-len sets its length")
    return job


def _notes_on_corpus(corpus: Corpus, data: DataConfig) -> Iterator[str]:
    facts, tokenizer = corpus.facts, corpus.tokenizer
    running = data.unit == "window"
    texts = f"{facts.texts:,} {'running ' * running}text{'s' * (facts.texts != 1)}"
    empty = f", {facts.empty:,} empty one{'s' * (facts.empty != 1)} dropped" if facts.empty else ""
    kept, held_out = (f"{s.count:,} tokens" if running else f"{len(s):,}" for s in (corpus.train, corpus.valid))
    yield f"corpus: {texts} of {facts.characters:,} characters{empty}; {kept} to train on, {held_out} held out"
    yield f"tokenizer: {tokenizer.kind}, {tokenizer.num_tokens:,} tokens ({facts.tokenizer_reason})"
    asked, share = data.valid_share, len(corpus.valid) / (len(corpus.train) + len(corpus.valid))
    if asked is not None and not running and facts.texts >= _MANY and not asked / 2 <= share <= 2 * asked:
        yield (
            f"{share:.1%} of the texts are held out and not {asked:.1%}: many are equal, and equal ones stay together;"
            " --valid FILE names others"
        )


def _note_on_batches(rows: Rows, config: TrainConfig) -> str:
    sample = list(islice(Epoch(rows, config.batch_tokens, config.seed, 0).spans(), _SAMPLE_BATCHES))
    count = round(len(rows) * len(sample) / sum(map(len, sample)))
    padding = f"{100 * padding_share(sample):.1f} % padding"
    return f"batches: {config.batch_tokens:,} tokens, about {count:,} an epoch, {padding}"


def _place(device: Device, precision: Precision) -> str:
    return f"device: {device.device} ({device.reason}), {precision.name} ({precision.reason})"


def _reopened(folder: Path, sources: Sequence[str], data: DataConfig, tokenizer: Tokenizer, digest: object) -> Corpus:
    """The corpus of a run that goes on: from its cache, or, where that is lost and it is named again, anew."""
    another = DataError(
        f"{', '.join(sources)} is not the corpus that {folder} was trained on",
        hint="--resume needs no corpus; another one needs a run of its own, --out FOLDER",
    )
    cache, new_cache = folder / CACHE_NAME, folder / NEW_CACHE_NAME
    try:
        corpus = Corpus.open(cache)
        if not corpus.holds(digest, tokenizer):  # as that of a baseline is, whose model was trained anew
            raise CheckpointError(
                f"the token cache {cache} is of another corpus than the run, or of other tokens",
                hint="name the corpus again, with --resume",
            )
    except CheckpointError:
        if not sources:
            raise
    else:
        if sources and not corpus.is_of(sources, data):
            raise another
        return corpus
    try:
        with writing(new_cache, NO_ROOM):
            corpus = Corpus.build(sources, data, new_cache, tokenizer=tokenizer)
        if corpus.facts.digest != digest:
            raise another
        place_cache(new_cache, folder)
    except BaseException:
        shutil.rmtree(new_cache, ignore_errors=True)
        raise
    return Corpus.open(cache)


def resume(
    folder: Path, limits: Mapping[str, Any], *, sources: Sequence[str], device: Device, precision: Precision
) -> Job:
    """A run as its last state left it, in a folder that is claimed.

    Args:
        limits: fields of `TrainConfig` that say when to stop, where they were given anew.
        sources: the corpus, where it was given again: it must be the same; none takes the cache.

    Raises:
        CheckpointError: for a state or cache that is missing, damaged or of another shape.
        DataError: for another corpus.
        GPTVAEError: for a log that cannot be written here.
    """
    state = load_state(folder / STATE_NAME)
    with reading(folder / STATE_NAME):
        for key in ("model", "data", "train", "tokenizer", "counters", "precision", "corpus"):
            if key not in state.metadata:
                raise CheckpointError(f"it says too little about itself: {key!r} is missing")
        model_config = stored_config(ModelConfig, "model", state.metadata["model"])
        data = stored_config(DataConfig, "data", state.metadata["data"])
        stored = stored_config(TrainConfig, "training", state.metadata["train"])
        tokenizer = load_tokenizer(state.metadata["tokenizer"], model_config)
        check_weights(state.tensors, model_config, stored)
    config = replace(stored, **limits)
    require_log(folder, config.log)
    corpus = _reopened(folder, sources, data, tokenizer, state.metadata["corpus"])
    model = GPTVAE.from_config(model_config).to(device.device)
    learner = Learner(model, config)
    with reading(folder / STATE_NAME):
        learner.restore(state.tensors, state.metadata["counters"])
    trim_log(folder, learner.counters.step)
    counters = learner.counters
    notes = [f"resumed at step {counters.step:,}, after {counters.seconds:.0f} s", _place(device, precision)]
    if (before := state.metadata["precision"]) != precision.name:
        notes.append(f"until here it computed in {before}: its steps are not those of an undisturbed run")
    if state.note:
        notes.append(state.note)
    job = Job(folder, corpus, data, learner, precision, notes)
    was, now = (share_done(limits, counters, len(job.rows)) for limits in (stored, config))
    if now >= 1:
        job.notes.append("nothing is left to do; --max-time, --steps and --epochs say how far a run goes in all")
    if counters.treated_at != UNTREATED and was > 0:
        # It is a share of the run, which may now be a longer one or a shorter.
        counters.treated_at = min(now, counters.treated_at * (now / was))
    return job
