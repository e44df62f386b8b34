"""`mflux-capabilities`: the commands describe themselves, in three formats."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

import mflux
from mflux.cli.capabilities import FORMATS, capabilities, yaml_lines
from mflux.cli.commands import COMMANDS
from mflux.cli.generate import Generate
from mflux.cli.parser.settle import NOT_BUILT_OPTIONS

OPTIONS = json.loads((Path(__file__).parents[2] / "data" / "surface" / "cli.json").read_text())


@pytest.fixture(scope="module")
def described() -> dict:
    return {command["command"]: command for command in capabilities(list(COMMANDS))["commands"]}


def test_every_command_is_there(cli, described):
    found = json.loads(cli("capabilities").out)
    assert list(found) == ["schema_version", "mflux_version", "commands"]
    assert (found["schema_version"], found["mflux_version"]) == (1, mflux.__version__)
    assert {command["command"]: command for command in found["commands"]} == described
    assert list(described) == [f"mflux-{name}" for name in COMMANDS]


@pytest.mark.parametrize("name", [name for name in COMMANDS if f"mflux-{name}" in OPTIONS])
def test_an_option_is_said_as_in_mflux_024(described, name):
    """Type, default, choices and number of values of what it had, by whichever flag."""
    entries = {flag: entry for entry in described[f"mflux-{name}"]["options"]
               for flag in (entry["flag"], *entry.get("aliases", ()))}  # fmt: skip
    for option in OPTIONS[f"mflux-{name}"]:
        if option["flags"] == ["--version"]:
            continue
        entry = entries[option["flags"][0]]
        assert entry["parser_default"] == option.get("default"), option
        # `test_surface` knows which ones are ours.
        assert set(entry.get("choices", ())) >= set(map(str, option.get("choices") or ())), option
        if entry["flag"].startswith("-"):
            assert entry.get("required", False) == option.get("required", False), option
        nargs = option.get("nargs")
        assert entry.get("nargs") == (str(nargs) if nargs else None), option
        if option.get("type") in ("int", "float"):
            assert entry["type"] == option["type"], option


def test_what_an_option_does_is_what_the_command_says(described):
    seen = set()
    for name, command in COMMANDS.items():
        module = importlib.import_module(command.module)
        draws = next((thing for thing in vars(module).values() if isinstance(thing, Generate)), None)
        entry = described[f"mflux-{name}"]
        assert ("traits" in entry) == (draws is not None)
        for option in entry["options"]:
            destination = option["flag"].removeprefix("--").replace("-", "_")
            expected = "honored"
            for status in ("conditional", "ignored", "rejected"):
                if draws is not None and destination in getattr(draws, status):
                    expected = status
            expected = "rejected" if destination in NOT_BUILT_OPTIONS else expected
            assert (expected == "conditional") == ("condition" in option)
            assert option["status"] == expected and (expected == "honored") == ("reason" not in option)
            seen.add(expected)
    assert seen == {"conditional", "honored", "ignored", "rejected"}
    generate = described["mflux-generate"]["traits"]
    assert generate["lora"] and generate["img2img"] and generate["metadata_config"] and not generate["controlnet"]
    groups = [option["choice_group"] for option in described["mflux-generate"]["options"] if "choice_group" in option]
    assert groups == [0, 0], "--prompt and --prompt-file"


@pytest.mark.parametrize("name", ["mflux-info", "info"])
def test_one_command(cli, described, name):
    found = json.loads(cli("capabilities", "--command", name).out)
    assert found["commands"] == [described["mflux-info"]]
    assert found["commands"][0]["options"][-1] == {
        "flag": "image_path", "type": "str", "parser_default": None, "status": "honored", "required": True,
        "help": "the image, a .metadata.json, or a file of weights (safetensors, GGUF, .pt)",
    }  # fmt: skip


def test_a_command_that_is_none(cli):
    result = cli("capabilities", "--command", "mflux-generat")
    assert result.status == 2
    assert result.errors == ["error: there is no command 'mflux-generat': did you mean generate? (see mflux --help)"]


def test_yaml_says_the_same(cli):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(cli("capabilities", "--format", "yaml").out) == json.loads(cli("capabilities").out)
    odd = {"a": [[1, [2]], {"b": {}, "c": []}], "d": ["- x: y # z", 'q"\n', "é☃", None, True, 1e-05, "yes"]}
    assert yaml.safe_load("\n".join(yaml_lines(odd))) == odd


def test_a_table_for_each_command(cli):
    lines = cli("capabilities", "--format", "markdown").out.splitlines()
    assert [line[3:] for line in lines if line.startswith("## ")] == [f"mflux-{name}" for name in COMMANDS]
    rows = [line for line in lines if line.startswith("|")]
    assert all(line.replace("\\|", "").count("|") == 6 for line in rows)
    assert "| `--negative-prompt` | str | '' | ignored | FLUX.1 has no negative branch |" in rows
    assert FORMATS == ("json", "yaml", "markdown")
