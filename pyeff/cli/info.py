"""``pyeff info``: which implementation of each operation runs on this machine, and why the others do not."""

from __future__ import annotations

import json as json_module
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

# Tables stay readable in the narrowest common terminal.
WIDTH = 80


def info(
    json: Annotated[bool, typer.Option("--json", help="Print pyeff.info() as JSON and nothing else.")] = False,
) -> None:
    """What runs on this machine: operations and backends, instruction sets, versions."""
    import pyeff

    facts = pyeff.info()
    if json:
        typer.echo(json_module.dumps(facts, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.width = min(console.width, WIDTH)
    console.print(machine_table(facts))
    table, notes = op_table(facts)
    console.print(table)
    for number, reason in enumerate(notes, 1):
        console.print(f"[dim]\\[{number}][/] {reason}", highlight=False)
    console.print(f"\nBackend in force: [bold]{facts['backend']}[/] (pyeff.backend(...) or PYEFF_BACKEND changes it)")


def machine_table(facts: dict) -> Table:
    """Versions and hardware, one row a fact."""
    from rich.markup import escape
    from rich.table import Table

    cpu, cuda = facts["cpu"], facts["cuda"]
    threads = f"{cpu['threads']} thread{'s' * (cpu['threads'] != 1)}"
    rows = {
        "versions": ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items()),
        "processor": f"{cpu['model']}, {threads}",
        "instruction sets": "",
        "CUDA devices": "; ".join(
            device + (f" ({reason})" if reason else "")
            for device, reason in zip(cuda["devices"], cuda["why_not"], strict=True)
        )
        or "none",
        "CUDA kernels": ", ".join(cuda["built"]) or "not built",
    }
    if cpu["isa_chosen"]:
        detected, built = " ".join(cpu["isa_detected"]), " ".join(cpu["isa_built"])
        rows["instruction sets"] = f"{cpu['isa_chosen']} in use; built: {built}; this processor: {detected}"
    else:
        rows["instruction sets"] = f"no compiled kernels: {cpu['reason']}"
    table = Table(title="This machine", title_justify="left", show_header=False, expand=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def op_table(facts: dict) -> tuple[Table, list[str]]:
    """Each operation against each backend; the reasons are numbered, and equal ones share a number."""
    from rich.table import Table

    backends = list(next(iter(facts["ops"].values())))
    table = Table(title="Operations", title_justify="left")
    table.add_column("operation", no_wrap=True)
    for name in backends:
        table.add_column(name, justify="center", no_wrap=True)
    notes: list[str] = []
    for op, states in facts["ops"].items():
        cells = []
        for name in backends:
            state = states[name]
            reason, cell = state["reason"], "[green]yes[/]" if state["usable"] else "[dim]-[/]"
            if reason and reason not in notes:
                notes.append(reason)
            cells.append(f"{cell} [dim]\\[{notes.index(reason) + 1}][/]" if reason else cell)
        table.add_row(op, *cells)
    return table, notes
