"""onnxruntime on the CPU: the ONNX operator Attention (opset 23) as a model of one node."""

import importlib.util

import torch

from .cases import Case, Inputs
from .peers import Peer, package_version


class OnnxRuntime(Peer):
    name = "onnxruntime"
    label = "onnxruntime"

    def missing(self) -> str | None:
        absent = [p for p in ("onnxruntime", "onnx") if importlib.util.find_spec(p) is None]
        if absent:
            return f"not installed: {', '.join(absent)} (pip install {' '.join(absent)})"
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
        except (ImportError, OSError) as error:
            return f"onnxruntime does not load: {error}"
        return None

    def version(self) -> str:
        return package_version("onnxruntime")

    def refuses(self, case: Case) -> str | None:
        if case.backward:
            return "no backward"
        if case.dropout:
            return "no dropout"
        if case.lengths:
            return "no packed sequences"
        if case.dtype == "bf16":
            return "no bfloat16 on the CPU"
        return None

    def open(self, case: Case, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # Its threads may spin during a call, but not on through the other peers' turns.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(_model(case), options, providers=["CPUExecutionProvider"])

        def bind(inputs: Inputs):
            binding = session.io_binding()
            named = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
            if inputs.mask is not None:  # a size of 1 is allowed for batch and heads only
                named["mask"] = inputs.mask.expand(*inputs.mask.shape[:-2], case.shape.SQ, -1).contiguous()
            arrays = {name: tensor.numpy() for name, tensor in named.items()}
            for name, array in arrays.items():
                binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            binding.bind_output("out", "cpu")

            def run(kept=arrays):  # the binding does not keep its inputs' memory
                session.run_with_iobinding(binding)
                return binding

            return run

        return bind

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        return [torch.from_numpy(value.copy_outputs_to_cpu()[0])]


def _model(case: Case) -> bytes:
    from onnx import TensorProto, checker, helper

    s, kind = case.shape, {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}[case.dtype]
    inputs = [helper.make_tensor_value_info("query", kind, [s.B, s.HQ, s.SQ, s.D]),
              helper.make_tensor_value_info("key", kind, [s.B, s.HK, s.SK, s.D]),
              helper.make_tensor_value_info("value", kind, [s.B, s.HK, s.SK, s.DV])]
    if case.mask:
        size = [s.B, 1, s.SQ, s.SK] if case.mask == "padding" else [s.SQ, s.SK]
        inputs.append(helper.make_tensor_value_info("mask", kind if case.mask == "bias" else TensorProto.BOOL, size))
    node = helper.make_node("Attention", [value.name for value in inputs], ["out"], is_causal=int(case.causal))
    out = helper.make_tensor_value_info("out", kind, [s.B, s.HQ, s.SQ, s.DV])
    graph = helper.make_graph([node], "attention", inputs, [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    checker.check_model(model)
    return model.SerializeToString()
