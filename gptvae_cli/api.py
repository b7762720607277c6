"""The commands as Python: a trained model that takes lists of texts and arrays, and returns them.

    from gptvae_cli import load

    model = load("gptvae-run")
    latents = model.encode(["the food was great", "never again"])
    texts = model.generate(latents, copies=3, temperature=0.7)

The same inputs give the same results as `gptvae encode`, `generate` and `interpolate`. Unlike the commands, nothing
here changes a setting of the process: threads (`torch.set_num_threads`), denormal numbers and the habits of malloc
stay as they are.

Shapes: N texts or latents, Z latent width, K path steps.
"""

from __future__ import annotations

import os
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gptvae_cli import sampling
from gptvae_cli.checkpoint import Checkpoint
from gptvae_cli.config import DType, PathKind, SampleConfig
from gptvae_cli.data import batches_of
from gptvae_cli.device import tokens_together
from gptvae_cli.errors import ConfigError, DataError
from gptvae_cli.evaluation import importance_weighted, measure_without_latent
from gptvae_cli.header import ModelHeader, locate_model
from gptvae_cli.latent_file import checked_latents
from gptvae_cli.model import GPTVAE
from gptvae_cli.sampling import Encoder, Encoding, Floats
from gptvae_cli.text import of_unit

_MISSING = ("NoneType", "float", "NAType")
"""Of what type pandas has something in the place of a missing text."""


class Posteriors(NamedTuple):
    """The posteriors of N texts: means and standard deviations of their latents, float32, each [N Z]."""

    mean_NZ: Floats
    std_NZ: Floats


def load(
    path: str | os.PathLike[str] | None = None, *, device: str | torch.device = "auto", dtype: DType = "auto"
) -> Model:
    """Loads a trained model, to encode and to write with.

    Warns (UserWarning) where `auto` finds a GPU that cannot be used, and takes the CPU.

    Args:
        path: a run folder or a `.safetensors` file; for None `$GPTVAE_MODEL`, else `./gptvae-run`.
        device: `auto`, `cpu`, `cuda` or `cuda:n`.
        dtype: what to compute in, `auto`, `float32` or `bfloat16`; `auto` is float32.

    Raises:
        CheckpointError: for a model that is missing, damaged or foreign.
        DeviceError: for a GPU that is not there.
        ConfigError: for a path that is no name, or a device or a dtype that is not known.
    """
    if not isinstance(path, str | os.PathLike | None):
        raise ConfigError(f"path is of type {type(path).__name__}, expected a name")
    found = locate_model(None if path is None else os.fspath(path))
    # In a thread of its own: what the caller has told torch, such as a default device, does not hold there, and OpenMP
    # gives the caller's no helpers, with which a process that is forked hangs.
    with ThreadPoolExecutor(1) as alone:
        opened = alone.submit(sampling.open_model, found, device=str(device), dtype=dtype).result()
    if opened.fell_back:
        warnings.warn(str(opened.note), stacklevel=2)
    return Model(opened.checkpoint, found)


class Model:
    """A trained model with its tokenizer, in evaluation mode. `load` makes one."""

    def __init__(self, checkpoint: Checkpoint, path: Path) -> None:
        self._checkpoint = checkpoint
        self.path = path

    def __repr__(self) -> str:
        parameters = sum(weight.numel() for weight in self.network.parameters())
        what = f"{parameters:,} parameters, latent {self.dim_latent}, unit {self.unit}"
        return f"<gptvae_cli.Model {self.path}: {what}, sha256 {self.sha256[:8]}...>"

    @property
    def header(self) -> ModelHeader:
        """What the model file says about itself: sizes, what a text is, how it was trained and with which figures."""
        return self._checkpoint.header

    @property
    def sha256(self) -> str:
        """The checksum of the model file, as `gptvae info --json` has it: whose latents these are."""
        return self._checkpoint.sha256

    @property
    def network(self) -> GPTVAE:
        """The torch module."""
        return self._checkpoint.model

    @property
    def dim_latent(self) -> int:
        """Z, the width of a latent."""
        return self.header.model.dim_latent

    @property
    def max_seq_len(self) -> int:
        """Tokens of the longest text that is read whole, BOS and EOS counted."""
        return self.header.model.max_seq_len

    @property
    def unit(self) -> str:  # no Literal, of which Jupyter's completion (jedi 0.20) makes an error
        """What a text is: `line`, `paragraph`, `file` or `window`. A `line` that is written has no line break."""
        return self.header.data.unit

    def encode(
        self, texts: Iterable[str], *, sample: bool = False, refine: bool = False, seed: int | None = None
    ) -> Floats:
        """The latents of texts, in their order, float32 [N Z]; no texts give (0, Z).

        Warns (UserWarning) of texts that are longer than the model; their beginning counts.

        Args:
            texts: each is one row; where the unit is `window`, a row for each of its consecutive windows. Line breaks
                become spaces where the unit is `line`.
            sample: a random draw of each posterior instead of its mean.
            refine: fit each latent to its text by gradient descent, so that the text comes back more closely, which
                takes many times as long.
            seed: of the draws; None is a new one.

        Raises:
            CheckpointError: for a model that was trained without a latent, or to refine one that writes other texts
                than it encodes.
            ConfigError: for one string in place of a list, a seed below 0, or `sample` together with `refine`.
            DataError: for what is not a string, or not valid Unicode.
        """
        if sample and refine:
            raise ConfigError("sample draws from posteriors, which refine leaves alone", hint="leave one of them out")
        seed = _seed(seed)
        encodings = enumerate(self._encoded(texts, refine=refine))
        return self._stack([e.sample(seed, row) if sample else e.latent_Z for row, e in encodings])

    def posterior(self, texts: Iterable[str]) -> Posteriors:
        """Mean and standard deviation of the posteriors of texts, rows as in `encode`.

        Raises:
            CheckpointError, ConfigError, DataError: as `encode` does.
        """
        encodings = self._encoded(texts)
        return Posteriors(self._stack([e.mean_Z for e in encodings]), self._stack([e.std_Z for e in encodings]))

    def nll(self, texts: Iterable[str], *, samples: int = 100, seed: int = 0) -> npt.NDArray[np.float64]:
        """How unlikely the model finds each text: its importance-weighted NLL, as `gptvae evaluate --per-text` has it,
        in nats, the end counted, float64 [N]; rows as in `encode`.

        Args:
            texts: each is one row; where the unit is `window`, a row for each of its consecutive windows.
            samples: K, latents of a text; the estimate falls towards the NLL as they grow. Of a model that was trained
                without a latent it is exact.
            seed: of the latents' noise.

        Raises:
            ConfigError: for one string in place of a list, no samples, a seed below 0, or a model whose latents come
                from other texts than it writes.
            DataError: for what is not a string, or not valid Unicode.

        Source: Burda et al. 2015 (arXiv 1509.00519), eq. 8.
        """
        samples, seed = _whole("samples", samples, least=1), _seed(seed)
        if self.header.reads_other_texts:
            raise ConfigError(
                "the latents of the model come from other texts than it writes",
                hint="gptvae evaluate --latents-from --per-text has the likelihood of such pairs",
            )
        every = self._rows(texts)
        nll_N = np.zeros(len(every))
        # An empty text of windows has no token to predict: nothing is unlikely about it.
        told = [place for place, row in enumerate(every) if len(row) > 1]
        if rows := [every[place] for place in told]:
            most = tokens_together(self.network.device)
            batches, places_N = batches_of(rows, None, self.header.model.pad_id, most)
            with _default_cpu():
                if self.header.has_latent:
                    dtype = self._checkpoint.dtype
                    found_N = importance_weighted(self.network, batches, samples, seed=seed, dtype=dtype)
                else:
                    found_N = measure_without_latent(self.network, batches, dtype=self._checkpoint.dtype)
            nll_N[told] = found_N.numpy()[places_N]
        return nll_N

    def count_tokens(self, texts: Iterable[str]) -> npt.NDArray[np.int64]:
        """The tokens of each text that `nll` sums over, of a long one those that fit, the end counted [N]; rows as in
        `encode`."""
        return np.array([len(row) - 1 for row in self._rows(texts)], np.int64)

    def generate(
        self,
        latents: npt.ArrayLike | None = None,
        *,
        prior: int | None = None,
        copies: int = 1,
        prompt: str = "",
        guidance: float = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        greedy: bool = False,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> list[str]:
        """Texts from latents, the copies of each after one another.

        Args:
            latents: floats [N Z], or [Z] for one. Without them they are drawn from the prior; a model that was trained
                without a latent writes from none.
            prior: how many to draw; None is 1.
            copies: texts from each latent; a greedy one is always the same.
            prompt: what every text begins with; it is part of the text.
            guidance: above 1, such as 2, a text keeps closer to its latent, for twice the work (classifier-free
                guidance, arXiv 2306.17806).
            temperature: below 1 is safer, above 1 is wilder.
            top_k, top_p, min_p: cut the tokens to draw from: to the k likeliest, to those that share p of the
                probability, to those at least p times as likely as the likeliest.
            greedy: always the likeliest token.
            max_tokens: longest continuation; None is one less than `max_seq_len`.
            seed: of the prior and of the tokens; None is a new one.

        Returns:
            N x copies texts; no latents give none.

        Raises:
            CheckpointError: for latents of a model that was trained without one.
            ConfigError: for an argument that cannot be, latents together with `prior`, or a prompt with a line break
                where the unit is `line`.
            DataError: for latents that are no floats, of another width or not finite, or a prompt that is not valid
                Unicode.
        """
        config = SampleConfig(
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            greedy=greedy,
            max_tokens=max_tokens,
            seed=_seed(seed),
        )
        self.header.require("the model", latent=False, guidance=config.guidance)
        copies = _whole("copies", copies, least=1)
        if not isinstance(prompt, str):
            raise ConfigError(f"prompt is of type {type(prompt).__name__}, expected a string")
        rows: Iterable[Floats | None]
        if latents is not None:
            if prior is not None:
                raise ConfigError("latents and prior exclude each other", hint="leave one of them out")
            if isinstance(latents, Integral):
                raise ConfigError(
                    f"latents is {latents}, expected an array of floats", hint="prior=5 draws five of them"
                )
            rows = self._latents(latents, "latents")
        else:
            count = 1 if prior is None else _whole("prior", prior, least=0)
            rows = sampling.unconditioned(self._checkpoint, config.seed, count)
        return self._write(rows, copies, config, prompt)

    def interpolate(
        self,
        *points: str | npt.ArrayLike,
        steps: int = 7,
        path: PathKind = "slerp",
        refine: bool = False,
        guidance: float = 1.0,
    ) -> list[str]:
        """Texts along a path from one point to the next, greedily.

        Args:
            points: N of them, each a text or a latent [Z].
            steps: from one point to the next, both counted.
            path: `slerp`, along an arc around the origin with the norm in between, or `lerp`, straight.
            refine: of the points that are texts, as in `encode`.
            guidance: as in `generate`.

        Returns:
            (N - 1) x (steps - 1) + 1 texts. Those at the points are what the model makes of the latents that went in.

        Raises:
            CheckpointError: for a model that was trained without a latent, or to refine as in `encode`.
            ConfigError: for fewer than two points or steps, another kind of path, or `refine` without a text.
            DataError: for a point that is not one text or one latent of this model.
        """
        config = SampleConfig(guidance=guidance, greedy=True)
        self.header.require("the model", guidance=config.guidance, refine=refine)
        if refine and not any(isinstance(point, str) for point in points):
            raise ConfigError("refine fits latents to texts, and there are none", hint="leave it out")
        steps, points_NZ = _whole("steps", steps, least=2), []
        for place, point in enumerate(points):  # no comprehension, which is a line of its own to a warning
            points_NZ.append(self._point(point, f"points[{place}]", refine=refine))
        with _default_cpu():
            path_KZ = sampling.walk(self._stack(points_NZ), steps, path)
        return self._write(path_KZ, 1, config, "")

    def _encoded(self, texts: Iterable[str], *, refine: bool = False) -> list[Encoding]:
        self.header.require("the model", refine=refine)
        encoder = Encoder(self._checkpoint, self.header.data.unit, refine=refine)
        with _default_cpu():
            encodings = list(encoder.encode(self._checked(texts)))
        _warn(encoder)
        return encodings

    def _rows(self, texts: Iterable[str]) -> list[list[int]]:
        """Texts as tokens, with their specials."""
        encoder = Encoder(self._checkpoint, self.header.data.unit)
        rows = list(encoder.rows(self._checked(texts)))
        _warn(encoder)
        return rows

    def _checked(self, texts: Iterable[str]) -> Iterator[str]:
        if isinstance(texts, str):
            raise ConfigError("texts is one string, expected a list of them", hint="put it in brackets: [text]")
        # What a table or a dictionary gives one by one are the names of its columns.
        is_one = isinstance(texts, Mapping) or hasattr(texts, "columns") or getattr(texts, "shape", None) == ()
        if is_one or not isinstance(texts, Iterable):
            kind = type(texts).__name__
            raise ConfigError(f"texts is of type {kind}, expected a list of strings", hint="of a table take a column")
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                kind = type(text).__name__
                raise DataError(
                    f"texts[{row}] is of type {kind}, expected a string",
                    hint="leave missing texts out: column.dropna()" if kind in _MISSING else None,
                )
            yield of_unit(text, self.header.data.unit)

    def _stack(self, rows: Sequence[Floats]) -> Floats:
        return np.stack(rows) if rows else np.empty((0, self.dim_latent), np.float32)

    def _point(self, point: str | npt.ArrayLike, name: str, *, refine: bool) -> Floats:
        if isinstance(point, str):
            encoder = Encoder(self._checkpoint, self.header.data.unit, refine=refine)
            with _default_cpu():
                latent_Z = encoder.point(of_unit(point, self.header.data.unit))
            _warn(encoder)
            return latent_Z
        latents_NZ = self._latents(point, name)
        if len(latents_NZ) != 1:
            raise DataError(
                f"{name} holds {len(latents_NZ)} latents, a point of a path is exactly one",
                hint="model.interpolate(*latents) leads through the rows of latents",
            )
        return latents_NZ.reshape(-1)

    def _latents(self, values: npt.ArrayLike, name: str) -> Floats:
        """Latents as they were given, checked [N Z]."""
        self.header.require("the model")
        try:
            array = np.asarray(values)
            if array.dtype == object and array.ndim > 0 and not any(isinstance(each, str) for each in array.flat):
                array = np.array(array.tolist(), np.float64)  # a column of latents, or rows of a table that has others
        except (ValueError, TypeError, RuntimeError) as error:  # rows of several lengths; tensors that it cannot read
            problem = str(error).partition("\n")[0]
            raise DataError(
                f"{name} cannot be made an array of floats: {problem}",
                hint="of a column of latents np.stack(column) makes one, of a table table.to_numpy('float32')",
            ) from error
        if array.dtype.kind in "US" or (array.dtype == object and array.ndim > 0):
            raise DataError(f"{name} holds text, latents are floats", hint="model.encode(texts) gives latents")
        if array.shape == (0,):  # an empty list has no width
            array = np.empty((0, self.dim_latent), np.float32)
        return checked_latents(array, name, width=self.dim_latent)

    def _write(self, latents: Iterable[Floats | None], copies: int, config: SampleConfig, prompt: str) -> list[str]:
        requests = sampling.repeated(latents, copies)
        with _default_cpu():
            return list(sampling.write(self._checkpoint, requests, config, unit=self.header.data.unit, prompt=prompt))


@contextmanager
def _default_cpu() -> Iterator[None]:
    """Within, torch makes tensors on the CPU where nothing else is said, whatever the caller's default device is."""
    with torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext():
        yield


def _whole(name: str, value: object, *, least: int) -> int:
    """A whole number, of Python or of NumPy."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}, it must be a whole number, {least} or more")
    return int(value)


def _seed(seed: int | None) -> int:
    """The seed that was given, checked, or a new one."""
    return SampleConfig(seed=secrets.randbelow(2**32) if seed is None else seed).seed


def _warn(encoder: Encoder) -> None:
    if encoder.note is not None:
        warnings.warn(encoder.note, stacklevel=4)  # the line that called the model's method
