"""Two processes at work: a folder of JPEG files to a token cache, and photographs tokenized at the same time."""

import multiprocessing
import tempfile
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch

from arguments import BenchmarkArguments
from hf_igpt import ImageGPTImageProcessor, ImageGPTImageProcessorPil, clusters, data
from hf_igpt.evaluation.records import Record
from photographs import PHOTOGRAPHS, decode_files, make_photographs, write_files
from stages import LIMIT, OURS, Contender, Stage
from timing import measure_seconds


BATCH_SIZE, N_BATCHES = 32, 200  # photographs that a process tokenizes


def time_folder(args: BenchmarkArguments, palette: np.ndarray) -> list[Record]:
    """Time making a token cache from a folder with two processes, beside decoding and resizing alone."""
    # The torchvision processor, or the PIL one when torchvision is not installed.
    processor = ImageGPTImageProcessor(clusters=palette, size=args.image_size)
    clusters.lookup_table(palette)  # has a stage of its own
    seconds: dict[Contender, list[float]] = {Contender(OURS): [], Contender(LIMIT): []}
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(2) as pool:
        paths = write_files(Path(folder, "images"), args.n_files)
        pool.starmap(decode_files, [(paths[:1], args.image_size)] * 2)  # imports
        parts = [(paths[start::2], args.image_size) for start in range(2)]
        for repeat in range(min(3, args.repeats)):
            decoding = measure_seconds(lambda: pool.starmap(decode_files, parts, chunksize=1))
            arguments = data.DataArguments(train_dir=f"{folder}/images", data_cache_dir=f"{folder}/cache{repeat}")
            images = data.load_images(arguments)["train"]
            tokenizing = measure_seconds(lambda: data.tokenize(images, processor, num_proc=2))  # noqa: B023
            seconds[Contender(LIMIT)].append(decoding)
            seconds[Contender(OURS)].append(tokenizing / len(images) * args.n_files)
    stage = Stage(
        "folder of JPEGs to tokens, 2 processes", args.n_files, "500x375 JPEGs", details={"files": args.n_files}
    )
    return stage.record_times(seconds)


def time_processes(args: BenchmarkArguments, palette: np.ndarray) -> list[Record]:
    """Measure, once, the seconds per photograph of two processes, beside half of what one process takes."""
    alone, together = (measure_throughput(count, palette, args.image_size) for count in (1, 2))
    stage = Stage("photos tokenised by 2 processes, against 1", 64, PHOTOGRAPHS)
    return stage.record_times({Contender(OURS): [1 / together], Contender(LIMIT): [1 / (2 * alone)]})


def measure_throughput(n_processes: int, palette: np.ndarray, image_size: int) -> float:
    """Return the images per second of processes that tokenize photographs at the same time."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(n_processes), context.Queue()
    arguments = (palette, image_size, barrier, seconds)
    processes = [context.Process(target=tokenize_photographs, args=arguments) for _ in range(n_processes)]
    for process in processes:
        process.start()
    found = [seconds.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(BATCH_SIZE / seconds_per_batch for seconds_per_batch in found)


def tokenize_photographs(palette: np.ndarray, image_size: int, barrier: Barrier, seconds: Queue) -> None:
    """Tokenize photographs in one thread, once all processes are ready, and put the seconds per batch into the queue."""
    torch.set_num_threads(1)
    processor = ImageGPTImageProcessorPil(clusters=palette, size=image_size)
    images = make_photographs(BATCH_SIZE)
    processor(images)
    barrier.wait()
    seconds.put(measure_seconds(lambda: processor(images), N_BATCHES))
