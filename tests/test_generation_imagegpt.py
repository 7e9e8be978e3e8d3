"""Drawing: whole images, completions that keep what was given, seeds, bad input."""

import itertools

import numpy as np
import pytest
import torch
from conftest import randomized, small_config
from PIL import Image, ImageSequence
from transformers import GenerationMixin

from hf_igpt import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTForMaskedImageModeling,
    ImageGPTImageProcessorPil,
    ImageGPTModel,
    generation_imagegpt,
)
from hf_igpt.cache_imagegpt import RoomyLayer
from hf_igpt.commands.folders import folder_beside
from hf_igpt.commands.sample import SampleArguments, draw
from hf_igpt.data import DataArguments
from hf_igpt.evaluation.records import save_animation
from hf_igpt.generation_imagegpt import complete, draw_rounds, fill_in, find_hidden, inpaint, inpaint_tokens, sample
from hf_igpt.pipelines_imagegpt import ImageCompletionPipeline
from hf_igpt.reporting.plots import picture_of_completions


@pytest.fixture
def processor(palette):
    return ImageGPTImageProcessorPil(clusters=palette[:16], size=8)


def images(n, size=8):
    rng = np.random.default_rng(n)
    return [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(n)]


def test_samples_are_images_of_the_palette(model, processor):
    drawn = sample(model, processor, 5, batch_size=2, progress=False)
    assert [(image.size, image.mode) for image in drawn] == [((8, 8), "RGB")] * 5
    tokens = sample(model, processor, 5, batch_size=2, progress=False, return_tokens=True)
    assert tokens.shape == (5, 64) and tokens.min() >= 0 and tokens.max() < 16
    for image, row in zip(drawn, tokens, strict=True):
        assert np.array_equal(processor(image)["input_ids"][0], row)


def test_seeds(model, processor):
    state = torch.random.get_rng_state()
    first, again, other = (sample(model, processor, 2, seed=s, return_tokens=True) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    sample(model, processor, 1, seed=None)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_training_mode_is_restored(model, processor):
    model.train()
    sample(model, processor, 1)
    assert model.training


def test_images_may_keep_different_numbers_of_rows(model, processor):
    given = images(5)
    options = {"num_completions": 2, "seed": 3, "return_tokens": True}
    rows = [2, 5, 2, 8, 0]
    drawn = complete(model, processor, given, rows, **options)
    tokens = processor(given, return_tensors="pt")["input_ids"]
    for row, kept, found in zip(tokens, rows, drawn, strict=True):
        assert torch.equal(found[:, : 8 * kept], row[: 8 * kept].expand(2, -1))
    together = complete(model, processor, [given[0], given[2]], 2, **options)  # what is drawn depends on these alone
    assert torch.equal(drawn[[0, 2]], together)
    assert torch.equal(drawn[1:2], complete(model, processor, given[1], [5], **options))
    assert torch.equal(drawn, complete(model, processor, given, np.array(rows, np.uint8), **options))
    assert torch.equal(
        complete(model, processor, given, [4] * 5, **options), complete(model, processor, given, **options)
    )


@pytest.mark.parametrize("rows", [None, 0, 1, 7, 8])
def test_completions_keep_the_given_rows(model, processor, rows):
    given = images(3, size=20)
    completions = complete(model, processor, given, rows, num_completions=2, return_tokens=True)
    assert completions.shape == (3, 2, 64)
    tokens = torch.tensor(np.asarray(processor(given)["input_ids"]))
    kept = 8 * (4 if rows is None else rows)
    assert (completions[:, :, :kept] == tokens[:, None, :kept]).all()
    if kept < 64:
        assert not torch.equal(completions[:, 0], completions[:, 1])
    from_tokens = complete(
        model, processor, tokens=tokens.to(torch.uint16), rows=rows, num_completions=2, return_tokens=True
    )
    assert torch.equal(from_tokens, completions)
    pictures = complete(model, processor, given, rows, num_completions=2)
    assert len(pictures) == 3 and len(pictures[0]) == 2
    grid = picture_of_completions(processor, given, pictures, rows)
    assert len(grid) == 3 and len(grid[0]) == 4


def test_low_temperature_and_top_k_1_are_greedy(model, processor):
    greedy = model.generate(do_sample=False)[:, 1:]
    assert torch.equal(sample(model, processor, 1, top_k=1, return_tokens=True), greedy)
    assert torch.equal(sample(model, processor, 1, temperature=1e-4, return_tokens=True), greedy)
    assert torch.equal(sample(model, processor, 1, top_p=1e-6, return_tokens=True), greedy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: sample(m, p, 0), "num_images"),
        (lambda m, p: sample(m, p, 1, temperature=0), "temperature"),
        (lambda m, p: sample(m, p, 1, top_p=0), "top_p"),
        (lambda m, p: complete(m, p, images(1), rows=9), "between 0 and the image's height, 8; found 9"),
        *(
            (lambda m, p, rows=rows: complete(m, p, images(2), rows=rows), "between 0 and the image's height, 8; found")
            for rows in (0.5, 4.0, [1, 2.5], [-1, 2], [1, 9], "4", True, [], [[1, 2]])
        ),
        (lambda m, p: complete(m, p, images(2), rows=[1, 2, 3]), "one for each of 2 images; found 3 numbers"),
        (lambda m, p: complete(m, p, images(1), num_completions=0), "num_completions"),
        (lambda m, p: complete(m, p), "either `images` or `tokens`"),
        (lambda m, p: complete(m, p, tokens=torch.zeros(2, 10, dtype=torch.long)), r"shape \(n, 64\)"),
        (lambda m, p: complete(m, p, tokens=torch.zeros(0, 64, dtype=torch.long)), "n >= 1"),
        (lambda m, p: complete(m, p, tokens=torch.full((1, 64), 16), rows=8), "token 16"),
    ],
)
def test_bad_arguments(model, processor, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, processor)


def test_foreign_processor(model, palette):
    for processor in (ImageGPTImageProcessorPil(clusters=palette, size=8), ImageGPTImageProcessorPil(size=8)):
        with pytest.raises(ValueError, match="use the processor the model was trained with"):
            sample(model, processor, 1)
    with pytest.raises(ValueError, match="64 pixels and 16 colours"):
        complete(model, ImageGPTImageProcessorPil(clusters=palette[:16], size=4), images(1))


def test_bf16_is_of_weights_and_cache(model, processor, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    types = set()
    update = RoomyLayer.update

    def recorded(self, key_states, value_states, *args, **kwargs):
        types.add((key_states.dtype, update(self, key_states, value_states, *args, **kwargs)[0].dtype))
        return self.keys, self.values

    monkeypatch.setattr(RoomyLayer, "update", recorded)
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        types.clear()
        draw(SampleArguments(str(tmp_path), num_images=2, bf16=bf16, device="cpu"), DataArguments())
        assert types == {(dtype, dtype)} and Image.open(tmp_path / "samples.png").width > 8


def test_a_static_cache_is_asked_for_where_images_are_drawn(model, processor, monkeypatch):
    """On a CPU that passes for a GPU: the same tokens of the same seed. `generate` itself leaves the choice alone."""
    made = []
    prepare = GenerationMixin._prepare_static_cache

    def prepared(self, *args, **kwargs):
        made.append(prepare(self, *args, **kwargs))
        return made[-1]

    monkeypatch.setattr(GenerationMixin, "_prepare_static_cache", prepared)
    given = images(2)

    def drawn():
        pipe = ImageCompletionPipeline(model=model, image_processor=processor)
        return (
            sample(model, processor, 3, batch_size=2, return_tokens=True),
            complete(model, processor, given, 5, num_completions=2, return_tokens=True),
            torch.stack(
                [torch.tensor(np.asarray(image)) for image in pipe(given[0], rows=5, num_completions=2, seed=0)]
            ),
        )

    dynamic = drawn()
    assert not made
    monkeypatch.setattr(generation_imagegpt, "drawing_cache", lambda model: "static")
    for one, other in zip(drawn(), dynamic, strict=True):
        assert torch.equal(one, other)
    assert made and all(cache.is_compileable for cache in made)
    count = len(made)
    model.generate()
    ImageCompletionPipeline(model=model, image_processor=processor)(given[0], rows=5, cache_implementation="dynamic")
    assert len(made) == count


@pytest.mark.parametrize(
    "stranger",
    [
        {"num_return_sequences": 3},
        {"max_new_tokens": 5},
        {"eos_token_id": 3},
        {"min_p": 0.9},
        {"num_beams": 2},
        {"suppress_tokens": [1, 2, 3]},
        {"temperature": 0.01, "top_k": 1, "top_p": 0.1},
        {"repetition_penalty": 9.0},
        {"do_sample": False},
        {"bad_words_ids": [[1]]},
    ],
    ids=str,
)
def test_a_strangers_defaults_change_nothing(model, processor, stranger):
    """What `generation_config.json` of a checkpoint says: nothing is truncated unless the caller asks for it."""
    expected = sample(model, processor, 3, seed=1, progress=False, return_tokens=True)
    given = complete(model, processor, images(2), 4, 2, seed=1, progress=False, return_tokens=True)
    defaults = model.generation_config
    for name, value in stranger.items():
        setattr(defaults, name, value)
    assert torch.equal(sample(model, processor, 3, seed=1, progress=False, return_tokens=True), expected)
    assert torch.equal(complete(model, processor, images(2), 4, 2, seed=1, progress=False, return_tokens=True), given)
    assert model.generation_config is defaults and all(getattr(defaults, k) == v for k, v in stranger.items())


@pytest.mark.parametrize("option", [{"num_return_sequences": 2}, {"max_length": 20}, {"max_new_tokens": 3}], ids=str)
def test_lengths_and_numbers_are_decided(model, processor, option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: images are drawn as a whole, and num_completions"):
        complete(model, processor, images(1), progress=False, **option)


@pytest.mark.parametrize("kind", [ImageGPTForImageClassification, ImageGPTModel])
def test_models_without_a_colour_head_draw_nothing(kind, processor, tmp_path):
    """Not noise by a head that was never trained."""
    randomized(kind(small_config())).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"is not a trained ImageGPTForCausalImageModeling: it lacks lm_head\.weight\. Draw with"
    ):
        draw(SampleArguments(str(tmp_path / "model"), num_images=1), DataArguments())
    assert not (tmp_path / "model" / "samples.png").exists()


@pytest.mark.parametrize("name", ["outputs/pretrain", "./nowhere", "/nowhere/model", "a/b/c"])
def test_a_missing_folder_is_said_to_be_missing(name):
    with pytest.raises(ValueError, match=r"There is no folder .*run_pretrain\.py"):
        draw(SampleArguments(name, num_images=1), DataArguments())


@pytest.fixture
def folder(model, processor, tmp_path):
    """A model's folder, and beside it what is none of its own."""
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "secret").write_text("mine")
    return tmp_path / "model"


def test_pictures_are_not_written_through_links(folder):
    for name in ("samples.png", "samples.png.partial"):
        (folder / name).symlink_to(folder.parent / "secret")
    draw(SampleArguments(str(folder), num_images=1), DataArguments())
    assert (folder.parent / "secret").read_text() == "mine"
    assert not (folder / "samples.png").is_symlink() and Image.open(folder / "samples.png").width > 8


def test_rows_are_refused_before_anything_is_drawn(folder):
    images(1)[0].save(folder.parent / "one.png")
    arguments = SampleArguments(str(folder), num_images=1, images=[str(folder.parent / "one.png")], rows=9)
    with pytest.raises(ValueError, match="--rows is at most 8, the image's height; found 9"):
        draw(arguments, DataArguments())
    with pytest.raises(ValueError, match="--device nonsense"):
        draw(SampleArguments(str(folder), num_images=1, device="nonsense"), DataArguments())
    assert not (folder / "samples.png").exists()


@pytest.mark.parametrize("name", ["probe", "score"])
def test_results_are_not_written_to_linked_folders(name, folder):
    (folder / name).symlink_to(folder.parent)
    with pytest.raises(ValueError, match=f"{name} leads out of .*model by a link"):
        folder_beside(str(folder), None, name)
    assert folder_beside(str(folder), str(folder.parent), name) == folder.parent  # one that was named


def test_pictures_may_be_enlarged(model, processor):
    """Each token becomes a square, without blur."""
    for draw_images in (
        lambda **scale: sample(model, processor, 1, **scale),
        lambda **scale: complete(model, processor, images(1), **scale)[0],
        lambda **scale: inpaint(model, processor, images(1), (0, 0, 0.5, 0.5), particles=2, **scale)[0],
    ):
        (small,), (large,) = draw_images(), draw_images(scale=3)
        assert large.size == (24, 24)
        assert np.array_equal(np.kron(np.asarray(small), np.ones((3, 3, 1), dtype=np.uint8)), np.asarray(large))
    for scale in (0, 1.5, -1):
        with pytest.raises(ValueError, match="scale is a whole number"):
            processor.decode([[0] * 64], scale=scale)


# -- holes -------------------------------------------------------------------------------------------------------------


def tiny_causal(seed=3, std=0.8):
    """A causal model of 2x3 pixels and 3 colours whose pixels depend on each other."""
    torch.manual_seed(seed)
    config = ImageGPTConfig(vocab_size=4, n_positions=6, n_embd=8, n_layer=1, n_head=1)
    model = ImageGPTForCausalImageModeling(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=std)
    return model


def posterior(model, tokens, hidden):
    """All images that agree with what is known, their probabilities, and the log-probability of what is known."""
    every = torch.tensor(list(itertools.product(range(3), repeat=6)))
    with torch.no_grad():
        logits = model(input_ids=torch.nn.functional.pad(every[:, :-1], (1, 0), value=3)).logits
    nats = logits.double().log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
    agree = (every == tokens)[:, ~hidden].all(dim=1)
    return every[agree], nats[agree].softmax(0), nats[agree].logsumexp(0).item()


def distance(drawn, images, chances):
    """The total variation between the frequencies of what was drawn and the chances of `images`."""
    frequencies = torch.stack([(drawn == image).all(dim=1).double().mean() for image in images])
    assert frequencies.sum() == pytest.approx(1)  # nothing else was drawn: known pixels are kept
    return (frequencies - chances).abs().sum().item() / 2


HOLES = [[0, 1, 1, 0, 0, 0], [1, 0, 0, 1, 0, 0], [0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 1, 0]]


def test_holes_are_filled_from_the_posterior():
    """What comes after a hole shapes it, the more so the more particles there are; and the evidence has no bias."""
    model, tokens = tiny_causal(), torch.tensor([0, 2, 1, 0, 2, 1])
    hidden = torch.tensor(HOLES[0], dtype=torch.bool)
    images, chances, nats = posterior(model, tokens, hidden)
    distances = []
    for particles in (1, 8, 64):
        drawn, evidence = inpaint_tokens(model, tokens[None], hidden[None], 2000, particles=particles, batch_size=2**15)
        distances.append(distance(drawn[0], images, chances))
        assert evidence.item() * 4 == pytest.approx(nats, abs=0.05)
    assert distances[0] > 0.15  # the usual shortcut
    assert distances[0] > 2 * distances[1] > 4 * distances[2] and distances[2] < 0.03


@pytest.mark.parametrize("hole", HOLES, ids=str)
def test_holes_anywhere(hole):
    model, tokens, hidden = (
        tiny_causal(1, std=0.5),
        torch.tensor([1, 2, 1, 0, 2, 0]),
        torch.tensor(hole, dtype=torch.bool),
    )
    images, chances, nats = posterior(model, tokens, hidden)
    drawn, evidence = inpaint_tokens(model, tokens[None], hidden[None], 1500, particles=32, batch_size=2**15)
    assert distance(drawn[0], images, chances) < 0.06  # of 27 images, frequencies of 1,500 draws alone are 0.04 off
    assert evidence.item() * (~hidden).sum() == pytest.approx(nats, abs=0.05)


def test_a_hole_at_the_end_is_a_completion(model, processor):
    given = images(3)
    mask = np.zeros((8, 8), dtype=bool)
    mask[3:] = True
    filled = inpaint(model, processor, given, mask, num_completions=2, seed=5)
    expected = complete(model, processor, given, rows=3, num_completions=2, seed=5)
    assert [[list(image.get_flattened_data()) for image in row] for row in filled] == [
        [list(image.get_flattened_data()) for image in row] for row in expected
    ]


def test_an_image_is_filled_alike_alone_and_among_others(model, processor):
    given, box = images(3), (0.25, 0.25, 0.75, 0.5)
    options = {"num_completions": 2, "particles": 4, "seed": 1}
    together = inpaint(model, processor, given, box, **options)
    for image, row in zip(given, together, strict=True):
        (alone,) = inpaint(model, processor, image, box, **options)
        assert [list(picture.get_flattened_data()) for picture in alone] == [
            list(picture.get_flattened_data()) for picture in row
        ]


def test_known_pixels_are_kept(model, processor):
    tokens = torch.tensor(np.asarray(processor(images(2))["input_ids"]))
    hidden = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    drawn, _ = inpaint_tokens(model, tokens, hidden, 3, particles=2, temperature=0.8, top_k=5, top_p=0.9)
    assert drawn.shape == (2, 3, 64)
    known = ~hidden[:, None].expand_as(drawn)
    assert torch.equal(drawn[known], tokens[:, None].expand_as(drawn)[known]) and drawn.max() < 16


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_masked_models_reveal_hidden_pixels_in_rounds(steps):
    """Against all orders and all colours of two hidden pixels, enumerated."""
    torch.manual_seed(0)
    config = ImageGPTConfig(vocab_size=4, n_positions=6, n_embd=8, n_layer=1, n_head=1, objective="masked")
    model = ImageGPTForMaskedImageModeling(config).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.8)
    tokens, mask = torch.tensor([[0, 2, 1, 0, 2, 1]]), torch.tensor([[False, True, False, False, True, False]])

    def chances_of(tokens, mask):
        with torch.no_grad():
            return model(input_ids=tokens, bool_masked_pos=mask).logits.double().softmax(-1)[0]

    expected = torch.zeros(3, 3, dtype=torch.float64)  # of the colours of pixels 1 and 4
    together = chances_of(tokens, mask)
    if steps == 1:
        expected = together[1][:, None] * together[4]
    else:
        for first, second in ((1, 4), (4, 1)):
            for color in range(3):
                known, left = tokens.clone(), torch.zeros_like(mask)
                known[0, first], left[0, second] = color, True
                row = together[first, color] * chances_of(known, left)[second] / 2
                expected[(color, slice(None)) if first == 1 else (slice(None), color)] += row
    drawn, nothing = inpaint_tokens(model, tokens, mask, 4000, steps=steps)
    assert nothing is None
    found = torch.zeros(3, 3, dtype=torch.float64)
    found.index_put_((drawn[0, :, 1], drawn[0, :, 4]), torch.tensor(1 / 4000, dtype=torch.float64), accumulate=True)
    assert (found - expected).abs().sum() / 2 < 0.03
    assert torch.equal(fill_in(model, tokens, mask), fill_in(model, tokens, mask, steps=1))


def test_masks_of_any_form_hide_the_same(processor):
    """A picture, arrays and a box, of the image's size and of the model's; a pixel is hidden if any part of it is."""
    expected = np.zeros((8, 8), dtype=bool)
    expected[2:6, 4:8] = True
    wide = np.kron(expected, np.ones((4, 4), dtype=bool))  # of an image of 32x32
    fine = wide & (np.arange(32) % 4 == 2)  # a part of each pixel
    picture = Image.fromarray(np.where(fine, 255, 0).astype(np.uint8))
    for mask in (
        expected,
        expected.astype(int),
        torch.from_numpy(expected).float(),
        wide,
        fine,
        picture,
        (0.5, 0.26, 1, 0.74),
    ):
        assert np.array_equal(find_hidden(processor, mask, (32, 32)), expected)
    assert np.array_equal(find_hidden(processor, expected), expected)


def test_masks_are_cropped_like_images(palette):
    processor = ImageGPTImageProcessorPil(clusters=palette[:16], size=8, do_center_crop=True)
    photo = np.zeros((32, 64, 3), dtype=np.uint8)  # its central square begins at column 16
    hole = np.zeros((32, 64), dtype=bool)
    hole[8:16, 24:32] = True
    photo[hole] = 255
    seen = np.asarray(processor(Image.fromarray(photo))["input_ids"]).reshape(8, 8)
    assert np.array_equal(find_hidden(processor, hole, (64, 32)), seen != seen[0, 0])
    squashing = ImageGPTImageProcessorPil(clusters=palette[:16], size=8)
    assert find_hidden(squashing, hole, (64, 32)).sum() == 2 * 1


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((8, 8)), "hides nothing"),
        (np.ones((8, 8)), "hides all pixels: `sample` draws whole images"),
        (np.ones((7, 8)), r"shape \(7, 8\); the image has 8x8 or 20x20 pixels"),
        (np.ones((8, 8, 3)), "shape"),
        ((0.5, 0, 0.5, 1), "0 <= left < right <= 1"),
        ((0, 0, 1), "0 <= left < right <= 1"),
        ((0, float("nan"), 1, 1), "0 <= left < right <= 1"),
        ("nowhere.png", "nowhere.png"),
    ],
    ids=str,
)
def test_masks_that_cannot_be(model, processor, mask, message):
    with pytest.raises(ValueError, match=message):
        inpaint(model, processor, images(1, size=20), mask)


@pytest.mark.parametrize(
    "options", [{"particles": 0}, {"num_completions": 0}, {"steps": 0}, {"temperature": 0}, {"top_p": 0}], ids=str
)
def test_inpainting_refuses_options(model, processor, options):
    with pytest.raises(ValueError, match="at least 1|Sampling needs"):
        inpaint(model, processor, images(1), (0, 0, 0.5, 0.5), **options)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_script_fills_holes(processor, tmp_path, objective, capsys):
    kinds = {"causal": ImageGPTForCausalImageModeling, "masked": ImageGPTForMaskedImageModeling}
    randomized(kinds[objective](small_config(objective=objective))).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (photo,) = images(1, size=20)
    photo.save(tmp_path / "photo.png")
    Image.fromarray(np.pad(np.full((5, 5), 255, dtype=np.uint8), (5, 10))).save(tmp_path / "hole.png")
    options = {"images": [str(tmp_path / "photo.png")], "num_completions": 2, "particles": [3, 1]}
    for hole in ({"mask": str(tmp_path / "hole.png")}, {"box": [0.0, 0.0, 0.5, 0.5]}):
        args = SampleArguments(str(tmp_path), output_dir=str(tmp_path / "out"), **options, **hole)
        assert draw(args, DataArguments()) == [tmp_path / "out" / "inpainted.png"]
        assert ("Surprise of the known pixels" in capsys.readouterr().out) == (objective == "causal")
    (place,) = (tmp_path / "out").glob("*")
    options["particles"] = [3]
    args = SampleArguments(str(tmp_path), output_dir=str(tmp_path / "out"), **options, **hole, gif=True, seen=True)
    names = [path.name for path in draw(args, DataArguments())]
    assert (place.name, names) == ("inpainted.png", ["seen.png", "inpainted.png", "inpainted.gif"])
    with Image.open(tmp_path / "out" / "inpainted.gif") as film:
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == 17  # none of 16 hidden pixels, one, …
    for before, after in itertools.pairwise(frames):  # the picture itself, and two completions, each pixel 12x12
        changed = (before != after).any(axis=-1)
        assert 0 <= changed.sum() <= 2 * 12 * 12 and not changed[:, :104].any()
        assert (before[changed] == 128).all()
    for wrong, message in (
        ({"seen": True, "images": []}, "--seen applies to images"),
        ({"mask": "a.png", "rows": 2}, "--rows and --mask each say"),
        ({"mask": "a.png", "images": []}, "--mask applies to images"),
        ({"box": [0.0, 0.0, 0.0, 0.0]}, "left < right"),
        ({"box": [0.0]}, "left < right"),
    ):
        with pytest.raises(ValueError, match=message):
            draw(SampleArguments(str(tmp_path), **options | wrong), DataArguments())


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_rounds_are_those_in_which_pixels_are_revealed(processor, monkeypatch, steps):
    model = randomized(ImageGPTForMaskedImageModeling(small_config(objective="masked")))
    tokens, mask = processor(images(2), return_tensors="pt")["input_ids"], torch.zeros(2, 64, dtype=torch.bool)
    mask[0, 5:21], mask[1, ::4] = True, True
    left = []
    model.register_forward_pre_hook(lambda m, args, kwargs: left.append(kwargs["bool_masked_pos"]), with_kwargs=True)
    fill_in(model, tokens, mask, steps=steps, seed=3)
    rounds = draw_rounds(mask, steps, torch.Generator().manual_seed(3))
    assert len(left) == steps and (rounds[~mask] == -1).all()
    for step, hidden in enumerate(left):
        assert torch.equal(hidden, rounds >= step)


def test_films_of_samples_and_completions(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    images(1, size=20)[0].save(tmp_path / "photo.png")
    given = {"num_images": 3, "images": [str(tmp_path / "photo.png")], "num_completions": 1, "rows": 2}
    plain = draw(SampleArguments(str(tmp_path), output_dir=str(tmp_path / "a"), **given), DataArguments())
    both = draw(SampleArguments(str(tmp_path), output_dir=str(tmp_path / "b"), gif=True, **given), DataArguments())
    assert [path.name for path in both] == ["samples.png", "samples.gif", "completions.png", "completions.gif"]
    for path in plain:  # the pictures are the same
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert {path.suffix for path in (tmp_path / "b").iterdir()} == {".png", ".gif"}
    with Image.open(tmp_path / "b" / "samples.gif") as film, Image.open(tmp_path / "b" / "samples.png") as whole:
        frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(film)]
        assert film.n_frames == 41 and film.info["loop"] == 0 and film.size == whole.size == (204, 204)
        assert np.array_equal(np.asarray(frames[-1]), np.asarray(whole))  # few colours stay exact
    first = np.asarray(frames[0])
    assert (first[4:100, 4:100] == 128).all() and len(np.unique(first)) == 2  # grey on white
    shown = np.asarray(frames[10])[4:100, 4:100][6::12, 6::12].reshape(
        64, 3
    )  # a quarter of the pixels, in raster order
    assert (shown[16:] == 128).all() and np.array_equal(
        shown[:16], np.asarray(frames[-1])[4:100, 4:100][6::12, 6::12].reshape(64, 3)[:16]
    )
    draw(
        SampleArguments(str(tmp_path), output_dir=str(tmp_path / "c"), gif=True, **given | {"rows": 8}), DataArguments()
    )
    with Image.open(tmp_path / "c" / "completions.gif") as film:  # of which nothing is drawn
        assert film.size == (204, 104) and not (np.asarray(film.convert("RGB"))[4:100, 104:200] == 128).all(-1).any()
    with Image.open(tmp_path / "b" / "completions.gif") as film:
        start = np.asarray(film.convert("RGB"))[4:100, 104:200]
    assert (start[24:] == 128).all() and not (start[:24] == 128).all(axis=-1).any()


def test_a_film_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    monkeypatch.setattr(Image.Image, "save", lambda self, file, *args, **options: file.write_bytes(b"GIF") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_animation(frames, tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())
