"""Make docs/demo.png, the README's picture, from the demo's output: `python docs/demo_picture.py out/demo`."""

import sys
from pathlib import Path

import pandas as pd
from PIL import Image, ImageDraw, ImageFont

from tasks.media.frames import FrameCache, RgbConverter
from tasks.policy.decide import NEAR_DUPLICATE

TILE, TEXT, COLUMNS = (176, 99), 40, 7
COLOURS = {"keep": "#2e7d32", "drop": "#c62828"}


def tile(out: Path, row: dict[str, str]) -> Image.Image:
    """A clip's middle key frame over its verdict."""
    path = out / "clips" / row["clip_id"][:2] / f"{row['clip_id']}.mp4"
    frames = list(FrameCache(path).keyframes())
    picture = Image.fromarray(RgbConverter(None)(frames[len(frames) // 2]))
    picture.thumbnail(TILE)
    tile = Image.new("RGB", (TILE[0], TILE[1] + TEXT), "white")
    tile.paste(picture, ((TILE[0] - picture.width) // 2, (TILE[1] - picture.height) // 2))
    draw = ImageDraw.Draw(tile)
    font = ImageFont.load_default(13)
    if row["verdict"] == "keep":
        verdict, why = f"kept, tier {row['tier']}", f"sound {row['audio']}"
    else:
        verdict = f"dropped: {row['rule']}"
        copy = row["rule"] == NEAR_DUPLICATE
        why = f"of {row['value'][:16]}" if copy else f"{row['value'][:6]}, wanted {row['threshold']}"
    draw.text((6, TILE[1] + 3), verdict, COLOURS[row["verdict"]], font)
    draw.text((6, TILE[1] + 20), why, "#555555", font)
    return tile


def main() -> None:
    out = Path(sys.argv[1])
    clips = pd.read_parquet(out / "clips.parquet")
    clips = clips[clips["verdict"].isin(list(COLOURS))].sort_values(["verdict", "tier", "rule", "clip_id"])
    rows = clips.to_dict("records")
    sheet = Image.new("RGB", (COLUMNS * (TILE[0] + 8), -(-len(rows) // COLUMNS) * (TILE[1] + TEXT + 8)), "white")
    for number, row in enumerate(rows):
        at = (number % COLUMNS * (TILE[0] + 8), number // COLUMNS * (TILE[1] + TEXT + 8))
        sheet.paste(tile(out, row), at)
    sheet.quantize(128).save(Path(__file__).parent / "demo.png", optimize=True)


if __name__ == "__main__":
    main()
