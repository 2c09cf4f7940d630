"""
Load a student in the two ways there are, at a revision that stays what it is:

    python examples/load_from_hub.py you/student                      # with echoatt_hf
    python examples/load_from_hub.py you/student --trust-remote-code  # by the code in the repository
"""

import argparse
from pathlib import Path

from huggingface_hub import model_info
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="repository of the Hub, or a folder")
    parser.add_argument("--revision", help="commit to load; that of today if not given")
    parser.add_argument("--trust-remote-code", action="store_true", help="do without echoatt_hf")
    parser.add_argument("--prompt", default="def main(")
    options = parser.parse_args(arguments)

    pinned = {}
    if not Path(options.name).exists():
        pinned = {"revision": options.revision or model_info(options.name).sha}
        print(f"revision {pinned['revision']}")
    if options.trust_remote_code:
        pinned["trust_remote_code"] = True
    else:
        import echoatt_hf  # noqa: F401, it registers the architecture

    model = AutoModelForCausalLM.from_pretrained(options.name, **pinned)
    tokenizer = AutoTokenizer.from_pretrained(options.name, **pinned)
    print(f"{type(model).__module__}.{type(model).__name__}, {len(model.config.echo_layers)} echo layers")
    inputs = tokenizer(options.prompt, return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40, do_sample=False)[0]))


if __name__ == "__main__":
    main()
