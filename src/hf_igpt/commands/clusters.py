"""`scripts/run_clusters.py`: fit a palette, measure what it loses, and write it as an image processor."""

import shlex
from pathlib import Path

import numpy as np

from .. import clusters
from ..data import DataArguments, TrainingImages
from ..data.prepare import log_distortion
from ..evaluation.records import RECORDS, UNITS, Record, save_picture, whole_file, write_records
from ..reporting import plots
from .arguments import ClustersArguments
from .folders import check_holds_only


def fit_clusters(args: ClustersArguments, data_args: DataArguments) -> list[Record]:
    """Fit (or read) a palette, measure its distortion on held-out images, and write it as an image processor."""
    folder = Path(args.output_dir)
    files = {"preprocessor_config.json", "palette.npy", "palette.png", RECORDS}
    check_holds_only(folder, files)
    palette = clusters.load_palette(args.palette) if args.palette else None
    images = TrainingImages(data_args, args.seed)
    if palette is None:
        palette, _ = images.fit_palette(args.num_colors, args.num_pixels)
    distortion = clusters.distortion(images.sample_pixels("validation", args.num_pixels), palette)
    images.make_processor(palette).save_pretrained(folder)
    with whole_file(folder / "palette.npy") as partial, partial.open("wb") as file:
        np.save(file, palette)
    save_picture(plots.palette_picture(palette), folder / "palette.png")
    records = [
        Record(
            task="palette",
            metric=metric,
            value=value,
            unit=UNITS[metric],
            split="held out",
            n=len(images.splits["validation"]),
            seed=args.seed,
            dataset=images.name,
            image_size=images.image_size,
            colors=len(palette),
            checkpoint=Path(args.palette).name if args.palette else None,
        )
        for metric, value in distortion.items()
    ]
    write_records(folder / RECORDS, records)
    log_distortion(palette, distortion, "held-out images")
    print(f"Wrote the image processor, palette.npy, palette.png and records to {folder}")
    named = {"dataset_name": data_args.dataset_name, "train_dir": data_args.train_dir, "image_processor_name": folder}
    flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in named.items() if value)
    print(f"Next: python scripts/run_pretrain.py {flags}")
    return records
