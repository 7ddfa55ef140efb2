"""The methods: one file each, found through the registry in `base`."""

from fxgraft.patches import rsc as rsc
from fxgraft.patches.base import Patch as Patch
