"""A command's work, done by a server that has the model loaded: `--server URL`, or MFLUX_SERVER.

Everything is settled here as it would be without a server, and so refused with the same sentences; what is sent is what
was said, and the model's defaults are the server's.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mflux.cli.terminal import say_line
from mflux.errors import ImageError, MfluxError, UsageError
from mflux.models.common.family import all_settings
from mflux.serve.models import OF_THE_SERVER
from mflux.text import one_line, shown
from mflux.utils.scale_factor import ScaleFactor

if TYPE_CHECKING:
    from mflux.cli.generate import Generate
    from mflux.cli.plan import Plan


class AwayError(MfluxError):
    """No server answers, or no longer."""


class RefusedError(MfluxError):
    """A server answers with an error.

    Attributes:
        status: HTTP's.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status
        self.exit_code = 2 if status == 400 else 1


VARIABLE, KEY_VARIABLE = "MFLUX_SERVER", "MFLUX_API_KEY"
# Until a connection is there, and between two events of a job, of which some come every quarter of a minute.
_SECONDS = 60
_LARGEST_ANSWER = 256 << 20
_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
# What is done here, or is said to the server in another way.
_HERE = frozenset(
    {
        "server", "prompt", "prompt_file", "output", "metadata", "no_metadata", "verbose", "config_from_metadata",
        "seed", "auto_seeds", "model", "base_model", "image", "image_path", "lora", "lora_paths", "lora_scales",
        "width", "height",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """Where a server answers.

    Attributes:
        url: http or https, with a host, perhaps a port and a path before the routes.
        key: that it wants, if any.
        option: what said so, for messages.
    """

    url: str
    key: str | None = None
    option: str = "--server"

    @staticmethod
    def at(url: str, option: str = "--server") -> Server:
        """
        Args:
            option: what says it, for messages.

        Raises:
            UsageError: it is no address of a server.
        """
        try:
            parts = urlsplit(url)
            sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            sound = sound and not (parts.query or parts.fragment)
        except ValueError:
            sound = False
        if not sound or parts.username is not None or not url.isprintable():
            raise UsageError(f"{option} {shown(url, 100)} is no address of a server: http://127.0.0.1:7860")
        key = os.environ.get(KEY_VARIABLE) or None
        if key is not None and not (key.isascii() and key.isprintable()):
            raise UsageError(f"{KEY_VARIABLE} holds what no header can: use letters, digits and - . _")
        # OpenAI's clients are given the address with /v1.
        return Server(url.rstrip("/").removesuffix("/v1"), key, option)

    def ask(self, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
        """An answer, its body unread.

        Raises:
            MfluxError: there is none, or it is an error; in the server's words.
        """
        parts = urlsplit(self.url)
        host, port = parts.hostname or "", parts.port
        connection: http.client.HTTPConnection
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(host, port, timeout=_SECONDS, context=context)
        else:
            connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
        headers = {"connection": "close"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        data = None
        if body is not None:
            data, headers["content-type"] = json.dumps(body).encode(), "application/json"
        try:
            connection.request(method, parts.path + path, data, headers)
            answer = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._away(error) from None
        if answer.status >= 300:
            with closing(answer):
                raise self._error(answer)
        return answer

    def json(self, method: str, path: str, body: Any = None) -> Any:
        try:
            return json.loads(self.read(method, path, body))
        except ValueError:
            raise self.other() from None

    def other(self) -> MfluxError:
        """Something answers, and talks of other things."""
        return MfluxError(
            f"what answers at {shown(self.url, 100)} is no mflux serve: check the address, or leave {self.option} out"
        )

    def read(self, method: str, path: str, body: Any = None) -> bytes:
        try:
            with closing(self.ask(method, path, body)) as answer:
                return answer.read(_LARGEST_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            raise self._away(error) from None

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """Server-sent events by their names.

        Raises:
            MfluxError: they end before their end.
        """
        try:
            with closing(self.ask("GET", path)) as answer:
                name = ""
                for line in answer:
                    text = line.decode().rstrip("\r\n")
                    if text.startswith("event: "):
                        name = text[7:]
                    elif text.startswith("data: "):
                        yield name, json.loads(text[6:])
                        if name == "end":
                            return
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._away(error) from None
        raise self._away(ConnectionError("it ended before the image was there"))

    def _away(self, error: Exception) -> AwayError:
        reason = getattr(error, "strerror", None) or error or type(error).__name__
        return AwayError(
            f"no server answers at {shown(self.url, 100)} ({one_line(reason, 200)}): start one with mflux serve, or "
            f"leave {self.option} out"
        )

    def _error(self, answer: http.client.HTTPResponse) -> RefusedError:
        message = f"it answered {answer.status}"
        with suppress(ValueError, KeyError, TypeError, OSError):
            message = str(json.loads(answer.read(1 << 20))["error"]["message"])
        if answer.status == 401:
            message = f"it wants a key: set {KEY_VARIABLE}"
        return RefusedError(f"{shown(self.url, 100)}: {one_line(message, 1000)}", answer.status)


def generate(command: Generate, plan: Plan, url: str) -> None:
    """Have a server generate what a plan asks for, and write it where the plan's options say.

    Raises:
        UsageError: the plan has what only this machine can do.
        MfluxError: there is no such server, or it has no image.
    """
    from mflux.utils.picture_files import check_output

    args = plan.options
    server = Server.at(url, VARIABLE if args.server is None else "--server")
    _refuse_what_is_not_sent(command, plan)
    outputs = [args.output.replace("{seed}", str(seed)) for seed in args.seed]
    for output in outputs:
        check_output(output)
    wanted = _wanted(command, plan)
    # All at once, so that they stand in its queue one behind the other; and each is written as soon as it is there.
    jobs: list[Mapping[str, Any]] = []
    try:
        for seed, output in zip(args.seed, outputs, strict=True):
            output_format = _FORMATS.get(Path(output).suffix.lower(), "png")
            body = wanted | {"seed": seed, "output_format": output_format}
            job = server.json("POST", "/v1/jobs", body)
            if not isinstance(job, dict) or not job.keys() >= {"id", "steps"}:
                raise server.other()
            jobs.append(job)
        for job, output in zip(list(jobs), outputs, strict=True):
            _follow(server, job)
            _write(server.read("GET", f"/v1/jobs/{job['id']}/images/0"), output, args)
            jobs.remove(job)
    finally:
        # What is left of them, nobody waits for.
        for job in jobs:
            with suppress(MfluxError):
                server.ask("DELETE", f"/v1/jobs/{job['id']}").close()


def _follow(server: Server, job: Mapping[str, Any]) -> None:
    """Show how far a job is, until it is over."""
    from mflux.utils.progress import bar_class

    with bar_class()(total=job["steps"], desc="denoise", unit="step") as bar:
        for name, state in server.events(f"/v1/jobs/{job['id']}/events"):
            if name not in ("job", "end"):
                continue
            if state["status"] == "queued":
                bar.set_description(f"waiting, {state['position']} before it", refresh=True)
                continue
            bar.set_description("denoise" if state["status"] != "loading" else "load", refresh=False)
            bar.update(state["step"] - bar.n)
            if state["status"] in ("failed", "cancelled"):
                raise MfluxError(f"{shown(server.url, 100)}: {one_line(state['error']['message'], 1000)}")


def _write(data: bytes, output: str, args: Any) -> None:
    """An image's file, as the options want it."""
    from mflux.serve.jobs import Picture
    from mflux.utils.given_image import GivenImage
    from mflux.utils.metadata_reader import MetadataReader
    from mflux.utils.picture_files import open_image, oriented_size, save_picture

    settings = MetadataReader.read_exif_metadata(GivenImage(data)) or {}
    if not args.metadata and not args.no_metadata:
        kind = _FORMATS.get(Path(output).suffix.lower(), "png")
        size = oriented_size(GivenImage(data))
        say_line(Picture(data, kind, settings.get("seed", 0), size, settings).save(output))
        return
    image = open_image(GivenImage(data))
    say_line(
        save_picture(image, output, settings, export_json_metadata=args.metadata, embed_metadata=not args.no_metadata)
    )


def _sent(command: Generate) -> set[str]:
    """Options that a request has a field for."""
    known = {setting.name for setting in all_settings() if setting.kind is not None and not setting.takes}
    return (known - OF_THE_SERVER) | _HERE | {command.size_source, *command.sources}


def _refuse_what_is_not_sent(command: Generate, plan: Plan) -> None:
    if other := sorted(plan.said.command_line - _sent(command)):
        name = other[0].replace("_", "-")
        raise UsageError(f"--{name} is for whoever starts the server: leave it out, or --server")
    if callable(plan.prompt):
        raise UsageError("the words are turned into JSON on this machine: give the JSON itself, or leave --server out")


def _wanted(command: Generate, plan: Plan) -> dict[str, Any]:
    """What was said, as a job's fields."""
    args, said = plan.options, plan.said
    wanted: dict[str, Any] = {"model": args.model, "prompt": plan.words, "previews": 0}
    for name in sorted(_sent(command) - _HERE - {command.size_source, *command.sources}):
        value = getattr(args, name, None)
        if said.was_set(name) and value is not None and not isinstance(value, ScaleFactor):
            wanted[name] = value
    if said.was_set("width", "height") and plan.images[0].get("width"):
        wanted |= {side: plan.images[0][side] for side in ("width", "height")}
    if len(getattr(args, "image", None) or ()) > 1:
        wanted["image_strength"] = args.image_strength
    if said.was_set("lora", "lora_paths", "lora_style"):
        pairs = zip(args.lora_paths, args.lora_scales, strict=True)
        wanted["loras"] = [{"name": name, "scale": scale} for name, scale in pairs]
    sources = [name for name in (command.size_source, *command.sources) if getattr(args, name, None)]
    images = [name for name in dict.fromkeys(sources) if name != "masked_image_path"]
    if len(images) > 1:
        raise UsageError(f"a server takes one kind of source image, and there are {', '.join(images)}")
    if images:
        paths = getattr(args, images[0])
        wanted["images"] = [_data_url(path) for path in (paths if isinstance(paths, list) else [paths])]
    if "masked_image_path" in sources:
        wanted["mask"] = _data_url(args.masked_image_path)
    return wanted


def _data_url(path: Path) -> str:
    try:
        return data_url(path.read_bytes())
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}") from None


def data_url(data: bytes) -> str:
    """An image's file as it is sent; its kind is told by its contents."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"
