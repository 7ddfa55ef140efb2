"""The methods: one file each, found through the registry in `base`."""

from fxgraft.patches import crossnorm as crossnorm
from fxgraft.patches import diversification as diversification
from fxgraft.patches import gam as gam
from fxgraft.patches import mixmo as mixmo
from fxgraft.patches import rsc as rsc
from fxgraft.patches import selfnorm as selfnorm
from fxgraft.patches.base import Patch as Patch
