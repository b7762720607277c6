"""Where options are given: the layers, which of them wins, and the way to TOML and back."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from gptvae_cli.config import DataConfig, MachineConfig, RunConfig, SizeConfig, TrainConfig, from_dict
from gptvae_cli.errors import ConfigError, ExitCode
from gptvae_cli.options import (
    TABLES,
    Plan,
    default_in_words,
    environment_layer,
    file_layer,
    flags_layer,
    keys,
    merged,
    misspelt,
    parse_seconds,
    to_toml,
)

TRICKY = 'quote " backslash \\ tab \t é 中 😀 \u2028 del \x7f esc \x1b nul \x00 </script>'


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str | bytes], Path]:
    """Writes a configuration file."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "c.toml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def refused(call: Callable[[], object]) -> tuple[str, str | None]:
    """Message and hint of a usage error that is told in one line."""
    with pytest.raises(ConfigError) as caught:
        call()
    assert caught.value.exit_code == ExitCode.USAGE
    assert "\n" not in caught.value.message
    return caught.value.message, caught.value.hint


def test_no_two_tables_share_a_key() -> None:
    """A flag and a variable name an option without its table."""
    every = [field.name for kind in TABLES.values() for field in fields(kind)]
    assert len(set(every)) == len(every)


# All together ---------------------------------------------------------------------------------------------------------


def plan(environment: dict[str, str] | None = None, **options: Any) -> Plan:
    return Plan({"config": None, "resume": False, **options}, environment or {})


def test_flags_go_over_the_file_and_that_over_the_environment(write: Callable[[str | bytes], Path]) -> None:
    path = write("[model]\ndim = 64\ndepth = 5\n")
    found = plan({"GPTVAE_DIM": "32", "GPTVAE_DEPTH": "6", "GPTVAE_HEADS": "7"}, config=path, dim=128)
    assert (found.sizes.dim, found.sizes.depth, found.sizes.heads) == (128, 5, 7)
    assert refused(lambda: plan({"GPTVAE_THREADS": "0"}))[0].startswith("GPTVAE_THREADS is 0")
    assert refused(lambda: plan(threads=0))[0].startswith("--threads is 0")


def test_a_number_of_steps_takes_the_limit_of_time_away() -> None:
    assert plan().train.max_time == 600
    assert plan(steps=3).train.max_time is None
    assert plan(steps=3, max_time="90s").train.max_time == 90


def test_a_resumed_run_keeps_what_it_was_asked_for() -> None:
    assert plan({"GPTVAE_DIM": "32"}, resume=True).sizes.dim is None
    found = plan({"GPTVAE_THREADS": "3", "GPTVAE_STEPS": "9"}, resume=True, epochs=2.0, strict=True)
    assert found.machine.threads == 3
    assert found.limits_for_resume() == {"steps": None, "epochs": 2.0, "max_time": None, "strict": True}
    message, _ = refused(plan(resume=True, lr=0.1).limits_for_resume)
    assert message == "--resume keeps the run's configuration, found --lr"


# Files ----------------------------------------------------------------------------------------------------------------

CONFIGS = [
    RunConfig(corpus=["a.txt", TRICKY], out="there"),
    DataConfig(field=TRICKY, valid="held-out.txt", vocab_size=300),
    SizeConfig(preset="small", dim=96),
    TrainConfig(lr=1e-5, steps=10**12, weight_decay=1e-300, strict=True),
    MachineConfig(device="cuda:1", dtype="float32", threads=3),
]


@pytest.mark.parametrize(
    "configs",
    [CONFIGS, [kind() for kind in TABLES.values()], [TrainConfig(steps=5, max_time=None)]],
    ids=["all", "defaults", "no-time"],
)
def test_configs_survive_a_file(write: Callable[[str], Path], configs: list[Any]) -> None:
    values = file_layer(write(to_toml(configs))).values
    for config in configs:
        own = {key: value for key, value in values.items() if key in keys(type(config))}
        unset = {"max_time": None} if isinstance(config, TrainConfig) and config.max_time is None else {}
        assert from_dict(type(config), {**own, **unset}) == config


def test_what_is_not_set_stands_in_comments_that_say_what_it_means() -> None:
    text = to_toml([RunConfig(), TrainConfig(max_time=None, steps=3)])
    assert "# lr =    # by the width of the model\n" in text
    assert "# corpus =    # standard input\n" in text
    assert "max_time" not in tomllib.loads(text)["train"]


def test_a_name_that_is_not_unicode_is_refused() -> None:
    assert "not UTF-8" in refused(lambda: to_toml([RunConfig(corpus=["na\udcefve.txt"])]))[0]


def test_a_time_and_a_share_may_be_written_as_people_write_them(write: Callable[[str], Path]) -> None:
    values = file_layer(write('[data]\nvalid = 0.1\n[train]\nmax_time = "1h30m"\n')).values
    assert values == {"valid": "0.1", "max_time": 5400.0}
    assert file_layer(write("[train]\nmax_time = 90\n")).values == {"max_time": 90}


@pytest.mark.parametrize(
    ("content", "words", "hint"),
    [
        ("[train\n", "c.toml is not TOML: ", "--print-config"),
        (b'[data]\nfield = "\xff"', "c.toml is not TOML: ", "--print-config"),
        ("[trian]\nsteps = 5", "has 'trian' at its top, its tables are run, data, model, train", "did you mean train?"),
        ("[x]\nsteps = 5", "has 'x' at its top", "--print-config"),
        ("steps = 5", "has 'steps' at its top", "it belongs below [train]"),
        ("train = 5", "has 'train' at its top", "did you mean train?"),
        ("[train]\nkl_warmpu = 1", "c.toml, [train] has no key 'kl_warmpu'", "did you mean kl_warmup or warmup?"),
        ("[train]\ndim = 1", "c.toml, [train] has no key 'dim'", "it belongs below [model]"),
        ("[run]\nxyz = 1", "c.toml, [run] has no key 'xyz'", "known keys: corpus, out"),
        ("[model]\ndim = 'wide'", "c.toml, [model] dim is 'wide', it must be a whole number", None),
        ("[train]\nsteps = true", "c.toml, [train] steps is True, it must be a whole number", None),
        ("[train]\nlr = []", "c.toml, [train] lr is [], it must be a number", None),
        ("[train]\nlr = {a = 1}", "c.toml, [train] lr is {'a': 1}, it must be a number", None),
        ("[run]\ncorpus = 'a.txt'", "c.toml, [run] corpus is 'a.txt', it must be a list of texts", None),
        ("[train]\nstrict = 1979-05-27", "[train] strict is datetime.date(1979, 5, 27), it must be true or", None),
        ("[train]\nmax_time = '10x'", "c.toml, [train] max_time is '10x', it must be a time such as 90s", None),
        ("[data]\nvalid = true", "c.toml, [data] valid is True, it must be text", None),
    ],
    ids=lambda value: str(value).replace("\n", " ") if "=" in str(value) or "[" in str(value)[:1] else "",
)
def test_what_is_wrong_in_a_file_is_named_with_its_place(
    write: Callable[[str | bytes], Path], content: str | bytes, words: str, hint: str | None
) -> None:
    message, found = refused(lambda: file_layer(write(content)))
    assert words in message
    assert found == hint or (hint is not None and found is not None and hint in found)


def test_a_file_that_cannot_be_read_is_wrong_usage(tmp_path: Path) -> None:
    assert "cannot read the configuration" in refused(lambda: file_layer(tmp_path / "nowhere.toml"))[0]
    assert "Is a directory" in refused(lambda: file_layer(tmp_path))[0]


# The environment ------------------------------------------------------------------------------------------------------


def test_the_environment_holds_every_option_but_the_corpus_in_its_type() -> None:
    expected = {
        "out": "there",
        "valid": "0.1",
        "vocab_size": 300,
        "preset": "nano",
        "dim_latent": 5,
        "lr": 1e-3,
        "epochs": 2.0,
        "max_time": 600.0,
        "strict": True,
        "seed": 7,
        "device": "cpu",
        "threads": 2,
    }
    written = {f"GPTVAE_{key.upper()}": str(value) for key, value in expected.items()}
    found = environment_layer(
        {**written, "GPTVAE_MAX_TIME": "10m", "HOME": "/", "GPTVAE_CORPUS": "a", "GPTVAE_LR": ".001"}
    )
    assert found.values == expected
    for key in keys(TrainConfig):
        assert key in environment_layer({f"GPTVAE_{key.upper()}": "1"}).values


def test_an_empty_variable_is_not_set() -> None:
    assert environment_layer({"GPTVAE_DIM": "", "GPTVAE_STRICT": ""}).values == {}


def test_a_variable_that_is_nearly_one_of_ours_is_told() -> None:
    ours = {
        "GPTVAE_MODEL": "m",
        "GPTVAE_DIM": "8",
        "GPTVAE_MAX_TIME": "1m",
        "GPTVAE_CORPUS": "a",
        "GPTVAE_DEVICE": "cpu",
    }
    others = {"GPTVAE_HOME_OF_MINE": "x", "MAX_TIME": "1", "GPTVAE_TEST_DATA": "x"}
    assert list(misspelt(ours | others)) == []
    (note,) = misspelt(ours | {"GPTVAE_TARGETRATE": "16"})
    assert note == "GPTVAE_TARGETRATE is set and names no option; did you mean target_rate?"


@pytest.mark.parametrize(("text", "value"), [("1", True), ("yes", True), ("TRUE", True), ("0", False), ("no", False)])
def test_a_switch_may_be_written_in_several_ways(text: str, value: bool) -> None:
    assert environment_layer({"GPTVAE_STRICT": text}).values == {"strict": value}


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("GPTVAE_DIM", "two", "GPTVAE_DIM is 'two', it must be a whole number"),
        ("GPTVAE_DIM", "1.5", "GPTVAE_DIM is '1.5', it must be a whole number"),
        ("GPTVAE_LR", "fast", "GPTVAE_LR is 'fast', it must be a number"),
        ("GPTVAE_STRICT", "maybe", "GPTVAE_STRICT is 'maybe', it must be true or false"),
        ("GPTVAE_MAX_TIME", "soon", "GPTVAE_MAX_TIME is 'soon', it must be a time such as 90s, 10m or 1h30m"),
    ],
)
def test_a_wrong_value_in_the_environment_names_the_variable(variable: str, text: str, message: str) -> None:
    assert refused(lambda: environment_layer({variable: text}))[0] == message


# Layers over each other -----------------------------------------------------------------------------------------------


def test_the_last_layer_wins_with_its_name_for_the_option(write: Callable[[str], Path]) -> None:
    environment = environment_layer({"GPTVAE_DIM": "1", "GPTVAE_LR": "1", "GPTVAE_SEED": "1"})
    file = file_layer(write("[model]\ndim = 2\n[train]\nlr = 2\n"))
    flags = flags_layer({"dim": 3, "lr": None, "quiet": True})
    found = merged([environment, file, flags])
    assert found.values == {"dim": 3, "lr": 2, "seed": 1}
    assert found.labels["dim"] == "--dim"
    assert found.labels["lr"].endswith("c.toml, [train] lr")
    assert found.labels["seed"] == "GPTVAE_SEED"


def test_a_flag_with_a_time_is_seconds() -> None:
    assert flags_layer({"max_time": "10m"}).values == {"max_time": 600.0}
    assert refused(lambda: flags_layer({"max_time": "soon"}))[0].startswith("--max-time is 'soon'")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("max_time", "10m, none with --steps or --epochs"),
        ("dim", "by the preset"),
        ("target_rate", "8"),
        ("kl_warmup", "0.3"),
        ("batch_tokens", "2048"),
        ("out", "gptvae-run"),
        ("corpus", "standard input"),
    ],
)
def test_a_default_is_told_in_words(key: str, words: str) -> None:
    assert default_in_words(key) == words


def test_every_option_that_may_be_unset_says_what_that_means() -> None:
    for kind in TABLES.values():
        assert "not set" not in [default_in_words(key) for key in asdict(kind())]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1d", 86400), ("0.5", 0.5)],
)
def test_a_time_may_be_written_in_several_ways(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "10 m", "10x", "-5", "1h 30m", "1m30", "1e3", "inf", "1..5m", "٣", "٣m"])
def test_what_is_not_a_time_is_told_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match=r"max-time is .* it must be a time such as 90s, 10m or 1h30m"):
        parse_seconds(text)
