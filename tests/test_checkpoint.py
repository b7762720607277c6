"""Models and states on the disk: the round trip, what is refused, and what a failed write leaves behind."""

from __future__ import annotations

import json
import os
import random
import resource
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model as reference_load_model
from safetensors.torch import save_file
from torch import Tensor, nn
from x_transformers import gpt_vae as reference

from gptvae_cli.checkpoint import (
    fill_model,
    load,
    load_state,
    model_tensors,
    remove_state,
    save_model,
    save_state,
    state_exists,
)
from gptvae_cli.config import DataConfig, ModelConfig
from gptvae_cli.errors import CheckpointError, ExitCode, GPTVAEError
from gptvae_cli.header import FORMAT_VERSION, Layout, ModelHeader, read_layout
from gptvae_cli.model import GPTVAE
from gptvae_cli.tokenizer import Tokenizer
from tests.benchmarks.robust import mutations

CPU = torch.device("cpu")
TOKENIZER = Tokenizer.bytes()
CONFIG = ModelConfig(
    num_tokens=TOKENIZER.num_tokens,
    dim=8,
    depth=2,
    enc_depth=1,
    max_seq_len=16,
    dim_latent=4,
    heads=2,
    attn_dim_head=8,
    pad_id=TOKENIZER.pad_id,
    bos_id=TOKENIZER.bos_id,
    eos_id=TOKENIZER.eos_id,
    conditioning="token",
)
HEADER = ModelHeader(
    format_version=FORMAT_VERSION,
    model=CONFIG,
    data=DataConfig(),
    tokenizer=TOKENIZER.to_json(),
    training={"steps": 3, "corpus": "é.txt"},
)


@pytest.fixture
def model() -> GPTVAE:
    torch.manual_seed(0)
    return GPTVAE.from_config(CONFIG)


@pytest.fixture
def path(tmp_path: Path, model: GPTVAE) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(path, model, HEADER)
    return path


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(path, device=CPU)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert caught.value.message.isprintable(), "one line, and nothing that a terminal obeys"
    assert caught.value.message.startswith(f"cannot load {path}: ")
    return caught.value.message


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        torch.equal(tensor, right[name]) and tensor.dtype == right[name].dtype for name, tensor in left.items()
    )


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path, model: GPTVAE) -> None:
    """safetensors wrote there and then refused to read, so that a training failed at its end."""
    folder = tmp_path / os.fsdecode(b"run\xff")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    save_model(folder / "model.safetensors", model, HEADER)
    save_state(folder / "state.safetensors", {"a": torch.ones(3)}, {"step": 1})
    loaded = load(folder / "model.safetensors", device=CPU)
    assert equal(model_tensors(loaded.model), model_tensors(model))
    assert load_state(folder / "state.safetensors").metadata == {"step": 1}


class TestModel:
    def test_round_trip_is_exact(self, path: Path, model: GPTVAE) -> None:
        checkpoint = load(path, device=CPU)
        assert checkpoint.header == HEADER
        assert checkpoint.tokenizer.encode_batch(["é"]) == TOKENIZER.encode_batch(["é"])
        assert equal(dict(checkpoint.model.state_dict()), dict(model.state_dict()))
        tokens_BT = torch.tensor([[CONFIG.bos_id, 65, CONFIG.eos_id]])
        with torch.no_grad():
            assert torch.equal(checkpoint.model.posterior(tokens_BT).mean_BZ, model.eval().posterior(tokens_BT).mean_BZ)

    def test_loaded_model_does_not_drop_latents(self, path: Path) -> None:
        assert not load(path, device=CPU).model.training

    def test_buffers_are_stored_and_read_back(self, path: Path, model: GPTVAE) -> None:
        """Rotary frequencies are computed when a model is built, which would hide that they are not read."""
        name = "decoder.attn_layers.rotary_pos_emb.inv_freq"
        model.get_buffer(name).add_(1)
        save_model(path, model, HEADER)
        assert torch.equal(load(path, device=CPU).model.get_buffer(name), model.get_buffer(name))

    def test_loading_draws_nothing_from_the_global_generator(self, path: Path) -> None:
        before = torch.get_rng_state()
        load(path, device=CPU)
        assert torch.equal(torch.get_rng_state(), before)

    def test_what_another_thread_draws_meanwhile_stays_drawn(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build = GPTVAE.from_config

        def while_another_draws(config: ModelConfig) -> GPTVAE:
            model = build(config)
            with ThreadPoolExecutor(1) as other:
                drawn.append(other.submit(torch.rand, 1).result())
            return model

        drawn: list[torch.Tensor] = []
        monkeypatch.setattr(GPTVAE, "from_config", while_another_draws)
        load(path, device=CPU)
        assert not torch.equal(torch.rand(1), drawn[-1])

    def test_model_that_is_replaced_while_it_is_loaded_is_not_mixed(
        self, path: Path, model: GPTVAE, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The header of one file checked against the tensors of the next would look like damage."""
        newer = replace(HEADER, training={"steps": 4})

        def train_meanwhile(path: Path) -> Layout:
            layout = read_layout(path)
            save_model(path, model, newer)
            return layout

        monkeypatch.setattr("gptvae_cli.checkpoint.read_layout", train_meanwhile)
        assert load(path, device=CPU).header == newer

    def test_seed_class_reads_the_file_strictly(self, path: Path, model: GPTVAE) -> None:
        seed_model = reference.GPTVAE(
            num_tokens=CONFIG.num_tokens,
            dim=CONFIG.dim,
            depth=CONFIG.depth,
            enc_depth=CONFIG.enc_depth,
            max_seq_len=CONFIG.max_seq_len,
            dim_latent=CONFIG.dim_latent,
            heads=CONFIG.heads,
            attn_dim_head=CONFIG.attn_dim_head,
            rotary_pos_emb=True,
            verbose=False,
        )
        reference_load_model(seed_model, path, strict=True)
        assert equal(dict(seed_model.state_dict()), dict(model.state_dict()))

    def test_every_tensor_is_stored_once(self, path: Path, model: GPTVAE) -> None:
        """The decoder has two names in the state dict: stored twice, it would double the file and the count."""
        stored = sum(tensor.numel for tensor in read_layout(path).tensors.values())
        held = [*model.parameters(), *model.buffers()]  # torch lists each object once
        assert stored == sum(tensor.numel() for tensor in held)
        assert stored < sum(tensor.numel() for tensor in model.state_dict().values())

    def test_tied_weights_stay_tied(self) -> None:
        def tied() -> nn.Sequential:
            layers = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
            layers[1].weight = layers[0].weight
            return layers

        source, target = tied(), tied()
        assert set(model_tensors(source)) == {"0.weight", "0.bias", "1.bias"}
        fill_model(target, model_tensors(source))
        assert target[1].weight is target[0].weight
        assert equal(dict(target.state_dict()), dict(source.state_dict()))


class TestStrictLoading:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            pytest.param(
                {"dim_latent": 5},
                "tensor 'to_latent_mean_log_variance.0.weight' has the shape (8, 8), the configuration expects (10, 8)",
                id="shape",
            ),
            pytest.param(
                {"depth": 3}, "tensor 'decoder.attn_layers.layers.4.0.0.gamma' of shape (8,) is missing", id="missing"
            ),
            pytest.param(
                {"depth": 1},
                "tensor 'decoder.attn_layers.layers.2.0.0.gamma' of shape (8,) is unexpected",
                id="unexpected",
            ),
        ],
    )
    def test_tensor_that_the_configuration_does_not_expect_is_named(
        self, path: Path, model: GPTVAE, change: dict[str, Any], said: str
    ) -> None:
        save_model(path, model, replace(HEADER, model=replace(CONFIG, **change)))
        assert said in refusal(path)

    def test_other_number_types_are_named(self, path: Path, model: GPTVAE) -> None:
        save_model(path, model.half(), HEADER)
        assert "has the type torch.float16, the configuration expects torch.float32" in refusal(path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_weights_that_are_not_finite_are_named(self, path: Path, model: GPTVAE, value: float) -> None:
        """safetensors does not look; a model with one NaN writes the same token for ever."""
        model.decoder.token_emb.emb.weight.data[3, 2] = value
        save_model(path, model, HEADER)
        assert "tensor 'decoder.token_emb.emb.weight' holds NaN or infinity" in refusal(path)

    @pytest.mark.parametrize(
        "claim",
        [
            pytest.param({"depth": 1024, "enc_depth": 1024}, id="layers"),
            pytest.param({"dim": 65536}, id="width"),
            pytest.param({"heads": 65536, "attn_dim_head": 1024}, id="heads"),
            pytest.param({"dim_latent": 65536}, id="latent"),
        ],
    )
    def test_small_file_cannot_claim_a_huge_model(
        self, path: Path, model: GPTVAE, claim: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The model would be built, in tens of gigabytes or for minutes, before its weights were found missing."""
        build = GPTVAE.from_config

        def build_without_memory(config: ModelConfig) -> GPTVAE:
            assert torch.empty(0).is_meta
            assert config.depth == CONFIG.depth
            return build(config)

        save_model(path, model, replace(HEADER, model=replace(CONFIG, **claim)))
        monkeypatch.setattr(GPTVAE, "from_config", build_without_memory)
        refusal(path)

    def test_tokenizer_of_another_model_is_refused(self, path: Path, model: GPTVAE) -> None:
        save_model(path, model, replace(HEADER, model=replace(CONFIG, pad_id=0)))
        assert "its tokenizer has (tokens, pad, bos, eos) (259, 256, 257, 258)" in refusal(path)

    @pytest.mark.parametrize("tokenizer", ["", "{}", "[]", "null", '{"version": "1.0"}', "x" * 10_000])
    def test_tokenizer_that_is_none_is_refused(self, path: Path, model: GPTVAE, tokenizer: str) -> None:
        save_model(path, model, replace(HEADER, tokenizer=tokenizer))
        assert "the tokenizer is malformed: " in refusal(path)

    @pytest.mark.parametrize(
        ("part", "steps"),
        [
            ("normalizer", {"normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}),
            ("normalizer", {"normalizers": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}] * 40}),
            ("normalizer", {"normalizers": [{"type": "ByteLevel"}] * 40}),
            ("normalizer", {"normalizers": [{"type": "Prepend", "prepend": "a" * 10_000}]}),
            ("decoder", {"decoders": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40}),
        ],
        ids=["strings", "expressions", "bytes", "prefix", "decoder"],
    )
    def test_tokenizer_that_blows_texts_up_is_refused(
        self, path: Path, model: GPTVAE, part: str, steps: dict[str, object]
    ) -> None:
        """The library would make a terabyte of one letter, and take hours for it."""
        bomb = json.loads(HEADER.tokenizer) | {part: {"type": "Sequence", **steps}}
        save_model(path, model, replace(HEADER, tokenizer=json.dumps(bomb)))
        assert f"its {part} can make a text" in refusal(path)

    def test_mutated_tokenizer_is_read_or_refused(self, path: Path, model: GPTVAE) -> None:
        """The `tokenizers` library panics on some of these, with a BaseException that escapes `except Exception`."""
        chance = random.Random(0)
        for _ in range(100):
            text = list(HEADER.tokenizer)
            for _ in range(chance.randint(1, 3)):
                text[chance.randrange(len(text))] = chr(chance.randrange(32, 127))
            save_model(path, model, replace(HEADER, tokenizer="".join(text)))
            try:
                load(path, device=CPU)
            except CheckpointError:
                refusal(path)


class TestDamage:
    def test_every_truncation_is_refused(self, path: Path) -> None:
        content = path.read_bytes()
        for length in [*range(12), *range(12, len(content), 997), len(content) - 1]:
            path.write_bytes(content[:length])
            refusal(path)

    def test_every_flipped_bit_is_found(self, path: Path) -> None:
        """A flip in a weight gives a file that is well-formed, and a model that is subtly wrong."""
        content = path.read_bytes()
        chance = random.Random(0)
        for _ in range(200):
            flipped = bytearray(content)
            flipped[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(flipped)
            refusal(path)

    @pytest.mark.parametrize(
        ("written", "edited"),
        [(b'step\\": 1', b'step\\": 2'), (b"[3,4]", b"[4,3]"), (b'"weight"', b'"heavy!"'), (b'"F32"', b'"I32"')],
        ids=["metadata", "shape", "name", "type"],
    )
    def test_checksum_covers_what_describes_the_tensors(self, tmp_path: Path, written: bytes, edited: bytes) -> None:
        save_state(tmp_path / "state.safetensors", {"weight": torch.ones(3, 4)}, {"step": 1})
        content = (tmp_path / "state.safetensors").read_bytes()
        assert content.count(written) == 1
        (tmp_path / "state.safetensors").write_bytes(content.replace(written, edited))
        with pytest.raises(CheckpointError, match="the checksum differs"):
            load_state(tmp_path / "state.safetensors")

    def test_foreign_file_is_refused(self, tmp_path: Path) -> None:
        save_file({"weight": torch.ones(3)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
        assert "not a gptvae model" in refusal(tmp_path / "foreign.safetensors")

    def test_file_without_checksum_is_refused(self, path: Path, model: GPTVAE) -> None:
        save_file(model_tensors(model), path, metadata=HEADER.to_metadata())
        assert "the checksum differs" in refusal(path)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> mutations.Target:
    return mutations.Target(tmp_path_factory.mktemp("strangers"))


class TestStrangers:
    """Files that were changed at random, in their bytes or in what they say; see `benchmarks/robust/mutations.py`."""

    @pytest.mark.parametrize("kind", mutations.KINDS)
    def test_mutants_are_loaded_or_refused(
        self, target: mutations.Target, kind: str, one_thread: None, capfd: pytest.CaptureFixture[str]
    ) -> None:
        tally = mutations.run(target, kind, 2000, seed=0)
        assert tally.crashes == []
        assert tally.loaded > 100, "not all of them are refused at the door"
        assert tally.refused > 1000
        assert tally.memory < 100

    @pytest.mark.parametrize("kind", ["model", "state"])
    def test_a_stranger_can_sign(self, target: mutations.Target, kind: str) -> None:
        """Or no change with a checksum of its own would reach what lies behind it."""
        content = target.originals[kind]
        length = int.from_bytes(content[:8], "little")
        header = mutations.parsed(content[8 : 8 + length].decode())
        written = dict(dict(header)["__metadata__"])["sha256"]
        assert mutations.checksum(header, content[8 + length :]) == written


class TestState:
    TENSORS = {  # noqa: RUF012
        "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "counter": torch.tensor(7),
        "random": torch.get_rng_state(),
        "empty": torch.zeros(0, 2),
        "moments": torch.tensor([float("nan"), 1.0]),
    }

    def test_round_trip_is_exact(self, tmp_path: Path) -> None:
        metadata = {"step": 5, "best": float("inf"), "names": ["é", None, True]}
        save_state(tmp_path / "state.safetensors", self.TENSORS, metadata)
        state = load_state(tmp_path / "state.safetensors")
        assert state.metadata == metadata
        assert state.note is None
        assert state.tensors.keys() == self.TENSORS.keys()
        for name, tensor in self.TENSORS.items():
            assert state.tensors[name].dtype == tensor.dtype
            torch.testing.assert_close(state.tensors[name], tensor, rtol=0, atol=0, equal_nan=True)

    def save(self, folder: Path, *steps: int) -> Path:
        for step in steps:
            save_state(folder / "state.safetensors", {"step": torch.tensor(step)}, {"step": step})
        return folder / "state.safetensors"

    def test_state_before_the_newest_is_kept_and_no_other(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, 1, 2, 3)
        assert load_state(path).metadata == {"step": 3}
        assert load_state(tmp_path / "state.prev.safetensors").metadata == {"step": 2}
        assert len(list(tmp_path.iterdir())) == 2

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
    def test_broken_newest_state_falls_back_and_says_so(self, tmp_path: Path, damage: str) -> None:
        path = self.save(tmp_path, 1, 2)
        content = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + b"\1")
        state = load_state(path)
        assert state.metadata == {"step": 1}
        assert torch.equal(state.tensors["step"], torch.tensor(1))
        assert state.note is not None
        assert f"cannot load {path}: " in state.note
        assert f"going on from {tmp_path / 'state.prev.safetensors'}" in state.note

    def test_both_states_are_found_and_removed(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, 1, 2)
        path.unlink()
        assert state_exists(path)
        remove_state(path)
        assert not state_exists(path)
        assert not list(tmp_path.iterdir())

    def test_error_is_about_the_newest_state_where_both_are_broken(self, tmp_path: Path) -> None:
        path = self.save(tmp_path, 1, 2)
        path.write_bytes(b"")
        (tmp_path / "state.prev.safetensors").write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"state\.safetensors: .*cut short"):
            load_state(path)

    def test_missing_state_is_bad_input(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no such file"):
            load_state(tmp_path / "state.safetensors")

    def test_model_is_not_taken_for_a_state_nor_a_state_for_a_model(self, path: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="it is a model, not a training state"):
            load_state(path)
        assert "it is a training state, not a model" in refusal(self.save(tmp_path, 1))

    @pytest.mark.parametrize("failing", [0, 1])
    def test_save_that_dies_between_its_renames_leaves_a_good_state(
        self, tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = self.save(tmp_path, 1, 2)
        rename, calls = Path.replace, []

        def replace_or_die(self: Path, target: Path) -> Path:
            calls.append(target)
            if len(calls) > failing:
                raise KeyboardInterrupt
            return rename(self, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", replace_or_die)
            self.save(tmp_path, 3)
        assert load_state(path).metadata == {"step": 2}


class TestWriting:
    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_mode_follows_the_umask(
        self, tmp_path: Path, model: GPTVAE, umask: Callable[[int], object], mask: int, mode: int
    ) -> None:
        """safetensors writes 0600 whatever the umask, so that a colleague could not read a shared model."""
        umask(mask)
        save_model(tmp_path / "m.safetensors", model, HEADER)
        assert stat.S_IMODE((tmp_path / "m.safetensors").stat().st_mode) == mode

    def test_symbolic_link_is_kept_and_its_target_replaced(self, tmp_path: Path, model: GPTVAE) -> None:
        """safetensors would put a file in the link's place and leave the model on the big disk as it was."""
        disk, run = tmp_path / "disk", tmp_path / "run"
        disk.mkdir()
        run.mkdir()
        (run / "model.safetensors").symlink_to("../disk/model.safetensors")
        for _ in range(2):  # once to make the target, once to replace it
            save_model(run / "model.safetensors", model, HEADER)
            assert (run / "model.safetensors").is_symlink()
            assert load(disk / "model.safetensors", device=CPU).header == HEADER
        assert list(disk.iterdir()) == [disk / "model.safetensors"]

    def test_linked_state_keeps_its_previous_state_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "disk").mkdir()
        path = tmp_path / "state.safetensors"
        path.symlink_to("disk/state.safetensors")
        for step in (1, 2):
            save_state(path, {}, {"step": step})
        (tmp_path / "disk" / "state.safetensors").write_bytes(b"")
        assert load_state(path).metadata == {"step": 1}

    def test_write_that_safetensors_cannot_finish_keeps_the_old_file(self, path: Path, model: GPTVAE) -> None:
        content = path.read_bytes()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(GPTVAEError, match=r"cannot write .*File too large") as caught:
                save_model(path, model, HEADER)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.exit_code == ExitCode.FAILURE
        assert path.read_bytes() == content
        assert list(path.parent.iterdir()) == [path]
