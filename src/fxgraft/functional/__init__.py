"""The methods as pure tensor functions: no model, no module, no state.

Each file holds one method's arithmetic with its shapes; `fxgraft.patches` puts it into a network.
"""

from fxgraft.functional import crossnorm as crossnorm
from fxgraft.functional import diversification as diversification
from fxgraft.functional import gam as gam
from fxgraft.functional import masks as masks
from fxgraft.functional import mixmo as mixmo
from fxgraft.functional import pairing as pairing
from fxgraft.functional import rsc as rsc
from fxgraft.functional import selfnorm as selfnorm
