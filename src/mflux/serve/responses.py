"""Answers in the forms that several routes have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mflux.serve.jobs import FORMATS, Picture

if TYPE_CHECKING:
    from starlette.responses import Response


async def in_thread(function: Callable[..., Any], *args: Any) -> Any:
    """Something that takes a while, and nothing of MLX, beside the loop."""
    from starlette.concurrency import run_in_threadpool

    return await run_in_threadpool(function, *args)


def json_response(value: Any, status: int = 200) -> Response:
    """An answer that nothing between keeps."""
    from starlette.responses import Response

    content = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    return Response(content, status, {"cache-control": "no-store"}, "application/json")


def event(name: str, value: Any) -> bytes:
    """A server-sent event."""
    return f"event: {name}\ndata: {json.dumps(value)}\n\n".encode()


def about_picture(picture: Picture) -> dict[str, Any]:
    """What OpenAI's answers say of an image."""
    return {
        "output_format": picture.output_format,
        "size": "{}x{}".format(*picture.size),
        "quality": "auto",
        "background": "opaque",
    }


def file_response(picture: Picture) -> Response:
    """An image as a file, with its settings in it."""
    from starlette.responses import Response

    headers = {
        "content-disposition": f'inline; filename="mflux-{picture.seed}.{picture.output_format}"',
        "cache-control": "private, max-age=3600, immutable",
    }
    return Response(picture.data, headers=headers, media_type=FORMATS[picture.output_format][1])
