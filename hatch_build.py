"""Compiles the native CPU kernels when the application is installed, editable installs too.

Without a compiler the install goes on: the engine then serves with torch's kernels and says so.
"""

import importlib.util
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Builds ``engine/kernels/cpu`` in place and puts the library into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """See ``BuildHookInterface``."""
        path = Path(self.root) / "engine" / "kernels" / "cpu" / "build.py"
        spec = importlib.util.spec_from_file_location("venturi_build", path)
        assert spec is not None
        assert spec.loader is not None
        native = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(native)
        try:
            native.build()
        except native.BuildError as error:
            print(f"native CPU kernels are left out: {error}", file=sys.stderr)
            return
        build_data["artifacts"].append(f"/engine/kernels/cpu/{native.LIBRARY.name}")
        build_data["pure_python"] = False
        # Any Python of this platform: the library is loaded through ctypes.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
