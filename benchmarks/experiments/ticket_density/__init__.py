"""Accuracy against density: what a real encoder loses as tickets become smaller and their blocks larger.

The encoder is all-MiniLM-L6-v2, the task that of ``pyeff demo``: to tell the standard library's docstrings apart by
their package. Pruned are query, key, value and output of the attention, the intermediate and the output layer of every
layer; not the pooler, which takes no part in the answer. Every training begins at the pretrained encoder and the same
head, and takes the same batches; only the mask is different:

=================  ====================================================================================================
``dense``          no mask
``imp``            iterative magnitude pruning of single weights (Chen et al. 2020, arXiv 2007.12223): train, take away
                   the smallest tenth of the original weights, rewind to the pretrained ones, and again
``imp-B``          the same for B x B blocks, by the mean magnitude in a block
``project-B``      the blocks in which most magnitude of ``imp``'s ticket of that density survives, whole
``oneshot-B``      blocks by their mean magnitude after the dense training, taken away all at once
``random-B``       blocks drawn by lot
=================  ====================================================================================================

All layers are ranked together: as they are, or, with ``-scaled`` at the end of a method's name, by the magnitude over
its mean in the layer. The mean of a block says more about its layer than about the block, and as they are, whole layers
die.

Trained is with masked dense weights, or by pyeff.nn.TicketLinear (``--through ticket``), which gives the same losses up
to rounding: the run checks that. ``methods`` chooses the masks, ``train`` trains, ``times`` measures time and memory of
the tickets against the dense model, ``store`` keeps every finished training at once, so that a run that was stopped
goes on where it was, ``report`` and ``plot`` make tables and picture.

    python -m benchmarks.experiments.ticket_density --out benchmarks/results/ticket_density.json --minutes 120
"""
