"""One trained model in three forms, for tests of the demo."""

import shutil
from pathlib import Path

from golf.artifact.container import pack_artifact
from golf.data.loader import TokenStream
from golf.model.gpt import GPT
from golf.quant.calibration import training_rows
from lab.rates.quant_comparison import collect_hessians, parse_variant, quantize_variant
from lab.rates.trained_run import open_trained_run
from tests.trained_run_fixtures import make_trained_run

FORMS = ("fp16", "rtn8", "gptq4")
PROMPT = "The cat sees"


def make_demo_artifacts(root: Path, picture: Path) -> list[Path]:
    """Artifacts of FORMS in the folder of their run, then a truncated one; beside them stands a picture.

    The model has learned little, so that a seed matters.
    """
    run = make_trained_run(root, steps=40)
    opened = open_trained_run(run)
    model = GPT(opened.saved.model)
    model.load_state_dict(opened.saved.state)
    hessians = collect_hessians(model.eval(), training_rows(TokenStream(opened.train_paths), 2048, 32, 0))
    for name in FORMS:
        stored = quantize_variant(opened.saved.state, parse_variant(name, False), hessians)
        data, _ = pack_artifact(stored, opened.saved.model, opened.saved.tokenizer_sha256, "lzma")
        (run / f"{name}.golf").write_bytes(data)
    (run / "broken.golf").write_bytes(data[:-9])
    (run / "compare_quant").mkdir()
    shutil.copy(picture, run / "compare_quant" / "compare_quant.png")
    return [run / f"{name}.golf" for name in (*FORMS, "broken")]
