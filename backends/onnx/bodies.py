"""Function bodies of a whole model: one per form of the node, each under a domain of its own.

ONNX tells functions of one name apart by their overload, which ONNX Runtime reads from 1.27 on only: before, every node gets the body
that happens to come last. So the second form of a model stands in the domain ``attnhub.2``, the third in ``attnhub.3``: the same
operator under another name, which every runtime tells apart.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from typing import Any

import onnx_ir

from attnhub.backends.onnx.body import function_body
from attnhub.backends.onnx.model import IR_VERSION
from attnhub.backends.onnx.node import INPUTS, MAX_DOMAINS, OUTPUTS, VERSION, Form, domain_of, is_ours


def nodes_of(model: onnx_ir.Model) -> Iterator[Any]:
    """attnhub's nodes in the graph, its branches, and the functions that are not bodies."""
    functions = (function for function in model.functions.values() if not is_ours(function.domain, function.name))
    for node in itertools.chain(model.graph.all_nodes(), *(function.all_nodes() for function in functions)):
        if is_ours(node.domain, node.op_type):
            yield node


def form_of(node: Any) -> Form:
    """The form of a node. Raises ValueError where the type of its mask is not known."""
    inputs = frozenset(name for name, value in zip(INPUTS, node.inputs) if value is not None)
    outputs = frozenset(name for name, value in zip(OUTPUTS, node.outputs) if value.name)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    mask = node.inputs[INPUTS.index("attn_mask")] if "attn_mask" in inputs else None
    if mask is not None and mask.dtype is None:
        raise ValueError(f"the type of attn_mask {mask.name!r} of {node.name} is not known; the node's function body depends on it")
    return Form.of_node(attributes, inputs, outputs, mask is not None and mask.dtype == onnx_ir.DataType.BOOL)


def give_bodies(model: onnx_ir.Model) -> list[Form]:
    """Give every node of ours its domain, its overload and its body, in the place of those that it may have. The forms, one per node.

    The most frequent form has the domain ``attnhub``. Raises ValueError for more forms than there are domains.
    """
    nodes = list(nodes_of(model))
    forms = [form_of(node) for node in nodes]
    remove_bodies(model)
    if not forms:
        return []
    ranked = [form for form, _ in collections.Counter(forms).most_common()]
    if len(ranked) > MAX_DOMAINS:
        raise ValueError(f"the model calls attention in {len(ranked)} different ways; at most {MAX_DOMAINS} can have bodies in one file")
    domains = {form: domain_of(number) for number, form in enumerate(ranked)}
    for node, form in zip(nodes, forms):
        node.domain, node.overload = domains[form], form.overload()
    opset = model.opset_imports[""]
    for form, domain in domains.items():
        function = onnx_ir.serde.deserialize_function(function_body(form, opset, domain))
        model.functions[function.identifier()] = function
        model.opset_imports[domain] = VERSION
    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    return forms


def remove_bodies(model: onnx_ir.Model) -> None:
    """Take out all bodies, and the domains."""
    for key in [key for key, function in model.functions.items() if is_ours(function.domain, function.name)]:
        del model.functions[key]
    for domain in (domain_of(number) for number in range(MAX_DOMAINS)):
        model.opset_imports.pop(domain, None)
