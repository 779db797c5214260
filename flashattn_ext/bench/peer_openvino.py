"""OpenVINO on the CPU: its ScaledDotProductAttention, and PagedAttention, the operator of its language models.

Both are one-operator models whose inputs are torch's own memory. The precision of execution is asked to be that of the
inputs; a processor without arithmetic of that type may compute in another, which the check of results shows.
"""

import importlib.util

import torch

from .cases import Case, Inputs
from .peers import Peer, package_version

PAGE = 32            # tokens of one page of the key/value cache on the CPU
PAGED_OPERANDS = 28  # of PagedAttentionExtension in OpenVINO 2026; the operator grows from release to release


def _element_type(dtype: str):
    import openvino

    return {"f32": openvino.Type.f32, "bf16": openvino.Type.bf16, "f16": openvino.Type.f16}[dtype]


def _tensor(x: torch.Tensor):
    """An OpenVINO tensor over the memory of x, which the caller keeps alive."""
    import openvino

    if x.dtype is torch.bfloat16:  # NumPy knows no bfloat16
        return openvino.Tensor(x.view(torch.int16).numpy(), list(x.shape), openvino.Type.bf16)
    return openvino.Tensor(x.numpy(), shared_memory=True)


def _to_torch(tensor) -> torch.Tensor:
    import openvino

    data = torch.frombuffer(bytearray(tensor.data.tobytes()), dtype={
        openvino.Type.f32: torch.float32, openvino.Type.bf16: torch.bfloat16, openvino.Type.f16: torch.float16,
    }[tensor.element_type])
    return data.view(*tensor.shape)


def _compile(outputs, parameters, dtype: str, threads: int, **properties):
    import openvino

    precision = _element_type(dtype)
    model = openvino.Model(outputs, parameters, "attention")
    return openvino.Core().compile_model(model, "CPU", {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **{
            name: precision for name in properties.get("precisions", ())}})


class _OpenVino(Peer):
    def missing(self) -> str | None:
        if importlib.util.find_spec("openvino") is None:
            return "openvino is not installed (pip install openvino)"
        try:
            import openvino  # noqa: F401
        except (ImportError, OSError) as error:
            return f"openvino does not load: {error}"
        return None

    def version(self) -> str:
        return package_version("openvino")

    def refuses(self, case: Case) -> str | None:
        if case.backward:
            return "no backward"
        if case.dropout:
            return "no dropout"
        if case.lengths:
            return "no packed sequences"
        return None


class OpenVinoSDPA(_OpenVino):
    name = "openvino"
    label = "OpenVINO SDPA"

    def refuses(self, case: Case) -> str | None:
        if case.shape.HQ != case.shape.HK:
            return "equal heads only"
        return super().refuses(case)

    def open(self, case: Case, threads: int):
        from openvino import Type, opset13

        s, dtype = case.shape, _element_type(case.dtype)
        sizes = ((s.B, s.HQ, s.SQ, s.D), (s.B, s.HK, s.SK, s.D), (s.B, s.HK, s.SK, s.DV))
        parameters = [opset13.parameter(list(size), dtype) for size in sizes]
        if case.mask:
            size = [s.B, 1, 1, s.SK] if case.mask == "padding" else [s.SQ, s.SK]
            parameters.append(opset13.parameter(size, dtype if case.mask == "bias" else Type.boolean))
        out = opset13.scaled_dot_product_attention(*parameters, causal=case.causal)
        compiled = _compile([out], parameters, case.dtype, threads)

        def bind(inputs: Inputs):
            request = compiled.create_infer_request()
            operands = [inputs.query, inputs.key, inputs.value] + ([inputs.mask] if case.mask else [])
            for i, operand in enumerate(operands):
                request.set_input_tensor(i, _tensor(operand))

            def run(kept=operands):  # the request does not keep its inputs' memory
                request.infer()
                return request

            return run

        return bind

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        return [_to_torch(value.get_output_tensor(0))]


class OpenVinoPaged(_OpenVino):
    """Causal prefill into an empty cache, or one new token for each sequence against a filled one.

    A call also writes its new keys and values into the cache: for prefill all of them, for decode one token.
    """

    name = "openvino-paged"
    label = "OpenVINO Paged"

    def refuses(self, case: Case) -> str | None:
        s = case.shape
        if case.mask:
            return "no masks"
        if s.D != s.DV:
            return "equal head dimensions only"
        if not (case.causal and s.SQ == s.SK or s.SQ == 1):
            return "causal or one query row only"
        return super().refuses(case)

    def open(self, case: Case, threads: int):
        compiled = _compile_paged(case, threads)
        return lambda inputs: _PagedRun(case, compiled, inputs)

    def collect(self, value, case: Case) -> list[torch.Tensor]:
        return [value.result()]


def _compile_paged(case: Case, threads: int):
    import numpy as np
    import openvino
    from openvino import opset13
    from openvino.op import _PagedAttentionExtension

    s, dtype, i32 = case.shape, _element_type(case.dtype), openvino.Type.i32

    def parameter(name, size, kind):
        node = opset13.parameter(openvino.PartialShape(size), kind, name=name)
        node.output(0).set_names({name})
        return node

    def constant(value, kind):
        return opset13.constant(np.array(value, dtype=kind))

    none_i, none_f, zero = [constant([], np.int32) for _ in range(6)], constant([], np.float32), constant(0, np.int32)
    pages = [-1, s.HK, PAGE, s.D]
    given = {name: parameter(name, size, kind) for name, size, kind in (
        ("query", [-1, s.HQ * s.D], dtype), ("key", [-1, s.HK * s.D], dtype), ("value", [-1, s.HK * s.D], dtype),
        ("key_cache.0", pages, openvino.Type.dynamic), ("value_cache.0", pages, openvino.Type.dynamic),
        ("past_lens", [-1], i32), ("subsequence_begins", [-1], i32), ("block_indices", [-1], i32),
        ("block_indices_begins", [-1], i32), ("max_context_len", [], i32))}
    *first, longest = given.values()
    operands = [*first, constant(s.D**-0.5, np.float32), zero, none_f,  # scale, sliding window, ALiBi
                longest, zero, none_i[0], none_i[1], none_f,            # score window, cache rotation
                none_f, zero, zero, none_f,                             # sparse attention, sinks
                zero, *none_i[2:5], none_i[5], constant([], np.uint8), none_i[0]]
    assert len(operands) == PAGED_OPERANDS
    node = _PagedAttentionExtension([operand.output(0) for operand in operands])
    for name, size in (("num_k_heads", s.HK), ("k_head_size", s.D), ("num_v_heads", s.HK), ("v_head_size", s.DV)):
        node.get_rt_info()[name] = size
    return _compile([node.output(0)], list(given.values()), case.dtype, threads, precisions=["KV_CACHE_PRECISION"])


class _PagedRun:
    """One request with a cache of its own; calling it runs the operator."""

    def __init__(self, case: Case, compiled, inputs: Inputs) -> None:
        import openvino

        self.case, s = case, case.shape
        self.request = compiled.create_infer_request()
        self.pages = -(-s.SK // PAGE)
        for port in compiled.inputs:
            if "cache" in port.get_any_name():
                size = [s.B * self.pages, *(port.get_partial_shape()[i].get_length() for i in (1, 2, 3))]
                self.request.set_tensor(port.get_any_name(), openvino.Tensor(port.get_element_type(), size))
        if s.SQ == 1 and s.SK > 1:
            past = s.SK - 1
            filler = inputs.query.new_zeros(s.B, s.HQ, past, s.D)
            self._set(filler, inputs.key[:, :, :past], inputs.value[:, :, :past], 0)
            self.request.infer()
            self._set(inputs.query, inputs.key[:, :, past:], inputs.value[:, :, past:], past)
        else:
            self._set(inputs.query, inputs.key, inputs.value, 0)

    def _set(self, query, key, value, past: int) -> None:
        """Sets (B, H, S, D) queries, keys and values that follow `past` tokens in the cache."""
        batch, new = query.shape[0], query.shape[2]
        tokens = [x.detach().transpose(1, 2).reshape(batch * new, -1).contiguous() for x in (query, key, value)]
        i32 = {name: torch.tensor(numbers, dtype=torch.int32) for name, numbers in (
            ("past_lens", [past] * batch), ("subsequence_begins", [new * b for b in range(batch + 1)]),
            ("block_indices", list(range(batch * self.pages))),
            ("block_indices_begins", [self.pages * b for b in range(batch + 1)]), ("max_context_len", past + new))}
        self.kept = [*tokens, *i32.values()]  # the request does not keep its inputs' memory
        for name, tensor in (*zip(("query", "key", "value"), tokens), *i32.items()):
            self.request.set_tensor(name, _tensor(tensor))

    def __call__(self) -> "_PagedRun":
        self.request.infer()
        return self

    def result(self) -> torch.Tensor:
        s = self.case.shape
        return _to_torch(self.request.get_output_tensor(0)).view(s.B, s.SQ, s.HQ, s.DV).transpose(1, 2)
