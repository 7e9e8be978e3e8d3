"""`pipeline("image-completion")`: images in, completed images out. Also part of every published repository."""

import torch
from transformers import Pipeline
from transformers.image_utils import load_image

from .cache_imagegpt import drawing_cache


class ImageCompletionPipeline(Pipeline):
    """Keeps the upper rows of an image and draws the rest.

    `complete("cat.png", rows=16, num_completions=3)` returns `num_completions` PIL images; a list of images (PIL, paths,
    URLs) a list of such lists. rows: rows kept, in pixels of the model's images (default: half of them; 0: none). seed: makes
    each batch's drawing repeatable and leaves torch's random state as it was. Other arguments (temperature, top_k, top_p, …)
    go to `generate`, whose defaults are the paper's sampling. On a GPU the cache is static, and the step compiled;
    options of `generate` that cannot have that need `cache_implementation="dynamic"`.
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.image_processor.check_fits(self.model.config)

    def _sanitize_parameters(self, rows=None, num_completions=None, seed=None, timeout=None, **generate_kwargs):
        height = self.image_processor.token_grid()[0]
        if rows is not None and not 0 <= rows <= height:
            raise ValueError(f"rows is between 0 and the image's height, {height}; found {rows}.")
        if num_completions is not None and num_completions < 1:
            raise ValueError(f"num_completions is at least 1; found {num_completions}.")
        options = {"rows": rows, "num_completions": num_completions, "seed": seed}
        forward = {name: value for name, value in options.items() if value is not None} | generate_kwargs
        return ({} if timeout is None else {"timeout": timeout}), forward, {}

    def preprocess(self, image, timeout=None):
        return self.image_processor(load_image(image, timeout=timeout), return_tensors="pt")

    def _forward(self, model_inputs, rows=None, num_completions=1, seed=None, **generate_kwargs):
        tokens = model_inputs["input_ids"]  # (B, N)
        height, width = self.image_processor.token_grid()
        kept = tokens[:, : (height // 2 if rows is None else rows) * width]
        if kept.shape == tokens.shape:
            drawn = tokens.repeat_interleave(num_completions, dim=0)
        else:
            prompts = torch.nn.functional.pad(kept, (1, 0), value=self.model.config.vocab_size - 1)  # SOS first
            defaults = {"do_sample": True, "top_k": 0, "max_length": tokens.shape[1] + 1}
            defaults["cache_implementation"] = drawing_cache(self.model)
            devices = [self.model.device] if self.model.device.type == "cuda" else []
            with torch.random.fork_rng(devices=devices, enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                prompts = prompts.repeat_interleave(num_completions, dim=0)
                drawn = self.model.generate(prompts, **(defaults | generate_kwargs))[:, 1:]
        return {"tokens": drawn.view(len(tokens), num_completions, -1)}

    def postprocess(self, model_outputs):
        return self.image_processor.decode(model_outputs["tokens"][0])
