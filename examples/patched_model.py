"""A patched model without this package: transformers, safetensors and a hook per layer.

    pnlac-fast patch ... --kind shift --direction base_into_tuned --save patches
    python examples/patched_model.py --model TUNED --patch patches/race-general-shift-base_into_tuned.safetensors \\
        --prompt "What should we do about taxes?"

With this package it is ``with load_patched(model, path):`` around any call, or ``pnlac-fast generate --patch``.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def write(_: Any, args: Any, *, index: Any, add: Any, scale: float) -> Any:
    """Replace the activation a of some neurons by scale * a + add."""
    new = args[0].clone()
    new[..., index] = scale * new[..., index] + add.to(new)
    return (new,)


def attach(model: Any, path: str) -> list[Any]:
    """Patch the neurons of a file from now on; ``handle.remove()`` on each of the result takes it back."""
    handles = []
    with safe_open(path, framework="pt") as file:
        said = file.metadata()
        if said["format"] != "pnlac-patch" or said["site"] != "mlp_mid":
            raise SystemExit("this example patches the input of the down projections (site mlp_mid) only")
        for layer, block in enumerate(model.model.layers):
            if f"layers.{layer}.index" not in file.keys():  # noqa: SIM118
                continue
            index, add = (file.get_tensor(f"layers.{layer}.{name}") for name in ("index", "add"))

            def before(
                _: Any, args: Any, index: Any = index, add: Any = add, scale: float = float(said["scale"])
            ) -> Any:
                new = args[0].clone()
                new[..., index] = scale * new[..., index] + add.to(new)
                return (new,)

            handles.append(block.mlp.down_proj.register_forward_pre_hook(before))
    return handles


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--patch", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    given = parser.parse_args(arguments)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, use_safetensors=True)
    attach(model, given.patch)
    inputs = tokenizer(given.prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=given.max_new_tokens, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(answer)
    return answer


if __name__ == "__main__":
    main()
