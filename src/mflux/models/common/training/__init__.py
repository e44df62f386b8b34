"""Training LoRAs: `mflux-train`, and `TrainingSession` for programs.

spec.py           what a configuration may say, checked before anything is loaded
data.py           images and captions of a folder, in which order they are learned from
adapter.py        what a family adds: how its prompts and images are encoded, how its velocity is predicted
lora.py           the layers that are trained, and the file that they become
objective.py      noise levels, and the loss
recompute.py      blocks that forget what they computed, and compute it again
optimizer.py      steps: rates, clipping, what is not finite
session.py        one run without its loop and files
checkpoint.py     what a run writes so that it can go on: the ZIP
plot.py           the page with the loss and the previews
loop.py, runner.py  the run
estimate.py       what memory it will take
"""
