"""AUTOMATIC1111's routes, as far as Open WebUI, SillyTavern, LibreChat and Draw Things' clients use them."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from mflux.serve.jobs import Job, base64_of
from mflux.serve.requests import RequestError, lora_names, read
from mflux.serve.responses import in_thread, json_response

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from mflux.serve.app import Server
    from mflux.serve.models import Served

# What clients offer for choice, where a model has one schedule of its own.
_SAMPLER, _SCHEDULER = "Euler", "Automatic"
_MOST_IMAGES = 10


class Sdapi:
    """The routes; their jobs are cancelled by `interrupt`, and no others."""

    def __init__(self, server: Server):
        self._server, self._engine = server, server.engine
        self._model: Served = server.engine.default

    def routes(self) -> list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]:
        lists: dict[str, Callable[[], Any]] = {
            "sd-models": self._models,
            "samplers": lambda: [{"name": _SAMPLER, "aliases": ["euler"], "options": {}}],
            "schedulers": lambda: [{"name": _SCHEDULER.lower(), "label": _SCHEDULER, "aliases": None}],
            "loras": lambda: [{"name": name, "alias": name, "path": ""} for name in lora_names(self._engine)],
            "upscalers": list,
            "latent-upscale-modes": list,
            "sd-vae": list,
            "options": lambda: {"sd_model_checkpoint": self._model.id},
            "progress": self._progress,
        }
        found = [("GET", f"/sdapi/v1/{name}", self._answering(make)) for name, make in lists.items()]
        return [
            *found,
            ("POST", "/sdapi/v1/options", self.set_options),
            ("POST", "/sdapi/v1/txt2img", self.txt2img),
            ("POST", "/sdapi/v1/img2img", self.img2img),
            ("POST", "/sdapi/v1/interrupt", self.interrupt),
        ]

    def _answering(self, make: Callable[[], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return json_response(await in_thread(make))

        return answer

    def _models(self) -> list[dict[str, Any]]:
        return [
            {
                "title": model.id,
                "model_name": model.id,
                "hash": None,
                "sha256": None,
                "filename": model.id,
                "config": None,
            }
            for model in self._engine.models
        ]

    def _progress(self) -> dict[str, Any]:
        job = self._engine.running
        jobs = [one for one in (job, *self._engine.waiting) if one is not None]
        state = {
            "skipped": False,
            "interrupted": False,
            "job": job.id if job else "",
            "job_count": len(jobs),
            "job_no": 0,
            "sampling_step": job.step if job else 0,
            "sampling_steps": job.steps if job else 0,
        }
        image = base64_of(job.previews[-1].data) if job is not None and job.previews else None
        return {
            "progress": job.progress if job else 0.0,
            "eta_relative": (job.eta_seconds or 0.0) if job else 0.0,
            "state": state,
            "current_image": image,
            "textinfo": None,
        }

    async def set_options(self, request: Request) -> Response:
        asked = await self._server.json(request)
        if asked.get("sd_model_checkpoint") is not None:
            self._model = self._named(asked["sd_model_checkpoint"])
        return json_response(None)

    async def interrupt(self, request: Request) -> Response:
        for job in self._engine.jobs:
            if job.source == "sdapi":
                self._engine.cancel(job)
        return json_response({})

    async def txt2img(self, request: Request) -> Response:
        return await self._generate(request, {})

    async def img2img(self, request: Request) -> Response:
        return await self._generate(request, {"images": True})

    async def _generate(self, request: Request, about: Mapping[str, Any]) -> Response:
        asked = await self._server.json(request)

        def submit() -> Job:
            fields = self._fields(asked, images=bool(about))
            found = read(fields, self._engine, most_pixels=self._server.rules.most_pixels, is_job=True)
            return self._engine.submit(source="sdapi", **found.arguments)

        job = await in_thread(submit)
        self._server.tell(request, job)
        pictures = await self._server.finished(job, request)
        images = [await in_thread(base64_of, picture.data) for picture in pictures]
        width, height = pictures[0].size
        seeds = [picture.seed for picture in pictures]
        prompt = job.prompt
        negative = job.settings.get("negative_prompt", "")
        steps = job.settings["steps"]
        texts = [
            f"{prompt}\n{f'Negative prompt: {negative}' if negative else ''}\nSteps: {steps}, Seed: {seed}, "
            f"Size: {width}x{height}, Model: {job.model}".replace("\n\n", "\n")
            for seed in seeds
        ]
        info = {
            "prompt": prompt,
            "all_prompts": [prompt] * len(seeds),
            "negative_prompt": negative,
            "seed": seeds[0],
            "all_seeds": seeds,
            "width": width,
            "height": height,
            "steps": steps,
            "sampler_name": _SAMPLER,
            "sd_model_name": job.model,
            "infotexts": texts,
        }
        return json_response({"images": images, "parameters": _without_images(asked), "info": json.dumps(info)})

    def _named(self, name: Any) -> Served:
        """A model as clients write it: with a checkpoint's hash behind it, or its file's ending."""
        if not isinstance(name, str):
            raise RequestError("sd_model_checkpoint is no name", param="sd_model_checkpoint")
        plain = name.partition(" [")[0].removesuffix(".safetensors")
        return self._engine.model(plain)

    def _fields(self, asked: Mapping[str, Any], *, images: bool) -> dict[str, Any]:
        """A request in our fields; what is not named here is one of the WebUI's hundred, and has no effect."""
        overrides = asked.get("override_settings")
        checkpoint = overrides.get("sd_model_checkpoint") if isinstance(overrides, Mapping) else None
        model = self._named(checkpoint) if checkpoint else self._model
        counts = [asked.get(name) or 1 for name in ("batch_size", "n_iter")]
        if any(type(count) is not int for count in counts):
            raise RequestError("batch_size and n_iter are whole numbers", param="batch_size")
        fields: dict[str, Any] = {
            "model": model.id,
            "prompt": asked.get("prompt"),
            "n": counts[0] * counts[1],
            "steps": asked.get("steps"),
            "previews": 0,
        }
        if fields["n"] > _MOST_IMAGES:
            raise RequestError(f"{fields['n']} images are too many: {_MOST_IMAGES} at most", param="batch_size")
        if fields["steps"] is not None and not (type(fields["steps"]) is int and fields["steps"] > 0):
            fields["steps"] = None
        if (seed := asked.get("seed")) is not None and seed != -1:
            fields["seed"] = seed
        # Sides that are no multiples of 16 are what the WebUI takes as well.
        for side in ("width", "height"):
            value = asked.get(side)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                fields[side] = max(16, int(value) // 16 * 16)
        if len(fields.keys() & {"width", "height"}) == 1:
            only = fields.get("width") or fields.get("height")
            fields |= {"width": only, "height": only}
        if model.takes_guidance:
            fields["guidance"] = asked.get("cfg_scale")
        if model.takes_negative_prompt and asked.get("negative_prompt"):
            fields["negative_prompt"] = asked["negative_prompt"]
        if images:
            sources = asked.get("init_images")
            if not isinstance(sources, list) or not sources:
                raise RequestError("there is no image: send one in init_images", param="init_images", code="missing")
            fields["images"] = sources
            if model.takes_mask and asked.get("mask"):
                fields["mask"] = asked["mask"]
            strength = asked.get("denoising_strength")
            strength = 0.75 if strength is None else strength
            if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
                raise RequestError("denoising_strength is a number from 0 to 1", param="denoising_strength")
            if any(one.has_strength for one in model.variants):
                fields["image_strength"] = round(1 - strength, 4)
        return fields


def _without_images(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in asked.items() if name not in ("init_images", "mask")}
