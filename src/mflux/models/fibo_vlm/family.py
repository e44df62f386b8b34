"""FIBO-VLM as data: its commands."""

from mflux.models.common.family import Command, Family

FAMILY = Family(
    title="FIBO-VLM",
    commands=(
        Command("inspire-fibo", "mflux.models.fibo_vlm.cli.fibo_inspire", "turn a picture into a prompt for FIBO"),
        Command("refine-fibo", "mflux.models.fibo_vlm.cli.fibo_refine", "change a prompt for FIBO as you say"),
    ),
    alone="mflux.models.fibo_vlm.model.weights:check",
)
