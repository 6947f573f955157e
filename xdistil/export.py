"""The student as ONNX files: float32, and int8 with dynamic per-channel quantisation; and a tagger that runs them."""

import logging
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput

from xdistil.models import CheckpointError, load_config, reads_token_types, unit_of

FILES = {"fp32": "model.onnx", "int8": "model-int8.onnx"}


class _Logits(nn.Module):
    """The model with what an ONNX graph has: tensors in, logits out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types).logits


def export_onnx(model, folder: Path) -> dict[str, Path]:
    """Write `model.onnx` and `model-int8.onnx` of a float32 classifier into a folder; batch and length are free. Token
    types are an input where a classifier of pairs reads them. int8 quantises every weight per channel and activations
    as they come: per tensor costs agreement with the model. Raises ImportError naming the extra if a package is
    absent."""
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
        from onnxscript.optimizer import fold_constants
    except ImportError as error:
        raise ImportError(f"onnx needs {error.name}: pip install xdistil[export]") from error

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nobody needs here
    folder.mkdir(parents=True, exist_ok=True)
    paths, free = {name: folder / file for name, file in FILES.items()}, torch.export.Dim.DYNAMIC
    ids, mask = torch.ones(2, 2, 8, dtype=torch.int64)  # a size of 1 would be taken for a constant
    mask[0, -1] = 0  # without padding the graph would have no mask
    given = {"input_ids": ids, "attention_mask": mask}
    if unit_of(model.config) == "pair" and reads_token_types(model):
        given["token_type_ids"] = mask.clone()  # the same tensor would be the same input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        program = torch.onnx.export(_Logits(model.cpu()).eval(), tuple(given.values()), dynamo=True, verbose=False,
                                    input_names=list(given), output_names=["logits"],
                                    dynamic_shapes=({0: free, 1: free},) * len(given))
    fold_constants(program.model, input_size_limit=2**31, output_size_limit=2**31)  # int8 takes constants alone
    program.save(paths["fp32"], external_data=False)
    quantize_dynamic(paths["fp32"], paths["int8"], weight_type=QuantType.QInt8, per_channel=True)
    return paths


class OnnxTagger(nn.Module):
    """An exported student that answers like the torch model: `evaluate.predict` takes either. Raises CheckpointError
    if the folder holds no file of this precision, fp32 or int8."""

    def __init__(self, folder, precision: str = "int8"):
        import onnxruntime

        super().__init__()
        path = Path(folder) / "onnx" / FILES[precision]
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist; run `xdistil export {folder}` first")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.config = load_config(folder, "STUDENT_DIR")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, input_ids, attention_mask, token_type_ids=None, **_):
        given = {"input_ids": input_ids, "attention_mask": attention_mask,  # a tokenizer may give no types
                 "token_type_ids": torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids}
        given = {one.name: given[one.name].cpu().numpy() for one in self.session.get_inputs()}
        return TokenClassifierOutput(logits=torch.from_numpy(self.session.run(None, given)[0]))
