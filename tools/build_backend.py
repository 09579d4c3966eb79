# SPDX-License-Identifier: MIT
"""How pip builds the package: meson-python, and SSMK_CUDA in the environment as Meson's option
`cuda`: enabled, disabled or auto.  Where CUDA is enabled and nvcc is not on the PATH, the one of
PyPI becomes a build requirement.
"""

import os
import shutil

import mesonpy
from mesonpy import build_sdist, get_requires_for_build_sdist  # noqa: F401  (for pip)

# The bare compiler does not pin its parts to one release; the toolkit that it belongs to does.
TOOLKIT = "cuda-toolkit[nvcc,cccl]==13.0.*"


def _mode():
    mode = os.environ.get("SSMK_CUDA") or None
    if mode not in (None, "enabled", "disabled", "auto"):
        raise SystemExit(f"SSMK_CUDA must be enabled, disabled or auto, got {mode!r}")
    return mode


def _lacks_nvcc():
    return _mode() == "enabled" and not shutil.which("nvcc")


def _prepared(config_settings):
    """The settings with the option, and nvcc within reach."""
    settings = dict(config_settings or {})
    if _lacks_nvcc():
        try:
            import nvidia.cu13
        except ImportError:
            raise SystemExit(
                f"SSMK_CUDA=enabled: no nvcc on the PATH; install one, or {TOOLKIT}"
            ) from None
        root = nvidia.cu13.__path__[0]
        os.environ["PATH"] += os.pathsep + os.path.join(root, "bin")
    if _mode():
        given = settings.get("setup-args", [])
        given = [given] if isinstance(given, str) else list(given)
        settings["setup-args"] = [f"-Dcuda={_mode()}", *given]
    return settings


def get_requires_for_build_wheel(config_settings=None):
    requires = mesonpy.get_requires_for_build_wheel(config_settings)
    return requires + [TOOLKIT] if _lacks_nvcc() else requires


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return mesonpy.build_wheel(wheel_directory, _prepared(config_settings), metadata_directory)


get_requires_for_build_editable = get_requires_for_build_wheel


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return mesonpy.build_editable(wheel_directory, _prepared(config_settings), metadata_directory)
