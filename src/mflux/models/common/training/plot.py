"""The page of a run: its loss as a curve, its previews in rows, and what was configured. One file, nothing from
elsewhere, so that it can be sent to somebody."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux.models.common.training.checkpoint import Losses
from mflux.text import shown
from mflux.utils.atomic_files import write_atomically

if TYPE_CHECKING:
    from mflux.models.common.training.spec import TrainingSpec

_WIDTH, _HEIGHT, _LEFT, _BELOW = 960, 320, 64, 28
_THUMBNAIL = 256
# More points than this are not told apart; neighbours become their mean.
_MOST_POINTS = 1200
_PREVIEW = re.compile(r"(\d{7,})_preview_image_(.+)\.png")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
svg { width: 100%; height: auto } text { font-size: 12px; fill: #555 }
table { border-collapse: collapse } td, th { padding: .3rem .6rem .3rem 0; text-align: left; vertical-align: top }
img { display: block; max-width: 16rem; height: auto } pre { background: #f4f4f4; padding: 1rem; overflow: auto }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } text { fill: #aaa }
  pre { background: #242424 } }
"""


def page(spec: TrainingSpec, losses: Losses, previews: Sequence[Path], *, done: int, total: int) -> str:
    """The page's HTML.

    Args:
        previews: the images that were generated up to now.
        done, total: batches.
    """
    title = f"LoRA for {spec.model}, batch {done:,} of {total:,}"
    parts = [f"<h1>{html.escape(title)}</h1>", _curves(spec, losses, total), _rows(previews, spec)]
    config = html.escape(json.dumps(spec.configuration, indent=2, ensure_ascii=False))
    parts.append(f"<h2>Configuration</h2><pre>{config}</pre>")
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def write(spec: TrainingSpec, losses: Losses, *, done: int, total: int) -> Path:
    """Write the page of a run anew.

    Raises:
        OutputError: it cannot be written.
    """
    output = Path(spec.checkpoint.output_path)
    previews = sorted(path for path in (output / "preview").glob("*.png") if _PREVIEW.fullmatch(path.name))
    content = page(spec, losses, previews, done=done, total=total).encode("utf-8", "replace")
    return write_atomically(output / "loss" / "loss.html", lambda file: file.write(content), overwrite=True)


# ---- the loss


def _curves(spec: TrainingSpec, losses: Losses, total: int) -> str:
    steps = [(entry["step"], entry["loss"]) for entry in losses.step_loss]
    looks = [(entry["step"], entry["loss"]) for entry in losses.batch_loss]
    held_out = [(entry["step"], entry["loss"]) for entry in losses.held_out_loss]
    if not steps and not looks:
        return "<p>No loss yet.</p>"
    if spec.monitoring is not None and spec.monitoring.smooth_loss:
        steps = smoothed(steps, spec.monitoring.smooth_loss_window)
    steps = _thinned(steps)
    together = (*steps, *looks, *held_out)
    highest = max(loss for _, loss in together) or 1.0
    last = max(total, *(step for step, _ in together), 1)

    def place(step: float, loss: float) -> str:
        x = _LEFT + (_WIDTH - _LEFT - 8) * step / last
        return f"{x:.1f},{8 + (_HEIGHT - 8 - _BELOW) * (1 - loss / highest):.1f}"

    lines = []
    for number in range(5):
        loss = highest * number / 4
        left, y = place(0, loss).split(",")
        lines.append(
            f'<line x1="{left}" x2="{_WIDTH}" y1="{y}" y2="{y}" stroke="#8884"/>'
            f'<text x="4" y="{float(y) + 4:.1f}">{loss:.3g}</text>'
        )
        x = place(last * number / 4, 0).split(",")[0]
        anchor = "end" if number == 4 else "start" if number == 0 else "middle"
        lines.append(f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{last * number // 4:,}</text>')
    for points, colour in ((steps, "#3b7dd8"), (looks, "#d8693b"), (held_out, "#2f8f4e")):
        if points:
            drawn = " ".join(place(*point) for point in points)
            lines.append(f'<polyline points="{drawn}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    said = "each batch's loss (blue)" + (
        "; a look at up to ten of the images, with noise of its own (orange)" if looks else ""
    )
    said += "; the images that are not learned from, always with the same noise (green)" if held_out else ""
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="loss">{"".join(lines)}</svg><p>{said}</p>'


def smoothed(points: Sequence[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Each point as the mean of itself and those before it, `window` of them at most."""
    losses = [loss for _, loss in points]
    return [
        (step, sum(losses[max(0, number + 1 - window) : number + 1]) / min(window, number + 1))
        for number, (step, _) in enumerate(points)
    ]


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(points) // _MOST_POINTS)
    if size <= 1:
        return points
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


# ---- previews


def _rows(previews: Sequence[Path], spec: TrainingSpec) -> str:
    table: dict[int, dict[str, Path]] = {}
    for path in previews:
        if match := _PREVIEW.fullmatch(path.name):
            table.setdefault(int(match[1]), {})[match[2]] = path
    if not table:
        return ""
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    monitoring = spec.monitoring
    prompts: dict[str, str] = {}
    if monitoring is not None:
        prompts = dict(zip(monitoring.preview_prompt_names, monitoring.preview_prompts, strict=True))
    heads = "".join(f"<th>{html.escape(shown(prompts.get(name, name), 300))}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{step:,}</td>{''.join(f'<td>{_thumbnail(row.get(name))}</td>' for name in names)}</tr>"
        for step, row in sorted(table.items())
    )
    return f"<h2>Previews</h2><table><tr><th>batch</th>{heads}</tr>{rows}</table>"


def _thumbnail(path: Path | None) -> str:
    if path is None:
        return ""
    from mflux.errors import ImageError
    from mflux.utils.image_util import ImageUtil

    try:
        image = ImageUtil.load_image(path)
    except ImageError:
        return ""
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=85)
    data: Any = base64.b64encode(file.getvalue()).decode("ascii")
    return f'<img alt="{html.escape(path.name)}" src="data:image/jpeg;base64,{data}">'
