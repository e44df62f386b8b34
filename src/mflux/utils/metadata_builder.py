"""How a picture carries the settings it was made with.

EXIF's UserComment holds all of them as JSON, as in mflux 0.24; a PNG also gets an XMP packet that photo programs show.
"""

from __future__ import annotations

import json
import re
from typing import Any
from xml.sax.saxutils import escape

import PIL.Image
import PIL.PngImagePlugin

_EXIF_IFD = 0x8769
_USER_COMMENT = 0x9286
# EXIF wants the character code in front of the comment.
COMMENT_PREFIX = b"ASCII\x00\x00\x00"
XMP_KEY = "XML:com.adobe.xmp"
# Setting → element of mflux's XMP namespace.
XMP_FIELDS = {
    "seed": "seed",
    "steps": "steps",
    "guidance": "guidance",
    "model": "model",
    "generation_time_seconds": "generationTimeSeconds",
}
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_NAMESPACES = {
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "mflux": "http://ns.mflux.ai/1.0/",
}


class MetadataBuilder:
    @staticmethod
    def save_arguments(metadata: dict[str, Any], picture_format: str) -> dict[str, Any]:
        """Keyword arguments for PIL's `save` that embed `metadata`; empty for a format that has no room for it."""
        settings = PIL.Image.Exif()
        settings[_EXIF_IFD] = {_USER_COMMENT: COMMENT_PREFIX + json.dumps(metadata).encode()}
        # As bytes, which PIL takes for TIFF as well.
        exif = settings.tobytes()
        if picture_format == "PNG":
            info = PIL.PngImagePlugin.PngInfo()
            info.add_itxt(XMP_KEY, MetadataBuilder.build_xmp_packet(metadata))
            return {"exif": exif, "pnginfo": info}
        if picture_format in ("JPEG", "WEBP", "AVIF", "TIFF", "MPO"):
            return {"exif": exif}
        return {}

    @staticmethod
    def build_xmp_packet(metadata: dict[str, Any]) -> str:
        """The prompt as the description, and the settings that fit into one line each."""
        namespaces = "".join(f' xmlns:{prefix}="{address}"' for prefix, address in _NAMESPACES.items())
        prompt = _escape(metadata.get("prompt") or "")
        lines = [
            f'<dc:description><rdf:Alt><rdf:li xml:lang="x-default">{prompt}</rdf:li></rdf:Alt></dc:description>',
            f"<xmp:CreatorTool>mflux {_escape(metadata.get('mflux_version', 'unknown'))}</xmp:CreatorTool>",
        ]
        for setting, element in XMP_FIELDS.items():
            if metadata.get(setting) is not None:
                lines.append(f"<mflux:{element}>{_escape(metadata[setting])}</mflux:{element}>")
        if metadata.get("lora_paths"):
            scales = metadata.get("lora_scales") or [1.0] * len(metadata["lora_paths"])
            pairs = zip(metadata["lora_paths"], scales, strict=False)
            loras = ", ".join(f"{str(path).replace(chr(92), '/').rpartition('/')[2]}:{scale}" for path, scale in pairs)
            lines.append(f"<mflux:loras>{_escape(loras)}</mflux:loras>")
        body = "\n".join(lines)
        return (
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
            '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
            f'<rdf:Description rdf:about=""{namespaces}>\n{body}\n</rdf:Description>\n'
            '</rdf:RDF></x:xmpmeta>\n<?xpacket end="w"?>'
        )


def _escape(value: Any) -> str:
    """A value as XML text; control characters, which XML cannot hold in any way, are left out."""
    return escape(_NOT_IN_XML.sub("", str(value)))
