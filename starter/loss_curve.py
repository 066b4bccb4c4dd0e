"""Draws the loss of a run from its TensorBoard log.

python starter/loss_curve.py --logs FOLDER --output FILE
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 900, 420
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 48, 56  # pixels around the plot
PAPER, INK, GRID, FAINT, LINE = "white", "#202124", "#e3e5e8", "#b9d3f5", "#1a66cc"
TAG = "loss/current"
Point = tuple[float, float]  # step, loss


def read_losses(logs: Path) -> list[Point]:
    """(step, loss) of the newest run below `logs`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = sorted(logs.rglob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        if TAG in events.Tags()["scalars"]:
            return [(event.step, event.value) for event in events.Scalars(TAG)]
    raise SystemExit(f"no {TAG} in the TensorBoard logs below {logs}")


def smoothed(points: Sequence[Point], window: int) -> list[Point]:
    """The mean of the `window` points up to each one; single steps are too noisy to read (timesteps are random)."""
    losses = [loss for _, loss in points]
    means = [sum(part := losses[max(0, i + 1 - window) : i + 1]) / len(part) for i in range(len(losses))]
    return [(step, mean) for (step, _), mean in zip(points, means, strict=True)]


def loss_curve(points: Sequence[Point]) -> Image.Image:
    """Each step's loss in the background, the mean of the last tenth of the run's steps in front."""
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    top, last = max(loss for _, loss in points) * 1.05, max(step for step, _ in points)
    font = ImageFont.load_default(16)

    def place(step: float, loss: float) -> Point:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * loss / top

    for tick in range(6):
        x, y = place(last * tick / 5, top * tick / 5)
        draw.line([(LEFT, y), (WIDTH - RIGHT, y)], GRID)
        draw.text((LEFT - 10, y), f"{top * tick / 5:.3f}", INK, font, anchor="rm")
        draw.text((x, HEIGHT - BOTTOM + 16), f"{last * tick / 5:.0f}", INK, font, anchor="mm")
    draw.line([place(*point) for point in points], FAINT, 1)
    draw.line([place(*point) for point in smoothed(points, max(1, len(points) // 10))], LINE, 3, "curve")
    draw.text((LEFT, TOP / 2), "loss: every step, and its moving average", INK, ImageFont.load_default(18), anchor="lm")
    draw.text(((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 16), "step", INK, font, anchor="mm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--logs", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    loss_curve(read_losses(options.logs)).save(options.output)


if __name__ == "__main__":
    main()
