"""Every model type that transformers loads as a causal language model, tried on a small random one.

``python tests/decoders.py > docs/decoders.md`` makes that page, in about ten minutes.
"""

from __future__ import annotations

import copy
import inspect
import re
import signal
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pnlac_fast.checkup import self_check
from pnlac_fast.errors import UserError, first_line
from pnlac_fast.inhibition import InhibitFT
from pnlac_fast.loading import from_hf
from pnlac_fast.models import Model
from pnlac_fast.neurons import NeuronSet

SIZES = {
    32: "hidden_size d_model n_embd dim lru_width word_embed_proj_dim attn_hidden_size",
    48: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_feedforward "
    "intermediate_size_mlp",
    24: "moe_intermediate_size expert_ffn_hidden_size",
    40: "shared_expert_intermediate_size",
    4: "num_hidden_layers n_layer num_layers n_layers num_attention_heads n_head num_heads n_heads "
    "decoder_attention_heads encoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts "
    "mamba_n_heads mamba_num_heads mamba_dt_rank linear_num_value_heads laurel_rank rotary_dim",
    2: "decoder_layers encoder_layers num_key_value_heads num_experts_per_tok linear_num_key_heads index_n_heads "
    "max_window_layers num_global_key_value_heads type_vocab_size eos_token_id",
    8: "head_dim kv_lora_rank q_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim sliding_window mamba_d_state "
    "state_size ssm_state_size linear_key_head_dim linear_value_head_dim index_topk hidden_size_per_layer_input "
    "global_head_dim attention_window_size",
    16: "qk_head_dim mamba_d_head mamba_head_dim index_head_dim",
    64: "vocab_size max_position_embeddings n_positions vocab_size_per_layer_input",
    1: "n_group topk_group mamba_n_groups n_shared_experts first_k_dense_replace bos_token_id decoder_start_token_id",
    0: "pad_token_id num_kv_shared_layers zero_expert_num",
    60: "image_token_id",
    61: "audio_token_id",
    62: "video_token_id",
    59: "boi_token_id",
    58: "eoi_token_id",
    57: "boa_token_id",
    56: "eoa_token_id",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {"is_decoder": True, "use_cache": False}
LATENT = {"num_key_value_heads": 4}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
ALTERNATE: dict[str, Any] = {
    "layer_types": ["mamba", "hybrid"] * 2,
    "hybrid_layer_ids": [1, 3],
    "num_mem_blocks": 1,
    "attention_head_dim": 16,
}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "bailing_hybrid"), LATENT),
    "kimi_linear": LATENT | {"linear_num_heads": 2, "linear_head_dim": 8},
    "dots3_note_text": LATENT,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1} | ROPE,
    "mamba2": {"num_heads": 8},
    "modernbert-decoder": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "nemotron_h": {"n_groups": 1, "layers_block_type": ["mamba", "mlp", "attention", "moe"]},
    "xmod": {"default_language": "en_XX"},
    "xlm": {"causal": True},
    "zamba": ALTERNATE | {"n_mamba_heads": 2},
    "zamba2": ALTERNATE | {"n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 1, "adapter_rank": 4},
    "zaya": {"num_experts_per_tok": 1},
}
TEXT = torch.tensor([[12, 9, 33, 47, 20, 8, 31]])


def _shrunk(config: Any, own: dict[str, Any]) -> Any:
    cls = type(config)
    aliases = getattr(cls, "attribute_map", {})
    known = {*vars(config), *aliases, *inspect.signature(cls.__init__).parameters}
    given = {name: value for name, value in SMALL.items() if name in known and aliases.get(name) not in SMALL}
    for part in getattr(cls, "sub_configs", {}):
        if (inner := getattr(config, part, None)) is not None:
            given[part] = _shrunk(inner, own).to_dict()
    return cls(**given | {name: value for name, value in own.items() if name in known})


def small(kind: str) -> Any:
    """A random model of a type, with weights large enough that each matters."""
    torch.manual_seed(0)
    hf: Any = AutoModelForCausalLM.from_config(_shrunk(AutoConfig.for_model(kind), OWN.get(kind, {}))).float().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.15)
            elif name.endswith("bias"):
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
        hf(input_ids=TEXT)
    return hf


def trained(model: Model, mode: str) -> None:
    """One step of a fine-tune in which the most active neuron of the last layer is frozen, or trains alone."""
    seen: list[torch.Tensor] = []
    last = len(model.blocks) - 1
    with torch.no_grad(), model.tapped("mlp_mid", lambda _, a: seen.append(a), [last]):
        model.hf(input_ids=TEXT)
    member = np.zeros((last + 1, model.width("mlp_mid")), bool)
    member[last, int(seen[0].flatten(0, -2).abs().sum(0).argmax())] = True
    hf = copy.deepcopy(model.hf).requires_grad_(True)
    inhibit = InhibitFT(NeuronSet("one", "general", member), mode)
    inhibit.prepare(hf)
    optimizer = torch.optim.AdamW([p for p in hf.parameters() if p.requires_grad])
    args, state = (
        SimpleNamespace(max_grad_norm=1.0, load_best_model_at_end=False, n_gpu=0),
        SimpleNamespace(global_step=0),
    )
    inhibit.on_train_begin(args, state, None, model=hf, optimizer=optimizer)
    hf(input_ids=TEXT, labels=TEXT).loss.backward()
    optimizer.step()
    state.global_step = 1
    inhibit.on_train_end(args, state, None)  # compares bits


def _holds(hf: Any, kind: str, path: str | None) -> str:
    model = from_hf(hf, None, name=kind, last_projection=path)
    failed = [name for name, check in self_check(model)["checks"].items() if not check["holds"]]
    for mode in ("freeze", "specific"):
        trained(model, mode)
    return f"not {', '.join(failed)}" if failed else ""


def outcome(kind: str) -> tuple[str, str]:
    """What becomes of a type: "whole", "named", "left", "refused" or "untried", and paths or the reason."""
    try:
        hf = small(kind)
    except Exception as error:  # of code that is not ours: whatever a made-up configuration brings about
        return "untried", f"{type(error).__name__}: {first_line(error)}"
    try:
        failed = _holds(hf, kind, None)
        return ("left" if failed else "whole"), failed
    except UserError as error:
        said = str(error)
    paths = []
    for path in re.findall(r"([\w.]+) \(\d+ neurons", said):
        try:
            failed = _holds(copy.deepcopy(hf), kind, path)
            paths.append(f"{path} ({failed})" if failed else path)
        except UserError as error:
            said = str(error)
    return ("named", ", ".join(paths)) if paths else ("refused", said)


GROUPS = {
    "whole": "Read as they are",
    "named": "Read at one of several places",
    "left": "Read, but not with padding on the left",
    "refused": "Refused",
    "untried": "Not tried",
}
HEADS = {
    "whole": "",
    "named": "Blocks hold several MLPs, or blocks hold different ones. `--last-projection` takes any of these paths, "
    "one at a time: of a mixture beside a shared expert, either the experts are read, patched and masked, or the "
    "shared expert is. `env` names the other as `unread`; `mlp_out` is the output of the one that is read, `resid` has "
    "both. Experts of Llama 4 cannot be read: the router scales what enters them, not what they give, and they are not "
    "behind transformers' experts interface. Its shared expert can.",
    "left": "Positions or states of these do not follow the mask. `cache` pads on the right only, where they are read "
    "as they should be; `env` refuses them, because answers that are generated in batches would be wrong.",
    "refused": "With this sentence. Most have no MLP, or let tokens look ahead.",
    "untried": "No small model could be made from the type's own configuration.",
}


def page(found: dict[str, dict[str, str]]) -> str:
    """The page of the documentation, of outcomes by group and type."""
    lines = [
        "# Every decoder of transformers",
        "",
        f"Each model type that `AutoModelForCausalLM` of transformers {transformers.__version__} knows, made small",
        "with random weights and tried: found by the scan of shapes, checked as `env --model` does, and fine-tuned for",
        "a step with one neuron frozen and for a step with it alone, bits compared. `python tests/decoders.py` makes",
        "this page; a test repeats some of it. The families that the README names are also held against computations",
        "by hand.",
    ]
    for group, title in GROUPS.items():
        types = found.get(group, {})
        lines += ["", f"## {title} ({len(types)})", "", *([HEADS[group], ""] if HEADS[group] else [])]
        if group in ("whole", "left"):
            lines.append(", ".join(f"`{kind}`" for kind in types))
            continue
        lines += ["| type | " + ("paths" if group == "named" else "reason") + " |", "| --- | --- |"]
        lines += [f"| `{kind}` | {reason} |" for kind, reason in types.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the page."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    found: dict[str, dict[str, str]] = {}
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        signal.alarm(900)  # none takes that long
        group, reason = outcome(kind)
        found.setdefault(group, {})[kind] = reason
        print(kind, group, reason, file=sys.stderr, flush=True)
    print(page(found), end="")


if __name__ == "__main__":
    main()
