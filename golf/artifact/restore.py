"""From an artifact to the model that is scored."""

from golf.artifact.container import Artifact
from golf.model.gpt import GPT
from golf.quant.activations import quantized_gpt
from golf.quant.stored import dequantize_state
from golf.runtime import Runtime


def restore_model(artifact: Artifact, runtime: Runtime) -> GPT:
    """The quantized model on the runtime's device, in eval mode, without fake quantization."""
    model = quantized_gpt(artifact.model, runtime.compute_dtype)
    model.load_state_dict(dequantize_state(artifact.state))
    return model.to(runtime.device).eval()
