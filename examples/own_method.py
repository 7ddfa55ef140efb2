"""Write a method of your own: channel dropout behind the stages of any backbone.

python examples/own_method.py --quick
"""

import argparse
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F

import fxgraft
from fxgraft import extend


@fxgraft.register("channel_drop")
@dataclass(frozen=True, kw_only=True)
class ChannelDrop(extend.LayeredPatch):
    """Set whole channels to zero in training, and scale the others.

    Args:
        p: probability that a channel of an image is dropped.
    """

    title = "Channel dropout"
    train_only = True

    layers: extend.SiteSpec | None = (0, 1)
    p: float = 0.1

    def __post_init__(self, layer):
        super().__post_init__(layer)
        extend.check_share(self, "p")

    def place(self, backbone, make):
        for site in backbone.sites(self.layers):
            unit = make(site.name, ChannelDropUnit, self)
            unit.bind(layout=backbone.layout(site))
            yield backbone.place(site, unit, evaluation=False)

    def describe(self, graft):
        return f"drops channels at {', '.join(graft.units)} with probability {self.p:g}"


class ChannelDropUnit(extend.Unit):
    layout: extend.Layout

    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        z = self.layout.canonical(x)  # (B, C, *positions), whatever the network's layout
        mask = F.dropout(torch.ones_like(z[:, :, :1]).flatten(2)[..., :1], self.config.p)
        return self.layout.restore(x, z * mask.view(*z.shape[:2], *(1,) * (z.ndim - 2)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small networks")
    names = (
        ("test_resnet", "test_vit")
        if parser.parse_args().quick
        else ("resnet50", "swin_tiny_patch4_window7_224")
    )
    for name in names:
        model = timm.create_model(name, num_classes=7)
        fxgraft.patch(model, "channel_drop", p=0.2)
        print(fxgraft.summary(model))
        size = model.pretrained_cfg["input_size"][-1]
        out = model.train()(torch.randn(2, 3, size, size))
        fxgraft.loss(model, out, torch.randint(7, (2,))).backward()


if __name__ == "__main__":
    main()
