"""What sharing a teacher's pass is worth: accuracy against time for 1, 4, 8 and 16 students of each sample.

Small encoders are pre-trained from random weights with ``pyeff.recipes.multimask.Pretrainer``: text on the docstrings
of the standard library, images on scikit-learn's digits, a pixel a token. In every training a step has as many
students, B * M: with M = 1 the teacher sees as many samples as there are students, with M = 16 a sixteenth. Now and
then a training stops to ask a linear probe what the teacher's features are worth, so that a run can be read both ways:

- at equal student passes: accuracy at the same step;
- at equal time: accuracy when the same number of seconds has passed, probes left out.

Each is trained by the fused ops, and by the eager code of ``eager``, which repeats, indexes and copies where the
paper's code does; masks and noise of the two are drawn differently. The learning rate is constant after its warm-up, so
that each moment is the end of a training of that length.

    python -m benchmarks.experiments.multimask_reuse --out benchmarks/results/multimask_reuse.json --quiet-machine
"""
