"""`mflux-serve`: models kept loaded, over HTTP, with a page."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.cli.parser.groups import add_lora_options, add_machine_options
from mflux.cli.parser.parsers import MfluxParser
from mflux.cli.process import status_of
from mflux.cli.terminal import complain, run, say_line
from mflux.errors import MfluxError, UsageError
from mflux.text import shown
from mflux.utils import values
from mflux.utils.paths import read_bounded

if TYPE_CHECKING:
    from mflux.serve.engine import Engine
    from mflux.serve.guard import Rules

log = logging.getLogger(__name__)

PORT = 7860
KEY_VARIABLE = "MFLUX_API_KEY"
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# After these seconds beyond --grace the process ends wherever it is.
_LAST_SECONDS = 3.0
_BACKLOG = 256


def build_parser() -> MfluxParser:
    """The command's parser; completions use it as well."""
    parser = MfluxParser(
        prog="mflux-serve",
        description="Keep models loaded and generate over HTTP: a page, OpenAI's images API, and AUTOMATIC1111's "
        "routes. When it is ready its address is written to standard output.",
        epilog="Needs mflux[serve]. docs/serve.md says how other programs are connected.",
    )
    group = parser.add_argument_group("models")
    group.add_argument(
        "--model",
        "-m",
        action="append",
        metavar="NAME",
        help="a model's name, a folder or a repository, which is fetched now; repeatable, the first is the default "
        "(default: every model that is whole in Hugging Face's cache, and demo). Requests can name no other",
    )
    group.add_argument(
        "--quantize", "-q", type=int, choices=values.QUANTIZE_CHOICES, help="bits per weight to quantize all to"
    )
    group.add_argument(
        "--keep",
        type=values.Real(-1),
        default=900.0,
        metavar="SECONDS",
        help="without work after which a model leaves memory (default: 900; 0: at once, -1: never)",
    )
    group.add_argument(
        "--memory-limit-gb",
        type=values.Real(above=0),
        metavar="GB",
        help="that models may have together (default: three quarters of the machine's)",
    )
    add_lora_options(parser, style=False, bake=False)
    add_machine_options(parser)
    group = parser.add_argument_group("address")
    group.add_argument("--host", default="127.0.0.1", help="to listen at (default: 127.0.0.1, this machine alone)")
    group.add_argument(
        "--port", type=values.Whole(0, 65535), default=PORT, help=f"(default: {PORT}; 0: one that is free)"
    )
    group = parser.add_argument_group("who may ask")
    keys = group.add_mutually_exclusive_group()
    keys.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"that clients have to send; others on this machine see it in the list of processes, so rather set "
        f"{KEY_VARIABLE} or use --api-key-file",
    )
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help="whose first line is the key")
    keys.add_argument("--no-api-key", action="store_true", help="none, although other machines can ask")
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that this server is called by; repeatable",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a page that may ask from a browser, as https://example.org; repeatable",
    )
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--queue", type=values.Whole(1, 10_000), default=16, metavar="N", help="jobs that may wait (default: 16)"
    )
    group.add_argument(
        "--max-body-mb", type=values.Real(above=0), default=64.0, metavar="MB", help="of a request (default: 64)"
    )
    group.add_argument(
        "--max-pixels",
        type=values.Whole(256),
        default=50_000_000,
        metavar="N",
        help="of a source image (default: 50 million)",
    )
    group.add_argument(
        "--grace",
        type=values.Real(0),
        default=5.0,
        metavar="SECONDS",
        help="that the running job has when the server is stopped (default: 5)",
    )
    parser.add_argument_group("more machines").add_argument(
        "--worker",
        action="append",
        default=[],
        metavar="URL",
        help="another mflux serve that takes jobs of this one's queue, as http://mac2.local:7860; repeatable. One with "
        "a key has to have this one's",
    )
    group = parser.add_argument_group("what is served")
    group.add_argument("--no-page", action="store_true", help="no page at /")
    group.add_argument("--no-sdapi", action="store_true", help="no routes of AUTOMATIC1111's WebUI")
    group.add_argument(
        "--output", type=Path, metavar="DIR", help="write every image to this folder as well, as DATE-TIME-SEED.png"
    )
    group.add_argument("--log-prompts", action="store_true", help="show prompts in the log, which has none otherwise")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run(serve, argv)


def serve(argv: Sequence[str] | None) -> int:
    """
    Raises:
        UsageError: options make no sense, or not together.
        MissingExtraError: the extra `serve` is not installed.
        MfluxError: the port is taken, or a model cannot be had.
    """
    args = build_parser().parse_args(argv)
    rules = _rules(args)
    if args.worker:
        from mflux.serve.remote import Server as Remote

        for url in args.worker:
            Remote.at(url, "--worker")
    from mflux.serve.app import Server, check_installed
    from mflux.serve.workers import add_workers, check_workers

    check_installed()
    listener = _listen(args.host, args.port)
    try:
        if args.worker:
            # Before a model is loaded for minutes.
            check_workers(args.worker, rules.key)
        engine = _engine(args)
        if args.output is not None:
            _keep_files(engine, args.output)
        with_names = args.model is not None
        if with_names:
            for model in engine.models:
                engine.fetch(model.id)
        engine.load()
        if args.worker:
            add_workers(engine, args.worker, rules.key)
        server = Server(engine, rules, page=not args.no_page, sdapi=not args.no_sdapi, log_prompts=args.log_prompts)
        return _run(server, engine, listener, args)
    except KeyboardInterrupt as interrupt:
        # While a model is fetched or loaded, which the thread of MLX does: Python cannot end before it.
        complain("stopped")
        _end_now(status_of(interrupt))
        raise
    finally:
        listener.close()


def _rules(args: argparse.Namespace) -> Rules:
    from mflux.serve.guard import LOOPBACK, Rules

    key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    if args.api_key_file is not None:
        try:
            key = read_bounded(args.api_key_file, 4096).decode().strip().partition("\n")[0].strip()
        except OSError as error:
            raise UsageError(f"cannot read the key in {args.api_key_file}: {error.strerror or error}") from None
        except UnicodeError:
            raise UsageError(f"the key in {args.api_key_file} is no text in UTF-8") from None
    if args.no_api_key:
        key = None
    if key is not None and (not key.strip() or not key.isprintable() or not key.isascii()):
        raise UsageError("the key is empty, or holds what no header can: use letters, digits and - . _")
    if args.host not in _LOOPBACK and key is None and not args.no_api_key:
        raise UsageError(
            f"--host {shown(args.host, 60)} lets other machines ask, and there is no key: set {KEY_VARIABLE}, or "
            "--no-api-key says that it is meant"
        )
    for origin in args.allow_origin:
        if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
            raise UsageError(f"--allow-origin {shown(origin, 60)} is no origin: https://example.org, without a path")
    hosts = [*LOOPBACK, *args.allow_host]
    if args.host not in ("0.0.0.0", "::"):
        hosts.append(args.host)
    return Rules(
        key=key,
        hosts=frozenset(host.lower() for host in hosts),
        origins=frozenset(args.allow_origin),
        most_bytes=int(args.max_body_mb * (1 << 20)),
        most_pixels=args.max_pixels,
    )


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything heavy is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {shown(host, 60)} is no address of this machine: {error.strerror or error}") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise MfluxError(
            f"cannot listen at {host} port {port} ({error.strerror or error}): another server may; --port 0 takes "
            "one that is free"
        ) from None
    return listener


def _engine(args: argparse.Namespace) -> Engine:
    from mflux.cli.parser import settle
    from mflux.cli.parser.parsers import Said
    from mflux.serve.engine import Engine

    settle.settle_loras(args, Said())
    names = ("quantize", "lora_paths", "lora_scales", "bake_lora", "low_ram", "vae_tiling", "vae_tile_size",
             "mlx_cache_limit_gb")  # fmt: skip
    options = {name: value for name in names if (value := getattr(args, name)) not in (None, False, [])}
    limit = int(args.memory_limit_gb * 1e9) if args.memory_limit_gb else None
    return Engine(args.model, queue=args.queue, keep=args.keep, memory_limit=limit, **options)


def _keep_files(engine: Engine, folder: Path) -> None:
    """Write each image to a folder as well."""
    from mflux.utils.picture_files import check_output

    check_output(folder / "image.png")
    engine.output = folder


def _run(server: Any, engine: Engine, listener: socket.socket, args: argparse.Namespace) -> int:
    """Answer until a signal says otherwise. Returns the status that the signal stands for."""
    from mflux.serve.http import HttpServer, allow_connections

    allow_connections()
    http = HttpServer(server.app, ready=lambda: say_line(_address(listener)))
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        if len(stopped) > 1:
            _end_now(128 + number)
        threading.Thread(target=_stop, args=(http, engine, args.grace), daemon=True).start()
        last = threading.Timer(args.grace + 2 * _LAST_SECONDS, _end_now, (128 + number,))
        last.daemon = True
        last.start()

    with _signals(stop):
        http.run(listener)
    if not stopped:
        engine.close(0)
        return 0
    engine.close(0)
    if not engine.has_ended:
        # A step cannot be interrupted, and Python cannot end while MLX computes.
        _end_now(128 + stopped[0])
    return 128 + stopped[0]


def _stop(http: Any, engine: Engine, grace: float) -> None:
    engine.close(grace)
    http.stop()


def _end_now(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


@contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Those that end a process go to a handler instead, but for one that is ignored, as under nohup."""
    import signal

    before = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname() if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


if __name__ == "__main__":
    sys.exit(main())
