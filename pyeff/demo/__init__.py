"""The main job on a real model: READ by its definition, READ fused, and full fine-tuning, side by side.

``data`` finds the text, ``variants`` builds what is compared, ``train`` trains it, ``measure`` takes memory and the
time of the recurrence alone, ``report`` shows it, and ``run`` is all of that in order. ``pyeff demo`` is the way in.
"""
