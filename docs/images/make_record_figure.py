"""Draw a figure of docs/recipes.md, such as docs/images/record.png, from recorded runs.

python docs/images/make_record_figure.py FILE.png "LABEL=RUN" ...
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

from moco_dist.report import curves, figures
from moco_dist.runs import record


def main(target: str, *words: str) -> None:
    """Draw the validation kNN accuracy of each run over its epochs."""
    series = []
    for place, (label, _, run) in enumerate(word.partition("=") for word in words):
        x, y = curves.epochs(record.read(Path(run)), "knn/top1", "%")
        series.append(figures.Series(label, x, y, place))
    picture = figures.chart(figures.Chart("record", "kNN accuracy on validation images, %", series))
    with Image.open(io.BytesIO(picture.light)) as image:
        image.convert("RGB").save(target, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
