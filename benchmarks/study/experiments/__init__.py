"""The six experiments, one a module, in the order of their value."""

from benchmarks.study.experiments.adversarial import Adversarial
from benchmarks.study.experiments.base import Experiment
from benchmarks.study.experiments.cyclic import Cyclic
from benchmarks.study.experiments.iterated import Iterated
from benchmarks.study.experiments.layouts import Layouts
from benchmarks.study.experiments.references import References
from benchmarks.study.experiments.wpo import OffPolicy

EXPERIMENTS: dict[str, Experiment] = {
    each.name: each for each in (OffPolicy(), Iterated(), Cyclic(), References(), Adversarial(), Layouts())
}
