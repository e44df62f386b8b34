"""Depth Pro as data: its command."""

from mflux.models.common.family import Command, Family

FAMILY = Family(
    title="Depth Pro",
    commands=(
        Command("save-depth", "mflux.models.depth_pro.cli.save_depth", "estimate a photo's depth with Depth Pro"),
    ),
    single=(("Depth Pro", "mflux.models.common.controls.depth_pro.weights:check"),),
)
