"""Grafts from the environment, for scripts that import modules by name.

``FXGRAFT_GRAFTS="rsc:layer=layer4; selfnorm" python train.py --device-modules fxgraft.timm.auto ...``: importing this
module puts the grafts of ``FXGRAFT_GRAFTS``, with semicolons between them, on the model that the script builds
afterwards. It stays so until the process ends.
"""

import atexit
import os

from fxgraft.errors import ConfigError
from fxgraft.integrations.timm.grafting import Grafting

_given = [text for text in os.environ.get("FXGRAFT_GRAFTS", "").split(";") if text.strip()]
if not _given:
    raise ConfigError(
        "fxgraft.timm.auto was imported, and the environment variable FXGRAFT_GRAFTS names no graft.\n"
        "Set it, with semicolons between grafts: FXGRAFT_GRAFTS='rsc:layer=layer4; selfnorm'."
    )
_grafting = Grafting(_given)
_grafting.__enter__()
atexit.register(_grafting.warn_unless_used)
