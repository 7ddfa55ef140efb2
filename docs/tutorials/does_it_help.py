"""
Does it help on my data?
========================

A paper reports a gain on its own data. To know the gain on yours, compare. ``fxgraft compare`` trains the
network twice, once bare and once with the method. Both runs start from the same weights and see the same
batches. It repeats this pair for each seed and each domain that is held out for testing.

.. code-block:: bash

   pip install -e ".[demo]"
   fxgraft compare DATA --model resnet50 --pretrained --graft rsc --hold-out all --seeds 5 --out report

``DATA`` is a folder, or tar files of one. The images lie in it as ``domain/class/image``,
``train|val|test/class/image`` or ``class/image``. ``--hold-out`` is for the first of these.
"""

# %%
# A small comparison
# ------------------
# In Python the command is a function. To be quick, this page trains a tiny network on scikit-learn's digits. It
# learns plain ones, and is tested on ``thick`` ones, which are also turned and coloured.
#
# We ask about two things. ``mixstyle`` mixes the styles of images in training. ``adapt_batchnorm`` measures
# the statistics of the trained network's BatchNorm layers again, on the test images without their labels.

import tempfile
from pathlib import Path

import fxgraft
from fxgraft.comparison.demo_data import write_digits

folder = Path(tempfile.mkdtemp())
data = write_digits(folder / "digits", size=24)


def compare(seeds):
    return fxgraft.compare(
        data / "plain",
        test=data / "thick",
        model="test_resnet",
        model_options={"output_stride": 16},
        grafts=["mixstyle", "adapt_batchnorm"],
        seeds=seeds,
        size=24,
        training={
            "epochs": 8,
            "batch_size": 64,
            "lr": 4e-3,
            "hflip": 0.0,
            "color_jitter": 0.0,
        },
        workers=1,
        out=folder / "report",
    )


print(compare(seeds=2))

# %%
# Two pairs can't tell. More seeds can: the same call goes on where it stopped, and runs the missing ones. So
# does a call that was interrupted.

result = compare(seeds=4)
print(result)

# %%
# Look at the pairs
# -----------------
# Every line is a pair. Where the lines of a method agree, the interval is narrow.

import matplotlib.pyplot as plt

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
for number, verdict in enumerate(result.verdicts):
    colour = f"C{number}"
    for before, after in result.pairs(verdict.variant):
        scores = [100 * result.score(before), 100 * result.score(after)]
        left.plot([2 * number, 2 * number + 1], scores, "o-", color=colour)
    low, high = (
        100 * (verdict.difference - verdict.low),
        100 * (verdict.high - verdict.difference),
    )
    right.errorbar(
        100 * verdict.difference,
        number,
        xerr=[[low], [high]],
        fmt="o",
        color=colour,
        capsize=4,
    )
left.set_xticks(range(4), ["bare", "mixstyle", "bare", "adapt_\nbatchnorm"])
left.set_ylabel("accuracy, %")
right.axvline(0, color="0.8")
right.set_yticks(range(2), [verdict.variant for verdict in result.verdicts])
right.set(xlabel="gain in points, with its interval", ylim=(-0.5, 1.5))
figure.supxlabel(
    "timm's test_resnet, trained on this page from random weights", fontsize=8
)
plt.show()

# %%
# Read the verdict
# ----------------
# - **The gain** is the mean difference within the pairs, in points: percentage points of accuracy.
# - **The interval** holds the true mean difference with 95 % confidence. It is wide when the pairs disagree.
#   With several methods it is widened, so that all verdicts hold together ("Holm").
# - **The verdict** is one of four:
#
#   - "helps" or "hurts": the interval doesn't contain zero.
#   - "no difference": the interval contains zero, and the pairs suffice to show a difference that matters.
#     That is two points, or what you give as ``interest=``. The verdict says how large a difference the
#     interval still allows.
#   - "too few pairs": neither holds. The verdict says how many more pairs you need.
#
# - **Below the table** stands the smallest true gain that so many pairs show in four of five such studies
#   (80 % power). A smaller one is likely to be missed. More seeds make this number smaller.
#
# "Too few pairs" isn't "no effect". Look at the smallest gain that the pairs could show before you drop a
# method.
#
# A report to keep
# ----------------
# ``result.to_html("report.html")`` writes a page with the table, every run, what the methods do to some of
# your images, and what you need to repeat it. The command writes it into the folder that ``--out`` names.
#
# More to ask
# -----------
# - ``--test DIR`` tests on the images in another folder, as above; ``--corrupt`` on the corruptions of ImageNet-C
#   (``pip install -e ".[corruptions]"``).
# - ``--per-class 50`` trains on at most 50 images of each class and domain.
# - ``--tune lr=0.003,0.01`` first finds the best of these values for the bare network.
# - ``--graft "gam:layers=[global_pool,fc]"`` adapts the trained network to the test images, as
#   ``adapt_batchnorm`` does. One of the two may follow other methods: ``--graft "rsc + adapt_batchnorm"``.
#
# :doc:`How we measure </explanation/measuring>` says more.
