"""Tuning configurations that fail a gate on an architecture, by name and with the reason; see docs/gpu.md.

Written by ``python scripts/gpu_resources.py --write``, not by hand. Kernels skip a configuration where it is listed.
"""

EXCLUDED: dict[str, dict[int, str]] = {
    "recur/odd": {
        90: "spills",
        120: "spills",
    },
}
