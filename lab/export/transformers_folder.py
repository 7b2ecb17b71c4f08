"""Writes a model as a folder that transformers opens: weights, configuration, tokenizer, and the code of both.

The code is made by lab/bundle from this project's own, without what the model does not reach.
"""

import json
import shutil
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from golf.config.config import Config
from golf.config.knobs import UserError
from golf.config.model import ModelConfig
from golf.config.run import DataConfig
from golf.run.folder import RunFolder
from lab.bundle.bundler import bundle_source
from lab.bundle.frozen import freeze_config
from lab.generate.text_model import TextModel, find_artifact, open_text_model, run_tokenizer_path

ROOT = Path(__file__).resolve().parents[2]
MODELING, TOKENIZATION = "modeling_golf.py", "tokenization_golf.py"


class ExportError(UserError):
    """Reports a model that can't be written as asked."""


def export_folder(source: Path, tokenizer: Path | None, out: Path) -> None:
    """Writes the folder `out`, whole or not at all. Raises ExportError where it exists, UserError, OSError."""
    if out.exists():
        raise ExportError(f"{out} exists: name another folder")
    model = open_text_model(source, tokenizer)
    folder = RunFolder(source if source.is_dir() else source.parent)
    tokenizer = Path(tokenizer or run_tokenizer_path(find_artifact(source, folder), folder))
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as name:
        made = Path(name) / "made"
        made.mkdir()
        write_weights(made, model)
        write_code(made, model.model.config, tokenizer)
        write_tokenizer(made, model, tokenizer)
        (made / "README.md").write_text(model_card(model, folder), encoding="utf-8")
        made.rename(out)


def write_weights(made: Path, model: TextModel) -> None:
    """Writes fp32 weights, as the artifact's codes give them, and the configuration."""
    state = {f"golf.{name}": part.detach().float().contiguous() for name, part in model.model.state_dict().items()}
    save_file(state, made / "model.safetensors", {"format": "pt"})
    config, bos = model.model.config, model.tokenizer.bos_id
    write_json(
        made / "config.json",
        {
            "model_type": "golf", "architectures": ["GolfForCausalLM"], "golf": asdict(config), "dtype": "float32",
            "auto_map": {
                "AutoConfig": "modeling_golf.GolfConfig", "AutoModelForCausalLM": "modeling_golf.GolfForCausalLM",
            },
            "vocab_size": config.vocab_size, "hidden_size": config.model_dim, "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
            "max_position_embeddings": config.train_seq_len, "tie_word_embeddings": False, "bos_token_id": bos,
            "eos_token_id": bos,
        },
    )  # fmt: skip
    write_json(made / "generation_config.json", {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": bos})


def write_code(made: Path, config: ModelConfig, tokenizer: Path) -> None:
    """Writes the network's file and the tokenizer's, for this configuration alone."""
    frozen = freeze_config(replace(Config(), model=config, data=DataConfig(tokenizer_path=str(tokenizer))))
    for name in (MODELING, TOKENIZATION):
        (made / name).write_text(bundle_source(Path(__file__).parent / name, ROOT, frozen), encoding="utf-8")


def write_tokenizer(made: Path, model: TextModel, tokenizer: Path) -> None:
    shutil.copyfile(tokenizer, made / f"golf_tokenizer{tokenizer.suffix}")
    write_json(
        made / "tokenizer_config.json",
        {
            "tokenizer_class": "GolfTokenizer", "add_bos_token": True, "model_max_length": model.context,
            "auto_map": {"AutoTokenizer": ["tokenization_golf.GolfTokenizer", None]},
        },
    )  # fmt: skip


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


RESULT_LINES = (
    ("val_bpb", "bits per byte of validation text, from the artifact's bytes, as the run scored it"),
    ("bytes_total", "bytes of artifact and code"), ("params", "parameters"), ("steps", "steps"),
    ("train_seconds", "seconds of training"), ("data_id", "training data"), ("artifact_sha256", "artifact (SHA-256)"),
)  # fmt: skip


def model_card(model: TextModel, folder: RunFolder) -> str:
    """Returns the text of README.md, with the evidence of the run where it lies beside the artifact."""
    result = folder.load_json(folder.result) if folder.result.exists() and model.val_bpb is not None else {}
    rows = [f"| {text} | {result[key]} |" for key, text in RESULT_LINES if key in result]
    evidence = "\n".join(["| measured by its run | value |", "|---|--:|", *rows]) if rows else "No result of a run."
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {model.name}

A language model made by golf: {sum(p.numel() for p in model.model.parameters()):,} parameters that fit in
{model.artifact_bytes:,} bytes. Here they stand unpacked, in single precision.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))
```
A document begins with `{model.tokenizer.bos_id}`, which ends one too. It was trained on rows of
{model.context} tokens. There is no padding: rows of a batch have one length. A score that adapts to what it has
scored, or windows with scaled rotation, is not part of this folder.

{evidence}
"""
