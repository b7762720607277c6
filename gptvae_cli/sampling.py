"""What a trained model is used for: texts to latents, latents to texts.

Everything streams, so that memory does not grow with the number of texts. Noise is keyed by (seed, row, copy): what
becomes of a row depends neither on its neighbours nor on the batch size.

Shapes: B batch, T tokens, N latents, Z latent width, K path steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gptvae_cli import latent
from gptvae_cli.arrivals import in_pools
from gptvae_cli.checkpoint import Checkpoint, load
from gptvae_cli.config import DType, PathKind, SampleConfig, Unit
from gptvae_cli.data import padded, plan_batches
from gptvae_cli.decoding import Request, decode
from gptvae_cli.device import autocast, resolve_device, resolve_dtype, tokens_together
from gptvae_cli.errors import CheckpointError, ConfigError, DataError
from gptvae_cli.healing import take_back
from gptvae_cli.noise import latent_noise
from gptvae_cli.refinement import refined
from gptvae_cli.text import Part, with_line_feeds
from gptvae_cli.tokenizer import Tokenizer, pieces

Floats = npt.NDArray[np.float32]

_REFINED_TOGETHER = 256
"""Rows that are refined before the first of them is passed on, which takes seconds."""


class Opened(NamedTuple):
    """A model that is ready, and what people may want to know about where and in what it computes; `fell_back` where
    there is a GPU, but none that can be used."""

    checkpoint: Checkpoint
    note: str | None
    fell_back: bool


def open_model(path: Path, *, device: str = "auto", dtype: DType = "auto") -> Opened:
    """Loads a model to encode and write with. Nothing of the process is changed: see `device.tune_cpu`.

    Raises:
        CheckpointError, DeviceError, ConfigError: for what cannot be loaded, is not there, or is not known.
    """
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where.device, training=False)
    note = None
    if where.fell_back:
        note = f"computing on the CPU: {where.reason}"
    elif where.device.type != "cpu" or precision.dtype != torch.float32:  # the rest is what everybody expects
        note = f"computing on {where.device}, {where.reason}; in {precision.name}, {precision.reason}"
    return Opened(load(path, device=where.device, dtype=precision.dtype), note, where.fell_back)


# Texts to latents -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoding:
    """The posterior of one text, mean and standard deviation of every dimension, and the latent that stands for the
    text: this mean, or what it was refined to. All float32 [Z]."""

    mean_Z: Floats
    std_Z: Floats
    latent_Z: Floats

    def sample(self, seed: int, row: int, copy: int = 0) -> Floats:
        """A draw of the posterior; the noise is that of a draw from the prior of the same name [Z]."""
        return self.mean_Z + self.std_Z * latent_noise(seed, row, copy, len(self.mean_Z))


class Encoder:
    """Encodes texts, and counts those that were too long, and those that a user's tokenizer changes.

    Args:
        unit: what a text is. A `window` text is cut into consecutive windows, each with a latent of its own.
        refine: give latents from which the texts come back more closely in place of the means, see `refinement`.
    """

    def __init__(self, checkpoint: Checkpoint, unit: Unit, *, refine: bool = False) -> None:
        self.checkpoint, self.unit, self.refine = checkpoint, unit, refine
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
        """The posteriors of texts, in their order."""
        return chain.from_iterable(self.encode_pools(in_pools(texts)))

    def encode_pools(self, pools: Iterable[Sequence[str]]) -> Iterator[list[Encoding]]:
        """Those of the texts of every list, which are computed together. The last digits depend on which these are."""
        for pool in self._rows(pools):
            most = _REFINED_TOGETHER if self.refine else max(1, len(pool))
            for start in range(0, max(1, len(pool)), most):  # an empty pool is passed on
                rows = pool[start : start + most]
                # Equal rows are computed once: a file may hold millions of empty lines.
                distinct = list(dict.fromkeys(map(tuple, rows)))
                encodings = dict(zip(distinct, self._posteriors(distinct), strict=True))
                yield [encodings[tuple(row)] for row in rows]

    def point(self, text: str) -> Floats:
        """The one latent of a text, as a point of a path [Z].

        Raises:
            DataError: for a text that has none or several, windows.
        """
        encodings = list(self.encode([text]))
        if len(encodings) != 1:
            raise DataError(
                f"a point of the path is one window of {self.config.max_seq_len} tokens, a text has {len(encodings)}",
                hint="shorten it, or --unit file takes its beginning",
            )
        return encodings[0].latent_Z

    def rows(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """What the model reads of texts: their tokens with BOS and EOS, or those of their windows.

        Running texts may come in parts, as `read_texts` gives them.
        """
        return chain.from_iterable(self._rows(in_pools(texts)))

    def _rows(self, pools: Iterable[Sequence[str]]) -> Iterator[list[list[int]]]:
        return self._windows(pools) if self.unit == "window" else map(self._whole, pools)

    def _whole(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text with BOS and EOS; a text that is cut has no EOS, as in training."""
        config, tokenizer = self.config, self.checkpoint.tokenizer
        rows = []
        # One token more than fits, which tells that the text is cut.
        tokens = tokenizer.encode_batch(texts, longest=config.max_seq_len - 1)
        for text, ids in zip(texts, tokens, strict=True):
            row = [config.bos_id, *ids, config.eos_id]
            if len(row) > config.max_seq_len:
                self.cut += 1
            elif not tokenizer.is_exact:
                self.changed += tokenizer.decode(ids) != text
            rows.append(row[: config.max_seq_len])
        return rows

    def _windows(self, pools: Iterable[Sequence[str]]) -> Iterator[list[list[int]]]:
        """Consecutive windows of each text, with BOS and without EOS, as in training."""
        size = self.config.max_seq_len - 1
        ids: list[int] = []
        for texts in pools:
            rows = []
            for text in texts:
                for piece in pieces(text):
                    ids += self.checkpoint.tokenizer.encode_batch([piece])[0]
                    whole = len(ids) - len(ids) % size
                    rows += [[self.config.bos_id, *ids[i : i + size]] for i in range(0, whole, size)]
                    del ids[:whole]
                if not isinstance(text, Part):
                    if ids or not text:
                        rows.append([self.config.bos_id, *ids])
                    ids.clear()
            yield rows

    def _posteriors(self, rows: Sequence[Sequence[int]]) -> list[Encoding]:
        """The posteriors of rows of tokens, computed in batches of rows about equally long."""
        model, dtype = self.checkpoint.model, self.checkpoint.dtype
        encodings: dict[int, Encoding] = {}
        # Decoding, in inference mode, may be what asks for the next texts; refining needs gradients.
        with torch.inference_mode(False), torch.no_grad(), autocast(model.device, dtype), model.frozen():
            for index in plan_batches(np.array([*map(len, rows)]), tokens_together(model.device, dtype)):
                tokens_BT = padded([rows[i] for i in index], self.config.pad_id).to(model.device)
                posterior = model.posterior(tokens_BT).in_float32()
                latent_BZ = mean_BZ = posterior.mean_BZ
                if self.refine:
                    latent_BZ = refined(model, tokens_BT, mean_BZ, guided=self.checkpoint.header.takes_guidance)
                tensors = (mean_BZ, (0.5 * posterior.log_var_BZ).exp(), latent_BZ)
                arrays = [tensor_BZ.cpu().numpy() for tensor_BZ in tensors]
                if not all(np.isfinite(array_BZ).all() for array_BZ in arrays):
                    raise CheckpointError("a latent is not a finite number: the weights of the model are too large")
                encodings |= {i: Encoding(*each) for i, *each in zip(index.tolist(), *arrays, strict=True)}
        return [encodings[i] for i in range(len(rows))]


# Latents to texts -----------------------------------------------------------------------------------------------------


def prior(seed: int, number: int, width: int) -> Iterator[Floats]:
    """Draws of the standard normal; row i is the same whatever the count [Z]."""
    return (latent_noise(seed, row, 0, width) for row in range(number))


def unconditioned(checkpoint: Checkpoint, seed: int, number: int) -> Iterator[Floats | None]:
    """What a model writes texts of its own from: draws of the prior [Z], or None for each where it has no latent, so
    that texts differ by the noise of their tokens alone."""
    header = checkpoint.header
    return prior(seed, number, header.model.dim_latent) if header.has_latent else repeat(None, number)


def repeated(latents: Iterable[Floats | None], copies: int) -> Iterator[Request]:
    """Every latent several times, to be written with other token noise each time."""
    for row, latent_Z in enumerate(latents):
        yield from _copied(row, latent_Z, copies)


def numbered(pools: Iterable[Sequence[tuple[int, Floats]]], copies: int) -> Iterator[Request | None]:
    """The same of latents that are some rows of many: the noise of each is that of its row. None for every empty list
    of `as_they_come`."""
    for pool in pools:
        if not pool:
            yield None
        for row, latent_Z in pool:
            yield from _copied(row, latent_Z, copies)


def encoded(pools: Iterable[Sequence[Encoding]], copies: int, seed: int | None) -> Iterator[Request | None]:
    """The same of the latents of texts; with a seed, of fresh draws of every posterior."""
    rows = count()
    for pool in pools:
        if not pool:
            yield None
        for encoding in pool:
            row = next(rows)
            if seed is None:
                yield from _copied(row, encoding.latent_Z, copies)
            else:
                draws = (torch.tensor(encoding.sample(seed, row, copy)) for copy in range(copies))
                yield from (Request(row, copy, draw_Z) for copy, draw_Z in enumerate(draws))


def shifted(requests: Iterable[Request | None], offset_Z: Floats) -> Iterator[Request | None]:
    """The same texts from latents that are moved by as much."""
    offset = torch.tensor(offset_Z)
    for request in requests:
        if request is not None:
            assert request.latent is not None, "the model has a latent"
            request = replace(request, latent=request.latent + offset)
        yield request


def _copied(row: int, latent_Z: Floats | None, copies: int) -> Iterator[Request]:
    tensor_Z = None if latent_Z is None else torch.tensor(latent_Z)
    return (Request(row, copy, tensor_Z) for copy in range(copies))


def walk(points_NZ: Floats, steps: int, kind: PathKind) -> Floats:
    """A path through latents, `steps` for every segment; see `latent.path` [K Z].

    Raises:
        ConfigError: for fewer than two points or steps.
    """
    path_KZ: Floats = latent.path(torch.tensor(points_NZ), steps, kind).numpy()
    return path_KZ


def write(
    checkpoint: Checkpoint,
    requests: Iterable[Request | None],
    sample: SampleConfig,
    *,
    unit: Unit,
    prompt: str = "",
    on_text: Callable[[str], None] | None = None,
) -> Iterator[str]:
    """Writes the texts that are asked for, in their order, the prompt included.

    Args:
        requests: taken as there is room for them; None before one that has to be waited for.
        unit: a `line` never holds a line break.
        prompt: what every text begins with, in place of a prompt of its own.
        on_text: called with the pieces of a text as they come. Texts are then written one after another.

    Raises:
        ConfigError: for a line that is to begin with a line break in it.
    """
    prompt = with_line_feeds(prompt)
    tokenizer = checkpoint.tokenizer
    if unit == "line" and "\n" in prompt:
        raise ConfigError("the prompt holds a line break, the texts of this model are lines", hint="--unit paragraph")
    constraint = tokenizer.constraint(unit)
    longest = checkpoint.header.model.max_seq_len
    prompt_ids, endings = take_back(tokenizer, prompt, constraint, longest=longest)
    pieces = _Pieces(tokenizer, prompt_ids, on_text) if on_text else None
    with autocast(checkpoint.model.device, checkpoint.dtype):
        for ids in decode(
            checkpoint.model,
            (request and replace(request, prompt=prompt_ids) for request in requests),
            sample,
            constraint=constraint,
            endings=endings,
            batch_size=1 if pieces else None,
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
