"""The installed version of mflux."""

from __future__ import annotations


class VersionUtil:
    @staticmethod
    def get_mflux_version() -> str:
        """The version that the installed distribution declares, "unknown" when run from a bare source tree."""
        # Imported here: importlib.metadata is a tenth of what `import mflux` costs.
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("mflux")
        except PackageNotFoundError:
            return "unknown"
