"""Every model that mflux 0.24 knows, as data, and the embedded one.

The order is the priority: where a name could mean two models, the earlier one is meant. Only data stands here, so that
a command's `--help` can list the models without loading anything.
"""

from __future__ import annotations

from typing import Any

# What most models of a family say.
_KREA2: dict[str, Any] = {
    "model_name": "krea/Krea-2-Turbo",
    "family": "krea2",
    "max_sequence_length": 1024,
    "supports_guidance": True,
    "requires_sigma_shift": True,
    "sigma_max_seq_len": 6400,
}
_FLUX: dict[str, Any] = {
    "family": "flux",
    "num_train_steps": 1000,
    "max_sequence_length": 512,
    "supports_guidance": True,
    "requires_sigma_shift": True,
    "steps": 25,
}
_FLUX2: dict[str, Any] = {
    "family": "flux2",
    "num_train_steps": 1000,
    "max_sequence_length": 512,
    "supports_guidance": True,
    "requires_sigma_shift": True,
    "transformer_overrides": {
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    },
    "text_encoder_overrides": {"hidden_size": 4096, "intermediate_size": 12288},
    "steps": 4,
}
_FLUX3: dict[str, Any] = {
    "family": "flux3",
    "max_sequence_length": 4096,
    "requires_sigma_shift": False,
    "sigma_shift": 6.93,
    "text_encoder_overrides": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 32,
        "rope_theta": 5000000.0,
    },
}
_IRIS: dict[str, Any] = {
    "model_name": "speridlabs/iris-3b",
    "family": "iris",
    "num_train_steps": 1000,
    "max_sequence_length": 300,
    "requires_sigma_shift": False,
    "text_encoder_overrides": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "rope_theta": 5000000.0,
    },
}
_QWEN: dict[str, Any] = {
    "family": "qwen",
    "requires_sigma_shift": True,
    "sigma_max_shift": 0.9,
    "sigma_max_seq_len": 8192,
    "sigma_shift_terminal": 0.02,
    "steps": 20,
}
_FIBO: dict[str, Any] = {
    "family": "fibo",
    "num_train_steps": 1000,
    "max_sequence_length": 512,
    "supports_guidance": True,
    "requires_sigma_shift": False,
}
_FIBO2: dict[str, Any] = {
    "family": "fibo2",
    "num_train_steps": 1000,
    "max_sequence_length": 4096,
    "requires_sigma_shift": False,
}
_Z_IMAGE: dict[str, Any] = {
    "model_name": "Tongyi-MAI/Z-Image-Turbo",
    "family": "z_image",
    "num_train_steps": 1000,
    "max_sequence_length": 512,
    "supports_guidance": False,
    "requires_sigma_shift": True,
}
_SEEDVR2: dict[str, Any] = {"model_name": "numz/SeedVR2_comfyUI", "family": "seedvr2", "supports_guidance": True}
_ERNIE: dict[str, Any] = {
    "family": "ernie_image",
    "num_train_steps": 1000,
    "max_sequence_length": 2048,
    "requires_sigma_shift": True,
    "transformer_overrides": {"rope_axes_dim": [32, 48, 48]},
    "sigma_base_shift": 1.3863,
    "sigma_max_shift": 1.3863,
}
_QWEN21: dict[str, Any] = {"family": "qwen21", "supports_guidance": False, "requires_sigma_shift": False}
_MOSS: dict[str, Any] = {
    "family": "moss",
    "num_train_steps": 1000,
    "max_sequence_length": 4096,
    "supports_guidance": True,
    "requires_sigma_shift": False,
    "steps": 50,
}
_ANIMA: dict[str, Any] = {
    "model_name": "circlestone-labs/Anima",
    "family": "anima",
    "num_train_steps": 1000,
    "max_sequence_length": 4096,
    "supports_guidance": True,
    "requires_sigma_shift": False,
    "sigma_shift": 3.0,
    "sigma_grid": 1000,
    "steps": 30,
}

MODELS: dict[str, dict[str, Any]] = {
    # The embedded model: FLUX.1's architecture, very small. It ships in the wheel (src/mflux/demo).
    "demo": _FLUX
    | {
        "model_name": "demo",
        "aliases": ["demo"],
        "max_sequence_length": 32,
        "supports_guidance": False,
        "requires_sigma_shift": False,
        "steps": 8,
        "default_size": 128,
    },
    "krea-2": _KREA2 | {"aliases": ["krea-2", "krea2"], "steps": 8},
    "krea-2-raw": _KREA2 | {"model_name": "krea/Krea-2-Raw", "aliases": ["krea-2-raw", "krea2-raw"]},
    "krea-2-controlnet-depth": _KREA2
    | {
        "aliases": ["krea-2-controlnet-depth", "krea-2-controlnet", "krea2-controlnet"],
        "controlnet_model": "Patil/Krea-2-depth-controlnet",
        "steps": 8,
    },
    "dev": _FLUX | {"model_name": "black-forest-labs/FLUX.1-dev", "aliases": ["dev"]},
    "schnell": _FLUX
    | {
        "model_name": "black-forest-labs/FLUX.1-schnell",
        "aliases": ["schnell"],
        "max_sequence_length": 256,
        "supports_guidance": False,
        "requires_sigma_shift": False,
        "steps": 4,
    },
    "dev-kontext": _FLUX | {"model_name": "black-forest-labs/FLUX.1-Kontext-dev", "aliases": ["dev-kontext"]},
    "dev-fill": _FLUX | {"model_name": "black-forest-labs/FLUX.1-Fill-dev", "aliases": ["dev-fill"]},
    "dev-redux": _FLUX | {"model_name": "black-forest-labs/FLUX.1-Redux-dev", "aliases": ["dev-redux"]},
    "dev-depth": _FLUX | {"model_name": "black-forest-labs/FLUX.1-Depth-dev", "aliases": ["dev-depth"]},
    "dev-controlnet-canny": _FLUX
    | {
        "model_name": "black-forest-labs/FLUX.1-dev",
        "aliases": ["dev-controlnet-canny"],
        "controlnet_model": "InstantX/FLUX.1-dev-Controlnet-Canny",
    },
    "schnell-controlnet-canny": _FLUX
    | {
        "model_name": "black-forest-labs/FLUX.1-schnell",
        "aliases": ["schnell-controlnet-canny"],
        "controlnet_model": "InstantX/FLUX.1-dev-Controlnet-Canny",
        "max_sequence_length": 256,
        "supports_guidance": False,
        "requires_sigma_shift": False,
        "steps": 4,
    },
    "dev-controlnet-upscaler": _FLUX
    | {
        "model_name": "black-forest-labs/FLUX.1-dev",
        "aliases": ["dev-controlnet-upscaler"],
        "controlnet_model": "jasperai/Flux.1-dev-Controlnet-Upscaler",
        "supports_guidance": False,
        "requires_sigma_shift": False,
    },
    "dev-fill-catvton": _FLUX
    | {
        "model_name": "black-forest-labs/FLUX.1-Fill-dev",
        "aliases": ["dev-fill-catvton"],
        "custom_transformer_model": "xiaozaa/catvton-flux-beta",
        "requires_sigma_shift": False,
    },
    "krea-dev": _FLUX | {"model_name": "black-forest-labs/FLUX.1-Krea-dev", "aliases": ["krea-dev", "dev-krea"]},
    "flux2-klein-4b": _FLUX2
    | {
        "model_name": "black-forest-labs/FLUX.2-klein-4B",
        "aliases": ["flux2-klein-4b", "flux2-klein-4B", "flux2-klein", "klein-4b", "klein-4B"],
        "transformer_overrides": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
        "text_encoder_overrides": {"hidden_size": 2560, "intermediate_size": 9728},
    },
    "flux3-image-klein": _FLUX3
    | {
        "model_name": "black-forest-labs/flux-3-image-klein",
        "aliases": ["flux3-image-klein", "flux3-klein", "flux3", "flux-3-image-klein"],
        "supports_guidance": False,
        "steps": 16,
    },
    "flux3-image-klein-base": _FLUX3
    | {
        "model_name": "black-forest-labs/flux-3-image-klein-base",
        "aliases": ["flux3-image-klein-base", "flux3-klein-base", "flux3-base", "flux-3-image-klein-base"],
        "supports_guidance": True,
        "transformer_overrides": {"flow_map": False},
        "steps": 50,
    },
    "iris-3b": _IRIS
    | {"aliases": ["iris-3b", "iris-3b-turbo", "iris-turbo", "iris"], "supports_guidance": False, "steps": 4},
    "iris-3b-base": _IRIS | {"aliases": ["iris-3b-base", "iris-base"], "supports_guidance": True, "steps": 100},
    "flux2-klein-9b": _FLUX2
    | {
        "model_name": "black-forest-labs/FLUX.2-klein-9B",
        "aliases": ["flux2-klein-9b", "flux2-klein-9B", "klein-9b", "klein-9B"],
    },
    "flux2-klein-9b-kv": _FLUX2
    | {
        "model_name": "black-forest-labs/FLUX.2-klein-9b-kv",
        "aliases": ["flux2-klein-9b-kv", "flux2-klein-9B-kv", "flux2-klein-9b-KV", "klein-9b-kv", "klein-9B-kv"],
        "supports_kv_cache": True,
    },
    "flux2-klein-base-4b": _FLUX2
    | {
        "model_name": "black-forest-labs/FLUX.2-klein-base-4B",
        "aliases": [
            "flux2-klein-base-4b",
            "flux2-klein-base-4B",
            "flux2-base-4b",
            "flux2-base-4B",
            "klein-base-4b",
            "klein-base-4B",
        ],
        "transformer_overrides": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
        },
        "text_encoder_overrides": {"hidden_size": 2560, "intermediate_size": 9728},
        "steps": 50,
    },
    "flux2-klein-base-9b": _FLUX2
    | {
        "model_name": "black-forest-labs/FLUX.2-klein-base-9B",
        "aliases": [
            "flux2-klein-base-9b",
            "flux2-klein-base-9B",
            "flux2-base-9b",
            "flux2-base-9B",
            "klein-base-9b",
            "klein-base-9B",
        ],
        "steps": 50,
    },
    "qwen-image": _QWEN
    | {"model_name": "Qwen/Qwen-Image-2512", "aliases": ["qwen-image", "qwen", "qwen-image-2512", "qwen-2512"]},
    "qwen-image-edit": _QWEN
    | {
        "model_name": "Qwen/Qwen-Image-Edit-2509",
        "aliases": ["qwen-image-edit", "qwen-edit", "qwen-edit-plus", "qwen-edit-2509"],
    },
    "qwen-image-edit-2511": _QWEN
    | {
        "model_name": "Qwen/Qwen-Image-Edit-2511",
        "aliases": ["qwen-image-edit-2511", "qwen-edit-2511"],
        "transformer_overrides": {"zero_cond_t": True},
    },
    "fibo": _FIBO | {"model_name": "briaai/FIBO", "aliases": ["fibo"], "steps": 50},
    "fibo-lite": _FIBO | {"model_name": "briaai/Fibo-lite", "aliases": ["fibo-lite", "fibo_lite"], "steps": 8},
    "fibo-edit": _FIBO | {"model_name": "briaai/Fibo-Edit", "aliases": ["fibo-edit", "fiboedit"], "steps": 50},
    "fibo-edit-rmbg": _FIBO
    | {"model_name": "briaai/Fibo-Edit-RMBG", "aliases": ["fibo-edit-rmbg", "fiboedit-rmbg"], "steps": 10},
    "fibo2": _FIBO2
    | {
        "model_name": "briaai/Fibo-2.0-dev",
        "aliases": ["fibo2", "fibo-2.0-dev"],
        "supports_guidance": True,
        "steps": 50,
    },
    "fibo2-edit-turbo": _FIBO2
    | {
        "model_name": "briaai/Fibo-2.0-edit-turbo",
        "aliases": ["fibo2-edit-turbo", "fibo-2-edit-turbo", "fibo-2.0-edit-turbo"],
        "supports_guidance": False,
        "steps": 4,
    },
    "z-image": _Z_IMAGE
    | {"model_name": "Tongyi-MAI/Z-Image", "aliases": ["z-image", "zimage"], "supports_guidance": True, "steps": 50},
    "ming-image-design": {
        "model_name": "inclusionAI/Ming-Image-0.1-Design",
        "aliases": ["ming-image-design", "ming-image", "ming-design", "ming"],
        "family": "ming",
        "num_train_steps": 1000,
        "max_sequence_length": 1024,
        "supports_guidance": True,
        "requires_sigma_shift": False,
        "steps": 12,
    },
    "lens-turbo": {
        "model_name": "Comfy-Org/Lens",
        "aliases": ["lens-turbo", "lens"],
        "family": "lens",
        "num_train_steps": 1000,
        "max_sequence_length": 512,
        "supports_guidance": False,
        "requires_sigma_shift": True,
        "steps": 4,
    },
    "z-image-turbo-controlnet-union-2.1": _Z_IMAGE
    | {
        "aliases": [
            "z-image-turbo-controlnet-union-2.1",
            "z-image-controlnet-union-2.1",
            "z-image-controlnet",
            "z-image-turbo-controlnet",
        ],
        "controlnet_model": "alibaba-pai/Z-Image-Turbo-Fun-Controlnet-Union-2.1",
        "steps": 8,
    },
    "z-image-turbo": _Z_IMAGE | {"aliases": ["z-image-turbo", "zimage-turbo"], "steps": 9},
    "seedvr2-3b": _SEEDVR2 | {"aliases": ["seedvr2-3b", "seedvr2"]},
    "ernie-image": _ERNIE
    | {"model_name": "baidu/ERNIE-Image", "aliases": ["ernie-image"], "supports_guidance": True, "steps": 50},
    "ernie-image-turbo": _ERNIE
    | {
        "model_name": "baidu/ERNIE-Image-Turbo",
        "aliases": ["ernie-image-turbo"],
        "supports_guidance": False,
        "steps": 8,
    },
    "qwen-image-2.1-turbo-controlnet-union": _QWEN21
    | {
        "model_name": "Qwen/Qwen-Image-2.1-Turbo",
        "aliases": [
            "qwen-image-2.1-turbo-controlnet-union",
            "qwen-image-2.1-turbo-controlnet",
            "qwen-2.1-turbo-controlnet",
        ],
        "controlnet_model": "alibaba-pai/Qwen-Image-2.1-Fun-Controlnet-Union",
        "steps": 8,
    },
    "seedvr2-7b": _SEEDVR2
    | {
        "aliases": ["seedvr2-7b", "seedvr2-7B"],
        "transformer_overrides": {
            "vid_dim": 3072,
            "heads": 24,
            "num_layers": 36,
            "mm_layers": 36,
            "rope_dim": 64,
            "rope_on_text": False,
            "rope_freqs_for": "pixel",
            "mlp_type": "normal",
            "use_output_ada": False,
            "last_layer_vid_only": False,
        },
    },
    "ideogram-4-fp8": {
        "model_name": "ideogram-ai/ideogram-4-fp8",
        "aliases": ["ideogram-4-fp8", "ideogram4-fp8", "ideogram4", "ideogram-4", "ideogram"],
        "family": "ideogram4",
        "max_sequence_length": 2048,
        "supports_guidance": True,
        "requires_sigma_shift": False,
        "steps": 20,
    },
    "boogu-image-turbo": {
        "model_name": "Boogu/Boogu-Image-0.1-Turbo",
        "aliases": ["boogu-image-turbo", "boogu-turbo", "boogu-image", "boogu"],
        "family": "boogu",
        "max_sequence_length": 1024,
        "supports_guidance": False,
        "requires_sigma_shift": False,
        "steps": 4,
    },
    "moss-image-sft": _MOSS
    | {"model_name": "OpenMOSS-Team/MOSS-Image-SFT", "aliases": ["moss-image-sft", "moss-image", "moss"]},
    "moss-image-base": _MOSS
    | {"model_name": "OpenMOSS-Team/MOSS-Image-Base", "aliases": ["moss-image-base", "moss-base"]},
    "qwen-image-2.1": _QWEN21
    | {
        "model_name": "Qwen/Qwen-Image-2.1",
        "aliases": ["qwen-image-2.1", "qwen-2.1", "qwen-image-21"],
        "supports_guidance": True,
        "requires_sigma_shift": True,
        "sigma_max_shift": 0.9,
        "sigma_max_seq_len": 8192,
        "sigma_shift_terminal": 0.02,
        "steps": 40,
    },
    "qwen-image-2.1-turbo": _QWEN21
    | {
        "model_name": "Qwen/Qwen-Image-2.1-Turbo",
        "aliases": ["qwen-image-2.1-turbo", "qwen-2.1-turbo", "qwen-image-21-turbo", "qwen-image-turbo-21"],
        "steps": 8,
    },
    "qwen-image-2.1-controlnet-union": _QWEN21
    | {
        "model_name": "Qwen/Qwen-Image-2.1",
        "aliases": ["qwen-image-2.1-controlnet-union", "qwen-image-2.1-controlnet", "qwen-2.1-controlnet"],
        "controlnet_model": "alibaba-pai/Qwen-Image-2.1-Fun-Controlnet-Union",
        "supports_guidance": True,
        "requires_sigma_shift": True,
        "sigma_max_shift": 0.9,
        "sigma_max_seq_len": 8192,
        "sigma_shift_terminal": 0.02,
        "steps": 40,
    },
    "anima-turbo": _ANIMA | {"aliases": ["anima-turbo", "anima"], "steps": 10},
    "anima-aesthetic": _ANIMA | {"aliases": ["anima-aesthetic"]},
    "anima-base": _ANIMA | {"aliases": ["anima-base"]},
}
