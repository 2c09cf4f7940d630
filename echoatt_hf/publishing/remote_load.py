"""
Loads a folder as someone does who has no `echoatt_hf`, and writes what the model gives. A script of its own, which
`hub.py` runs in a process of its own: `remote_load.py FOLDER AUTO_CLASS INPUTS OUTPUTS`.
"""

import sys


sys.path[:] = [path for path in sys.path if path != sys.path[0]]  # the folder of this script
sys.modules["echoatt_hf"] = None  # importing it fails, also where it is installed

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402


def main(folder: str, auto_class: str, inputs: str, outputs: str) -> None:
    transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(folder, dtype="auto", trust_remote_code=True)
    if not type(model).__module__.startswith("transformers_modules"):
        raise RuntimeError(f"The model is a {type(model).__module__}.{type(model).__name__}, not one of the folder.")
    with torch.no_grad():
        save_file({"output": model(**load_file(inputs))[0].contiguous()}, outputs)


if __name__ == "__main__":
    main(*sys.argv[1:])
