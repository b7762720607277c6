"""What a trained model is used for: texts to latents, latents to texts.

Everything streams, so that memory does not grow with the number of texts. Noise is keyed by (seed, row, copy): what
becomes of a row depends neither on its neighbours nor on the batch size.

Shapes: B batch, T tokens, N latents, Z latent width, K path steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from gptvae_cli import latent
from gptvae_cli.checkpoint import Checkpoint, load
from gptvae_cli.config import DType, PathKind, SampleConfig, Unit
from gptvae_cli.data import padded, plan_batches
from gptvae_cli.decoding import SLOW_SECONDS, Request, decode
from gptvae_cli.device import autocast, resolve_device, resolve_dtype, rows_together, tokens_together
from gptvae_cli.engines import cache_bytes
from gptvae_cli.errors import CheckpointError, ConfigError, DataError
from gptvae_cli.healing import take_back
from gptvae_cli.noise import latent_noise
from gptvae_cli.text import Part, with_line_feeds
from gptvae_cli.tokenizer import Tokenizer, pieces

Floats = npt.NDArray[np.float32]
Item = TypeVar("Item", bound=Sized)

_POOL_TEXTS, _POOL_SIZE = 4096, 2**20
"""How many texts, and how many characters or tokens of them, are sorted by length together."""


class Opened(NamedTuple):
    """A model that is ready, and what people may want to know about where and in what it computes; a `warning` where
    that is worse than it might be."""

    checkpoint: Checkpoint
    note: str | None
    warning: str | None = None


def open_model(path: Path, *, device: str = "auto", dtype: DType = "auto") -> Opened:
    """Loads a model to encode and write with. Nothing of the process is changed: see `device.tune_cpu`.

    Args:
        path: of the model file, see `header.locate_model`.
        device: `auto`, `cpu`, `cuda` or `cuda:n`.
        dtype: `auto` is float32.

    Raises:
        CheckpointError, DeviceError, ConfigError: for what cannot be loaded, is not there, or is not known.
    """
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where.device, training=False)
    note = warning = None
    if where.fell_back:
        note = warning = f"computing on the CPU: {where.reason}"
    elif where.device.type != "cpu" or precision.dtype != torch.float32:  # the rest is what everybody expects
        note = f"computing on {where.device}, {where.reason}; in {precision.name}, {precision.reason}"
    return Opened(load(path, device=where.device, dtype=precision.dtype), note, warning)


# Texts to latents -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoding:
    """The posterior of one text: mean and standard deviation of every dimension of its latent, float32 [Z]."""

    mean_Z: Floats
    std_Z: Floats

    def sample(self, seed: int, row: int, copy: int = 0) -> Floats:
        """A draw of the latent; the noise is that of a draw from the prior of the same name [Z]."""
        return self.mean_Z + self.std_Z * latent_noise(seed, row, copy, len(self.mean_Z))


class Encoder:
    """Encodes texts, and counts those that were too long, and those that a user's tokenizer changes.

    Args:
        checkpoint: the model.
        unit: what a text is. A `window` text is cut into consecutive windows, each with a latent of its own.
        as_they_come: a text does not wait long for others to be computed with it. Which ones these are then depends on
            the clock, and the last digits of its latent with them.
    """

    def __init__(self, checkpoint: Checkpoint, unit: Unit, *, as_they_come: bool = False) -> None:
        self.checkpoint, self.unit, self.as_they_come = checkpoint, unit, as_they_come
        self.config = checkpoint.header.model
        self.cut = self.changed = 0

    @property
    def note(self) -> str | None:
        """What people should know about the texts so far."""
        notes = []
        if self.cut > 0:
            texts = "1 text is" if self.cut == 1 else f"{self.cut:,} texts are"
            notes.append(f"{texts} longer than the model's {self.config.max_seq_len} tokens; the beginning was used")
        if self.changed > 0:
            texts = "1 text does" if self.changed == 1 else f"{self.changed:,} texts do"
            notes.append(f"{texts} not come back from the tokenizer as written; what it drops is not read")
        return "; ".join(notes) or None

    def encode(self, texts: Iterable[str]) -> Iterator[Encoding]:
        """The posteriors of texts, in their order.

        As texts come, the first is given as soon as there is one, so that a slow pipe shows its results.
        """
        for pool in _pools(self.rows(texts), growing=self.as_they_come):
            # Equal rows are computed once: a file may hold millions of empty lines.
            distinct = list(dict.fromkeys(map(tuple, pool)))
            encodings = dict(zip(distinct, self._posteriors(distinct), strict=True))
            yield from (encodings[tuple(row)] for row in pool)

    def point(self, text: str) -> Floats:
        """The mean of the one posterior of a text, as a point of a path [Z].

        Raises:
            DataError: for a text that has none or several, windows.
        """
        encodings = list(self.encode([text]))
        if len(encodings) != 1:
            raise DataError(
                f"a point of the path is one window of {self.config.max_seq_len} tokens, a text has {len(encodings)}",
                hint="shorten it, or --unit file takes its beginning",
            )
        return encodings[0].mean_Z

    def rows(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """What the model reads of texts: their tokens with BOS and EOS, or those of their windows.

        Running texts may come in parts, as `read_texts` gives them.
        """
        return self._windows(texts) if self.unit == "window" else self._whole(texts)

    def _whole(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The tokens of each text with BOS and EOS; a text that is cut has no EOS, as in training."""
        config, tokenizer = self.config, self.checkpoint.tokenizer
        for pool in _pools(texts, growing=self.as_they_come):
            # One token more than fits, which tells that the text is cut.
            tokens = tokenizer.encode_batch(pool, longest=config.max_seq_len - 1)
            for text, ids in zip(pool, tokens, strict=True):
                row = [config.bos_id, *ids, config.eos_id]
                if len(row) > config.max_seq_len:
                    self.cut += 1
                elif not tokenizer.is_exact:
                    self.changed += tokenizer.decode(ids) != text
                yield row[: config.max_seq_len]

    def _windows(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Consecutive windows of each text, with BOS and without EOS, as in training."""
        size = self.config.max_seq_len - 1
        ids: list[int] = []
        for text in texts:
            for piece in pieces(text):
                ids += self.checkpoint.tokenizer.encode_batch([piece])[0]
                whole = len(ids) - len(ids) % size
                yield from ([self.config.bos_id, *ids[i : i + size]] for i in range(0, whole, size))
                del ids[:whole]
            if not isinstance(text, Part):
                if ids or not text:
                    yield [self.config.bos_id, *ids]
                ids.clear()

    @torch.inference_mode()
    def _posteriors(self, rows: Sequence[Sequence[int]]) -> list[Encoding]:
        """The posteriors of rows of tokens, computed in batches of rows about equally long."""
        model, dtype = self.checkpoint.model, self.checkpoint.dtype
        encodings: dict[int, Encoding] = {}
        with autocast(model.device, dtype), model.frozen():
            for index in plan_batches(np.array([*map(len, rows)]), tokens_together(model.device, dtype)):
                tokens_BT = padded([rows[i] for i in index], self.config.pad_id)
                posterior = model.posterior(tokens_BT.to(model.device)).in_float32()
                mean_BZ = posterior.mean_BZ.cpu().numpy()
                std_BZ = (0.5 * posterior.log_var_BZ).exp().cpu().numpy()
                if not (np.isfinite(mean_BZ).all() and np.isfinite(std_BZ).all()):
                    raise CheckpointError("a latent is not a finite number: the weights of the model are too large")
                encodings |= {int(i): Encoding(*both) for i, *both in zip(index, mean_BZ, std_BZ, strict=True)}
        return [encodings[i] for i in range(len(rows))]


def _pools(items: Iterable[Item], *, growing: bool) -> Iterator[list[Item]]:
    """Cuts texts or rows into long lists; or into lists of 1, 2, 4 and so on, which end early where an item was slow to
    come."""
    pool: list[Item] = []
    most, size, last = 1 if growing else _POOL_TEXTS, 0, time.monotonic()
    for item in items:
        pool.append(item)
        size += len(item)
        before, last = last, time.monotonic()
        if len(pool) >= most or size >= _POOL_SIZE or (growing and last - before > SLOW_SECONDS):
            yield pool
            pool, size, last = [], 0, time.monotonic()
            most = min(2 * most, _POOL_TEXTS)
    if pool:
        yield pool


# Latents to texts -----------------------------------------------------------------------------------------------------


def prior(seed: int, count: int, width: int) -> Iterator[Floats]:
    """Draws of the standard normal; row i is the same whatever the count [Z]."""
    return (latent_noise(seed, row, 0, width) for row in range(count))


def unconditioned(checkpoint: Checkpoint, seed: int, count: int) -> Iterator[Floats | None]:
    """What a model writes texts of its own from: draws of the prior [Z], or None for each where it has no latent, so
    that texts differ by the noise of their tokens alone."""
    header = checkpoint.header
    return prior(seed, count, header.model.dim_latent) if header.has_latent else repeat(None, count)


def repeated(latents: Iterable[Floats | None], copies: int) -> Iterator[Request]:
    """Every latent several times, to be written with other token noise each time."""
    return numbered(enumerate(latents), copies)


def numbered(latents: Iterable[tuple[int, Floats | None]], copies: int) -> Iterator[Request]:
    """The same of latents that are some rows of many: the noise of each is that of its row."""
    for row, latent_Z in latents:
        tensor_Z = None if latent_Z is None else torch.tensor(latent_Z)
        yield from (Request(row, copy, tensor_Z) for copy in range(copies))


def sampled(encodings: Iterable[Encoding], copies: int, seed: int) -> Iterator[Request]:
    """Several fresh draws of every posterior."""
    for row, encoding in enumerate(encodings):
        yield from (Request(row, copy, torch.tensor(encoding.sample(seed, row, copy))) for copy in range(copies))


def walk(points_NZ: Floats, steps: int, kind: PathKind) -> Floats:
    """A path through latents, `steps` for every segment; see `latent.path` [K Z].

    Raises:
        ConfigError: for fewer than two points or steps.
    """
    path_KZ: Floats = latent.path(torch.tensor(points_NZ), steps, kind).numpy()
    return path_KZ


def write(
    checkpoint: Checkpoint,
    requests: Iterable[Request],
    sample: SampleConfig,
    *,
    unit: Unit,
    prompt: str = "",
    on_text: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Writes the texts that are asked for, in their order, the prompt included.

    Args:
        checkpoint: the model.
        requests: taken as there is room for them.
        sample: how tokens are chosen.
        unit: a `line` never holds a line break.
        prompt: what every text begins with, in place of a prompt of its own.
        on_text: called with the pieces of a text as they come. Texts are then written one after another.

    Raises:
        ConfigError: for a line that is to begin with a line break in it.
    """
    prompt = with_line_feeds(prompt)
    tokenizer, device = checkpoint.tokenizer, checkpoint.model.device
    if unit == "line" and "\n" in prompt:
        raise ConfigError("the prompt holds a line break, the texts of this model are lines", hint="--unit paragraph")
    constraint = tokenizer.constraint(unit)
    longest = checkpoint.header.model.max_seq_len
    prompt_ids, endings = take_back(tokenizer, prompt, constraint, longest=longest)
    pieces = _Pieces(tokenizer, prompt_ids, on_text) if on_text else None
    with autocast(device, checkpoint.dtype):
        for ids in decode(
            checkpoint.model,
            (replace(request, prompt=prompt_ids) for request in requests),
            sample,
            constraint=constraint,
            endings=endings,
            batch_size=1 if pieces else rows_together(device, cache_bytes(checkpoint.model)),
            on_token=pieces.add if pieces else None,
        ):
            # Decoded in one piece: a tokenizer may treat the beginning of a text in its own way.
            text = tokenizer.decode([*prompt_ids, *ids])
            if constraint.behind([*prompt_ids, *ids]):
                text = text.removesuffix("\ufffd")  # it was cut within a character
            if pieces:
                pieces.finish(text)
            yield text


class _Pieces:
    """Makes text of tokens as they come. The bytes of a character wait until it is complete."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.prompt_ids, self.on_text = tokenizer, prompt_ids, on_text
        self.ids, self.shown, self.before, self.told = [*prompt_ids], 0, 0, 0

    def add(self, position: int, token: int) -> None:
        self.ids.append(token)
        # Not all of the tokens are decoded again, but those since the piece before the last one: a tokenizer may treat
        # the beginning of a text in its own way.
        known, text = (self.tokenizer.decode(self.ids[self.before : stop]) for stop in (self.told, None))
        if not text.endswith("\ufffd"):
            self._show(text[len(known) :])
            self.before, self.told = self.told, len(self.ids)

    def finish(self, text: str) -> None:
        self._show(text[self.shown :])
        self.ids, self.shown, self.before, self.told = [*self.prompt_ids], 0, 0, 0

    def _show(self, piece: str) -> None:
        if piece:
            self.on_text(piece)
            self.shown += len(piece)
