"""What may be hooked into a generation: in which order, with what, and what the hooks of mflux do."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mflux.backend import mx
from mflux.callbacks.callback_registry import CallbackRegistry
from mflux.callbacks.instances import battery_saver
from mflux.callbacks.instances.battery_saver import BatterySaver, battery_percentage, parse_pmset
from mflux.callbacks.instances.memory_saver import MemorySaver
from mflux.errors import MfluxError, UsageError
from mflux.models.common.config import ModelConfig
from mflux.models.common.config.config import Config
from mflux.models.common.networks.autoencoders.tiling import TilingConfig
from mflux.utils.exceptions import MFluxException, StopImageGenerationException

# As pmset prints them.
ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22085731)	{}%; discharging; 3:13 remaining present: true
"""
ON_MAINS = ON_BATTERY.replace("Battery Power", "AC Power").replace("discharging", "charging")


# ---- the registry


class Everything:
    """Writes down each call and its arguments."""

    def __init__(self, name: str, calls: list):
        self.name, self.calls = name, calls

    def __getattr__(self, method):
        if not method.startswith("call_"):
            raise AttributeError(method)
        return lambda **details: self.calls.append((self.name, method, details))


class OnlyInLoop:
    def __init__(self, calls: list):
        self.calls = calls

    def call_in_loop(self, t, seed, prompt, latents, config, time_steps):
        self.calls.append(("only", t))


def test_each_is_called_in_order_with_what_it_is_promised():
    calls = []
    registry = CallbackRegistry()
    registry.register(Everything("first", calls))
    registry.register(OnlyInLoop(calls))
    registry.register(Everything("second", calls))
    config = Config(ModelConfig.schnell(), 2, 32, 32)
    context = registry.start(seed=7, prompt="a circle", config=config)
    latents = mx.zeros(3)
    settings = {"seed": 7, "prompt": "a circle", "config": config, "latents": latents}
    none = {"canny_image": None, "depth_image": None, "control_images": None}

    context.before_loop(latents)
    context.in_loop(0, latents)
    context.interruption(1, latents)
    context.after_loop(latents)
    context.before_loop(latents, depth_image="depth")
    steps = {"time_steps": context.time_steps}
    expected = [
        ("call_before_loop", settings | none),
        ("call_in_loop", settings | steps | {"t": 0}),
        ("call_interrupt", settings | steps | {"t": 1}),
        ("call_after_loop", settings),
        ("call_before_loop", settings | none | {"depth_image": "depth"}),
    ]
    for name in ("first", "second"):
        assert [call[1:] for call in calls if call[0] == name] == expected
    order = [call[0] for call in calls]
    assert order == [
        "first",
        "second",
        "first",
        "only",
        "second",
        "first",
        "second",
        "first",
        "second",
        "first",
        "second",
    ]


def test_what_hooks_into_nothing_is_refused():
    registry = CallbackRegistry()
    with pytest.raises(UsageError, match="has none of the methods that are called"):
        registry.register(object())
    assert vars(registry) == {"before_loop": [], "in_loop": [], "after_loop": [], "interrupt": []}


# ---- the battery


def test_what_pmset_says():
    assert parse_pmset(ON_BATTERY.format(57)) == 57
    assert parse_pmset(ON_BATTERY.format(100)) == 100
    assert parse_pmset(ON_MAINS.format(3)) is None
    assert parse_pmset("Now drawing from 'AC Power'\n") is None  # a desktop
    assert parse_pmset("Now drawing from 'Battery Power'\n") is None
    assert parse_pmset("") is None


@pytest.fixture
def a_mac(monkeypatch):
    """A Mac whose pmset says what the test puts here."""

    def say(report: str | Exception):
        def run(command, **options):
            assert command == ["pmset", "-g", "batt"]
            if isinstance(report, Exception):
                raise report
            return subprocess.CompletedProcess(command, 0, report, "")

        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(battery_saver.subprocess, "run", run)

    return say


def test_a_low_battery_stops(a_mac):
    a_mac(ON_BATTERY.format(9))
    BatterySaver(8).call_before_loop(seed=1)
    for limit in (9, 10):
        with pytest.raises(StopImageGenerationException) as caught:
            BatterySaver(limit).call_before_loop(seed=1)
        assert str(caught.value) == (
            f"stopped: the battery is at 9 %, the limit is {limit} % "
            "(--battery-percentage-stop-limit); plug in and run again"
        )
        assert caught.value.exit_code == 1
    assert BatterySaver().limit == 10


@pytest.mark.parametrize(
    "report",
    [
        ON_MAINS.format(1),
        "",
        FileNotFoundError("pmset"),
        subprocess.CalledProcessError(1, "pmset"),
        subprocess.TimeoutExpired("pmset", 10),
    ],
)
def test_nothing_stops_where_nothing_is_known(a_mac, report):
    a_mac(report)
    assert battery_percentage() is None
    BatterySaver(99).call_before_loop()


def test_nothing_is_asked_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(battery_saver.subprocess, "run", None)
    assert battery_percentage() is None


def test_a_low_battery_ends_the_command(cli, in_folder, tiny_schnell, a_mac):
    a_mac(ON_BATTERY.format(20))
    words = ["generate", "--model", tiny_schnell, "--prompt", "x", "--width", 16, "--height", 16, "--steps", 1]
    result = cli(*words, "-B", 20)
    assert result.status == 1
    assert result.errors == [
        "error: stopped: the battery is at 20 %, the limit is 20 % (--battery-percentage-stop-limit); "
        "plug in and run again"
    ]
    assert list(in_folder.iterdir()) == []
    assert cli(*words, "-B19").status == 0


@pytest.mark.parametrize(("given", "taken"), [("-5", 1), ("0", 1), ("42", 42), ("100", 99)])
def test_the_limit_is_a_percentage(given, taken):
    from mflux.models.flux.cli.flux_generate import build_parser

    assert build_parser().parse(["-B", given])[0].battery_percentage_stop_limit == taken


def test_stopping_is_mflux_s_own_exception():
    error = StopImageGenerationException("stopped")
    assert isinstance(error, MfluxError)
    assert isinstance(error, MFluxException)
    assert error.exit_code == 1


# ---- memory


class Pipeline:
    """As much of one as the memory saver sees."""

    def __init__(self):
        self.tiling_config = None
        self.released = []

    def release_stages(self, *stages):
        self.released += stages


def test_the_memory_saver_lets_go(monkeypatch):
    limits = []
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: limits.append(limit) or 10**10)
    config = Config(ModelConfig.schnell(), 1, 32, 32)
    details = {"seed": 1, "prompt": "x", "latents": mx.zeros(3), "config": config}

    pipeline = Pipeline()
    saver = MemorySaver(pipeline, keep_transformer=False)
    assert limits == [10**9]
    assert pipeline.tiling_config == TilingConfig()
    saver.call_before_loop(**details)
    assert pipeline.released == ["encode"]
    saver.call_in_loop(t=0, time_steps=config.time_steps, **details)
    saver.call_after_loop(**details)
    assert pipeline.released[1:] == ["denoise"]

    pipeline = Pipeline()
    saver = MemorySaver(pipeline, cache_limit_bytes=None, keep_text_encoder=True)
    saver.call_before_loop(**details)
    saver.call_after_loop(**details)
    assert pipeline.released == []
    assert pipeline.tiling_config is None
    assert limits == [10**9]


def test_a_tile_size_that_was_chosen_stays(monkeypatch):
    monkeypatch.setattr(mx, "set_cache_limit", lambda limit: 10**10)
    pipeline = Pipeline()
    pipeline.tiling_config = TilingConfig(vae_decode_tile_size=128)
    MemorySaver(pipeline)
    assert pipeline.tiling_config.vae_decode_tile_size == 128


def test_how_much_memory_was_held():
    saver = MemorySaver(Pipeline(), cache_limit_bytes=None)
    mx.reset_peak_memory()
    mx.eval(mx.ones(5_000_000))
    assert saver.memory_stats() == "peak MLX memory: 0.02 GB"
