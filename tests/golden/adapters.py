"""Makes the LoRA adapters of the tiny models and their golden values, by PEFT.

Run by developers only, after `generate.py`: `python tests/golden/adapters.py` with peft beside what that needs. For
every entry of `ADAPTERS` there is the folder `NAME/` as PEFT saves it and `NAME.golden.safetensors` with the values that
`generate.py` describes, of the model with that adapter; the gradients and the parameters after ten steps are the
adapter's alone, under the names of its file. `merged.values` are the logits after `merge_and_unload`.
"""

import copy

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from generate import HERE, golden, save_golden

ADAPTERS = {
    "gpt2-lora": ("gpt2", LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "llama-lora": (
        "llama",
        LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "gate_proj", "down_proj"], use_rslora=True),
    ),
}


def main():
    torch.set_num_threads(1)
    for seed, (name, (base, config)) in enumerate(ADAPTERS.items()):
        torch.manual_seed(3000 + seed)
        config.task_type = "CAUSAL_LM"
        model = AutoModelForCausalLM.from_pretrained(HERE / base, dtype=torch.float32, attn_implementation="eager")
        model = get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.copy_(0.25 * torch.randn_like(parameter))
        # A path of the developer's machine belongs into no file.
        model.peft_config["default"].base_model_name_or_path = base
        model.save_pretrained(HERE / name)
        (HERE / name / "README.md").unlink(missing_ok=True)
        (HERE / name / "adapter_model.safetensors").chmod(0o644)
        merged = copy.deepcopy(model).merge_and_unload()
        values = golden(model, model.config.vocab_size)
        with torch.no_grad():
            values["merged.values"] = merged(values["logits.ids"].unsqueeze(0)).logits[0]
        save_golden(name, {key.replace(".default.", "."): value for key, value in values.items()})
        (HERE / f"{name}.golden.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
