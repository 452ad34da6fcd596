"""The loss of a training as a picture."""

from collections.abc import Sequence
from pathlib import Path

from decoders import formats


def draw(losses: Sequence[float], held_out: float, file: Path) -> None:
    """The loss curve as a picture; without matplotlib there is none."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("no picture of the loss: matplotlib is not installed")
        return
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(losses, linewidth=0.8, label="training, each step")
    axes.axhline(held_out, color="black", linestyle="--", label=f"held out, at the end: {held_out:.3f}")
    axes.set(xlabel="step", ylabel="loss per token (nats)", yscale="log", title=file.parent.name)
    axes.set_yticks(ticks := [0.2, 0.3, 0.5, 1, 2, 3, 5, 7], ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    formats.write_file(file, lambda out: figure.savefig(out, format="png", dpi=110))
    plt.close(figure)  # of a long training there are many
