"""Draw what `keepwarm bench agent` measured: time to the first token of every turn, caching on and off.

python scripts/agent_plot.py bench/results/DATE-agent.json docs/img/agent-session.png
Needs matplotlib: pip install "keepwarm[plot]".
"""

import argparse
from pathlib import Path

import msgspec
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keepwarm.bench.agent_report import Caching, Samples
from keepwarm.bench.report import Report

SIZE_INCHES, DPI = (8, 4.5), 120
LINES: dict[Caching, tuple[str, str]] = {"off": ("caching off", "#868e96"), "on": ("caching on", "#e8590c")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="the JSON of keepwarm bench agent")
    parser.add_argument("image", type=Path, help="the PNG to write")
    arguments = parser.parse_args()
    report = msgspec.json.decode(arguments.results.read_bytes(), type=Report[Samples])
    draw(report, arguments.image)


def draw(report: Report[Samples], image: Path) -> None:
    """Write the picture; its folder is made."""
    figure = Figure(figsize=SIZE_INCHES, dpi=DPI)
    axes = figure.subplots()
    for caching, (label, colour) in LINES.items():
        turns = report.samples.of(caching)
        axes.plot([one.number for one in turns], [one.ttft_ms / 1000 for one in turns], "o-", label=label, color=colour)
    first, last = report.samples.of("on")[0], report.samples.of("on")[-1]
    axes.set_title(f"A coding agent's session: prompts of {first.n_prompt:,} to {last.n_prompt:,} tokens")
    axes.set_xlabel("turn")
    axes.set_ylabel("time to first token, s")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(image, metadata={"Software": None})  # the same picture for the same numbers


if __name__ == "__main__":
    main()
