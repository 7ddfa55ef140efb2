"""Grafts in training scripts of timm that know nothing of fxgraft.

``python -m fxgraft.timm train.py --graft rsc:layer=layer4 ...`` runs a script with its own arguments, and puts the
grafts on the model that it builds. Scripts that import modules by name, as timm's train.py does with
``--device-modules``, take `fxgraft.timm.auto` instead.
"""
