"""Contestants that run an exported ONNX file on a CPU: ONNX Runtime and OpenVINO."""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .repairs import mend_signal_stack
from .setup import Call, Contestant, Setup, quiet

__all__ = ["of_onnxruntime", "of_openvino"]


def of_onnxruntime(setup: Setup) -> Iterator[Contestant]:
    """ONNX Runtime with its default optimisations, if it is installed."""

    def load() -> Call:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = setup.threads
        session = onnxruntime.InferenceSession(setup.onnx(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda pixels: dict(zip(names, session.run(names, {"pixel_values": pixels.numpy()}), strict=True))

    if find_spec("onnxruntime") is not None:
        yield Contestant("onnxruntime", "all optimisations", "float32", load)


class _Compiled:
    """A model of OpenVINO; when it is freed, a fault of OpenVINO is repaired, see `mend_signal_stack`."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, pixels: Tensor) -> Any:
        return {output.get_any_name(): tokens for output, tokens in self.model(pixels.numpy()).items()}

    def __del__(self) -> None:
        del self.model
        mend_signal_stack()


def of_openvino(setup: Setup) -> Iterator[Contestant]:
    """OpenVINO in float32 and bfloat16, and in int8 with nncf, as far as they are installed."""

    def load(precision: str, quantised: bool = False) -> Call:
        import openvino

        model = openvino.convert_model(setup.onnx())
        model.reshape([setup.batch, 3, *setup.size])
        if quantised:
            import nncf

            noise = torch.rand(16, setup.batch, 3, *setup.size, generator=torch.Generator().manual_seed(1))
            data = nncf.Dataset([pixels.numpy() for pixels in noise])
            with quiet("nncf"):
                model = nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=16)
        hints = dict(
            PERFORMANCE_HINT="LATENCY", INFERENCE_PRECISION_HINT=precision, INFERENCE_NUM_THREADS=setup.threads
        )
        return _Compiled(openvino.Core().compile_model(model, "CPU", hints))

    if find_spec("openvino") is not None:
        yield Contestant("openvino", "f32", "float32", partial(load, "f32"))
        yield Contestant("openvino", "bf16", "bfloat16", partial(load, "bf16"))
        if find_spec("nncf") is not None:
            yield Contestant("openvino", "int8 by nncf", "int8", partial(load, "bf16", True))
