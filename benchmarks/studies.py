"""The learning benchmarks, by name."""

from benchmarks import adaptation, corruption, domain_generalisation, ensembling, fine_grained, scenes

_ALL = (domain_generalisation, corruption, fine_grained, ensembling, adaptation, scenes)
STUDIES = {module.STUDY.name: module.STUDY for module in _ALL}
