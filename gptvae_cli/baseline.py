"""A baseline for a model: the same decoder, trained without a latent on the same corpus for the same time.

It is a run of its own in RUN/baseline, which reads the corpus from RUN/cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy  # noqa: F401 (before torch, as in `run`)
import torch

from gptvae_cli import machine, run
from gptvae_cli.checkpoint import load_state
from gptvae_cli.config import DType, TrainConfig
from gptvae_cli.corpus import Corpus
from gptvae_cli.device import Device, Precision
from gptvae_cli.errors import CheckpointError, ConfigError, GPTVAEError
from gptvae_cli.folder import SHARED_CACHE, claimed, remove_run
from gptvae_cli.header import CACHE_NAME, MODEL_NAME, STATE_NAME, ModelHeader, read_header, stored_config
from gptvae_cli.learner import Learner, stored_counters
from gptvae_cli.log import is_done
from gptvae_cli.model import GPTVAE
from gptvae_cli.tokenizer import Tokenizer

FOLDER_NAME = "baseline"
_MACHINE = (("on", "device"), ("in", "precision"), ("with threads:", "threads"))
_BY_HAND = "train one, gptvae train CORPUS --latents-dropout-prob 1 --out baseline, and name it: --baseline baseline"


class Baseline:
    """The baseline of a model, trained or not yet, whose file lies in its run folder.

    Raises:
        CheckpointError: where there is no run folder with the model's corpus around it.
    """

    def __init__(self, model: Path, header: ModelHeader) -> None:
        self.cache = model.parent / CACHE_NAME
        if model.name != MODEL_NAME or not self.cache.is_dir():
            raise CheckpointError(
                f"a baseline learns from the corpus of the model, and {self.cache} is not there", hint=_BY_HAND
            )
        self.header = header
        self.corpus = Corpus.open(self.cache)
        if not self.corpus.holds(_digest(header), Tokenizer.from_json(header.tokenizer)):
            raise CheckpointError(f"{self.cache} is not the corpus that {model} was trained on", hint=_BY_HAND)
        self.folder = model.parent / FOLDER_NAME
        self.config = _config(model.parent, header)

    @property
    def path(self) -> Path:
        """Its model file."""
        return self.folder / MODEL_NAME

    @property
    def threads(self) -> int | None:
        """Those that the model was trained with, but no more than there are processors; None where it does not say."""
        found = self.header.training.get("threads")
        return min(found, machine.processors()) if type(found) is int and found > 0 else None

    @property
    def precision(self) -> DType:
        """The numbers that the model was trained in; `auto` where it does not say."""
        found = self.header.training.get("precision")
        return next((name for name in get_args(DType) if name == found), "auto")

    def unlike(self, training: Mapping[str, object]) -> str | None:
        """A note where, in the same time, a baseline trained so does not learn as much as the model; None elsewhere.

        Args:
            training: its device, precision and threads, as in a summary of training.
        """
        model, other = (
            " ".join(f"{word} {summary.get(key)}" for word, key in _MACHINE)
            for summary in (self.header.training, training)
        )
        if self.config.max_time is None or model == other:
            return None
        return f"the model was trained {model}, its baseline {other}: in the same time they do not learn as much"

    def fits(self) -> bool:
        """Whether what is in the folder is this baseline, be it finished or not."""
        try:
            found = read_header(self.path)
            config = stored_config(TrainConfig, "training", found.training.get("train"))
        except GPTVAEError:
            return False
        own = self.header
        same = (found.model, found.data, found.tokenizer) == (own.model, own.data, own.tokenizer)
        return same and config == self.config and _digest(found) == _digest(own)

    def finished(self) -> bool:
        """Whether it fits and was trained to its end, which its log then says."""
        return self.fits() and is_done(self.folder)

    @contextmanager
    def training(self, device: Device, precision: Precision) -> Iterator[run.Job]:
        """The run that trains it, or the rest of one that was interrupted, with its folder claimed.

        Raises:
            BusyError, ConfigError, GPTVAEError: as `claimed`.
        """
        if self.folder.is_symlink():
            raise ConfigError(f"{self.folder} is a link, and not of gptvae's making", hint="put a folder in its place")
        with claimed(self.folder, resume=False, force=True):
            yield self._resumed(device, precision) or self._begun(device, precision)

    def _resumed(self, device: Device, precision: Precision) -> run.Job | None:
        """What was interrupted; None for nothing, or where its state cannot be used: the whole can be made again."""
        if not self.fits():
            return None
        try:
            return run.resume(self.folder, {}, sources=[], device=device, precision=precision)
        except CheckpointError:
            return None

    def _begun(self, device: Device, precision: Precision) -> run.Job:
        # A link, so that `gptvae train --resume --out RUN/baseline` finds the corpus too.
        remove_run(self.folder)
        (self.folder / CACHE_NAME).symlink_to(SHARED_CACHE)
        torch.manual_seed(self.config.seed)
        model = GPTVAE.from_config(self.header.model).to(device.device)
        return run.Job(self.folder, self.corpus, self.header.data, Learner(model, self.config), precision, [])


def _digest(header: ModelHeader) -> object:
    corpus = header.training.get("corpus")
    return corpus.get("digest") if isinstance(corpus, dict) else None


def _config(folder: Path, header: ModelHeader) -> TrainConfig:
    """That of the model, without a latent, and with the time that the model learnt for, unless it was steps or epochs
    that ended its run. The state says what its limits were, when training ended, and when it began, as the corpus had
    been read. The model file is from when its weights were the best, and may be the later one of a run that was killed.

    Raises:
        CheckpointError: for a header or a state that does not say this.
    """
    seconds, step = _seconds(header.training.get("seconds")), None
    if (folder / STATE_NAME).exists():
        state = load_state(folder / STATE_NAME).metadata
        config = stored_config(TrainConfig, "training", state.get("train"))
        counters = stored_counters(state.get("counters"))
        step, seconds = counters.step, max(seconds, counters.seconds) - counters.start_up
    else:
        config = stored_config(TrainConfig, "training", header.training.get("train"))
        seconds = config.max_time or seconds
    if config.max_time is None and is_done(folder, step):
        return replace(config, latents_dropout_prob=1.0, strict=False)
    if not 0 < seconds < 2**31:
        raise CheckpointError(f"{folder} does not say how long its model was trained", hint=_BY_HAND)
    return replace(config, latents_dropout_prob=1.0, strict=False, max_time=float(seconds))


def _seconds(value: object) -> float:
    """A stranger's seconds, 0 for what is none."""
    return value if isinstance(value, int | float) and 0 <= value < 2**31 else 0.0
