"""The benchmarks: every operation against its definition and against the best of the others, on this machine.

``registry`` says what a case is, ``read`` and ``gemm`` fill it, ``runner`` times, ``memory`` and ``roofline`` measure
what belongs beside a time, ``results`` keeps it as JSON, ``report`` and ``plot`` show it. Installed as
``pyeff.benchmarks``; ``pyeff bench`` is the way in.
"""
